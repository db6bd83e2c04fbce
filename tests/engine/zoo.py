"""Tiny tokenizers of the kinds that published models have, trained on the spot, and texts that try them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.engine.tiny import write_json

PROSE = (
    "the quick brown fox jumps over a lazy dog Hello World naïve café über Straße résumé don't it's I'll we've 1234 "
    "3.14 e-mail a_b x=y (in brackets) [and] {more} Ελλάδα привет мир 日本語 文字 中文 한국어 שלום مرحبا 🙂 low lower"
)
WORDS = [*PROSE.split(), "\U0001f469\u200d\U0001f469\u200d\U0001f467"]
SPECIALS = [
    "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>", "<bos>",
    "<extra_id_0>", "<extra_id_7>", "<s>NOTUSED", "<new>", "new word", "ENT", "[mask]", "<|padding|>", "[unused1]",
]  # fmt: skip
ODD = [
    "", " ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u200d", "\ufeff", "\0", "\x07", "\x7f",
    "\u0301", "e\u0301", "ﬁ", "\uff28", "İ", "ß", "½", "…", "“q”", "a" * 120, "▁", "Ġ", "##ing", "\ud7ff", "\U0001f468",
    "''", "``", ".", ",", "!", "'s",
]  # fmt: skip


def make_texts(count: int = 2_000) -> list[str]:
    """Always the same: words, special tokens, accents, control characters and white space, in any order."""
    dice = Random(13)
    texts = [*ODD, *SPECIALS, "word " * 300, "x" * 2_000, "a" * 100 + " " + "b" * 101, " \t " * 50 + "end"]
    while len(texts) < count:
        parts = [dice.choice(dice.choice((WORDS, WORDS, WORDS, SPECIALS, ODD))) for _ in range(dice.randint(1, 9))]
        joined = dice.choice((" ", " ", "", "  ", "\n")).join(parts)
        texts.append(dice.choice((str, str, str.upper, str.title))(joined))
    return texts


CORPUS = [" ".join(Random(at).choices(WORDS, k=30)) for at in range(200)]


def word_piece(specials: list[str], **normalizer: Any) -> Tokenizer:
    """As BERT's: a cased vocabulary with accents, so that every setting of the normalizer shows."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**({"lowercase": False, "strip_accents": False} | normalizer))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = [chr(at) for at in range(33, 127)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *(text.lower() for text in CORPUS)], trainer)
    return tokenizer


def bert(**normalizer: Any) -> Tokenizer:
    tokenizer = word_piece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]"], **normalizer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def mpnet() -> Tokenizer:
    tokenizer = word_piece(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], lowercase=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def byte_pairs(specials: list[str], cut: Any = None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def roberta() -> Tokenizer:
    tokenizer = byte_pairs(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def neox() -> Tokenizer:
    """As ModernBERT's: a byte BPE with NFC, a template, and tokens of white space that are added."""
    specials = ["<|endoftext|>", "<|padding|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer = byte_pairs(specials, normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken("    ", normalized=True), AddedToken("  ", normalized=True)])
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def unigram(specials: list[str], charsmap: bool = True, unk: str = "<unk>") -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Precompiled(one_character_map()) if charsmap else normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=specials, unk_token=unk, show_progress=False, initial_alphabet=list("aeiou▁")
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def xlm_roberta(charsmap: bool = True) -> Tokenizer:
    tokenizer = unigram(["<s>", "<pad>", "</s>", "<unk>"], charsmap)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def camembert() -> Tokenizer:
    tokenizer = unigram(["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>", "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 5), ("</s>", 6)]
    )
    return tokenizer


def t5() -> Tokenizer:
    tokenizer = unigram(["<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken(f"<extra_id_{at}>") for at in range(10)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def llama() -> Tokenizer:
    """A BPE of characters with bytes for those that are unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Fuse()
    every = ["<unk>", "<s>", "</s>", *(f"<0x{at:02X}>" for at in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=every, show_progress=False)
    words = [word for text in CORPUS for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def one_character_map() -> bytes:
    """A table as SentencePiece compiles it, of one entry: the wide H becomes "H". A trie, then texts."""
    units = [0] * 1_025
    units[0] = 256 << 10
    at = 256
    for number, byte in enumerate("\uff28".encode()):
        at ^= byte
        below = 512 + 256 * number
        units[at] = byte | (at ^ below) << 10 | (number == 2) << 8
        at = below
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + b"H\0"


def write_folder(path: Path, model_type: str, make: Callable[[], Tokenizer], **files: dict[str, Any]) -> Path:
    """A folder that is counted with; nothing else of it is used. `files`: their names without `.json`."""
    path.mkdir()
    tokenizer = make()
    tokenizer.save(str(path / "tokenizer.json"))
    rows = tokenizer.get_vocab_size() + 8
    config = {
        "model_type": model_type,
        "hidden_size": 768,
        "dim": 768,
        "vocab_size": rows,
        "max_position_embeddings": 512,
    }
    write_json(path / "config.json", config | files.get("config", {}))
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    write_json(
        path / "modules.json", [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds.items()]
    )
    (path / "1_Pooling").mkdir()
    write_json(path / "1_Pooling" / "config.json", {"word_embedding_dimension": 768, "pooling_mode": "mean"})
    write_json(path / "sentence_bert_config.json", {"max_seq_length": 128})
    (path / "model.onnx").write_bytes(b"")
    for name, members in files.items():
        if name == "config":
            continue
        write_json(path / f"{name}.json", members)
    return path
