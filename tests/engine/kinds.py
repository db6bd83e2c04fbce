"""Small tokenizers of every kind, as the models that we serve have them."""

import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from tests.engine.tiny import make_folder, write_json

PIECES = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "un", "##believ", "##able", "river", "##s", "don", "'", "t"]
SPECIALS = PIECES[:5]


def tiny(**changed: Any) -> Tokenizer:
    """A WordPiece tokenizer of its own letters, with BERT's rules, unless something is `changed`."""
    letters = [*string.ascii_lowercase, *(f"##{each}" for each in string.ascii_lowercase), *string.digits]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys([*PIECES, *letters, *string.punctuation]))}
    model = changed.get("model") or WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = changed.get("normalizer") or BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = changed.get("pre_tokenizer") or BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(each, lstrip=each == "[MASK]", special=True) for each in SPECIALS])
    return tokenizer


def unigram() -> Tokenizer:
    """As XLM-RoBERTa has it."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁ab", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def byte_pairs(processor: processors.PostProcessor | None, *, prefix_space: bool) -> Tokenizer:
    """As RoBERTa (with its own processor) and ModernBERT (with a template) have it."""
    words = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġab"]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [("a", "b"), ("Ġ", "ab")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>"])
    if processor is not None:
        tokenizer.post_processor = processor
    return tokenizer


def save(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A model's folder that has it."""
    folder = make_folder(tmp_path / "tiny")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return folder
