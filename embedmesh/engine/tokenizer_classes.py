"""The tokenizer classes of `transformers` that are known: what each makes of a vocabulary and of settings.

Each has its own normalizer, pre-tokenizer and special tokens around a text, and ignores those of tokenizer.json. This
module repeats what `transformers` 5 does, quirks included; the tests compare.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

from embedmesh.engine.tokenizer_source import Refuse, TokenizerSource

Ends = list[tuple[str, int]]
"""The tokens before and behind a text, with their ids."""

METASPACE = "\u2581"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
AS_IT_IS = "('PreTrainedTokenizerFast' takes tokenizer.json as it is)"
EXTRA_IDS = 100  # T5's default
EXTRA_IDS_MAX = 10_000  # more than any vocabulary has


class TokenizerParts(NamedTuple):
    """The parts that a class makes: a model, a normalizer or None, and a pre-tokenizer."""

    model: Any
    normalizer: Any
    pre_tokenizer: Any


class TokenizerClass(NamedTuple):
    """A class: its default special tokens, and how it makes its parts.

    `ends` are the names of the tokens before and behind a text, if any, and `around` puts them there; without it they
    are those of tokenizer.json (`keeps`), or none. `more` makes the list of further special tokens from the given ones.
    `again`: at last every special token is added again as a plain one, whatever its settings were. `typed`: models are
    given the token types of a pair.
    """

    build: Callable[[TokenizerSource, Mapping[str, str]], TokenizerParts]
    tokens: Mapping[str, str | AddedToken]
    ends: tuple[str, ...] = ()
    around: Callable[[TokenizerSource, Ends], Any] | None = None
    keeps: bool = False
    more: Callable[[TokenizerSource, list[Any] | None], list[Any]] | None = None
    again: bool = False
    typed: bool = False


def _word_piece(source: TokenizerSource, tokens: Mapping[str, str]) -> TokenizerParts:
    strips = source.config.get("strip_accents")
    normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=source.flag("tokenize_chinese_chars", True),
        strip_accents=None if strips is None else source.flag("strip_accents", False),
        lowercase=source.flag("do_lower_case", True),
    )
    model = source.model("WordPiece", unk_token=tokens["unk_token"])
    return TokenizerParts(model, normalizer, pre_tokenizers.BertPreTokenizer())


def _bytes(source: TokenizerSource, tokens: Mapping[str, str], normalizer: Any = None) -> TokenizerParts:
    cut = pre_tokenizers.ByteLevel(add_prefix_space=source.flag("add_prefix_space", False))
    return TokenizerParts(_pairs(source, fuse_unk=False), normalizer, cut)


def _pairs(source: TokenizerSource, **changes: object) -> Any:
    plain = {"unk_token": None, "byte_fallback": False, "ignore_merges": False, "dropout": None}
    return source.model("BPE", **plain | changes)


def _pieces(source: TokenizerSource, tokens: Mapping[str, str], unk_id: int | None) -> TokenizerParts:
    if unk_id is None:
        unk_id = source.file.model.token_to_id(tokens["unk_token"]) or 0
    scheme = "always" if source.flag("add_prefix_space", True) else "never"
    cut = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme=scheme)]
    return TokenizerParts(source.unigram(unk_id), source.charsmap(), pre_tokenizers.Sequence(cut))


def _t5(source: TokenizerSource, tokens: Mapping[str, str]) -> TokenizerParts:
    without = source._replace(config={**source.config, "add_prefix_space": True})  # T5 always does
    return _pieces(without, tokens, 2)


def _llama(source: TokenizerSource, tokens: Mapping[str, str]) -> TokenizerParts:
    always = source.config.get("legacy", False)
    scheme = "always" if always else "first"
    if not source.flag("add_prefix_space", True, null=True):
        scheme = "never"
    cut = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme=scheme, split=False)
    return TokenizerParts(_pairs(source, fuse_unk=True, byte_fallback=True), None, cut)


def _gemma(source: TokenizerSource, tokens: Mapping[str, str]) -> TokenizerParts:
    model = _pairs(source, fuse_unk=True, byte_fallback=True, unk_token=tokens["unk_token"])
    cut = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    return TokenizerParts(model, normalizers.Replace(" ", METASPACE), cut)


def _qwen2(source: TokenizerSource, tokens: Mapping[str, str]) -> TokenizerParts:
    spaced = source.flag("add_prefix_space", False, null=False)
    words = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated", invert=False)
    cut = [words, pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)]
    return TokenizerParts(_pairs(source, fuse_unk=False), normalizers.NFC(), pre_tokenizers.Sequence(cut))


def _template(source: TokenizerSource, ends: Ends, *, again: bool = False, second: int = 0) -> Any:
    """`ends` around a text. Of a pair, the last one ends the first text, and the second one too; `again`: it stands
    before the second one once more. `second` is the token type of what belongs to that."""
    *head, tail = [text for text, _ in ends]
    single = [*head, "$A", tail]
    pair = [*single, *[tail] * again, f"$B:{second}", f"{tail}:{second}"]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(dict.fromkeys(ends)))


def _roberta(source: TokenizerSource, ends: Ends) -> Any:
    head, tail = ends
    spaced = source.flag("add_prefix_space", False)
    return processors.RobertaProcessing(tail, head, source.flag("trim_offsets", True), spaced)


def _t5_extra(source: TokenizerSource, given: list[Any] | None) -> list[Any]:
    count = source.config.get("extra_ids", EXTRA_IDS)
    if type(count) is not int or not 0 <= count <= EXTRA_IDS_MAX:
        raise source.refuse("tokenizer_config.json has 'extra_ids' that is no number of tokens")
    own = [f"<extra_id_{at}>" for at in range(count)]
    theirs = [one for one in given or [] if "<extra_id_" in str(one)]
    if theirs and count and count != len(theirs):
        raise source.refuse(f"tokenizer_config.json has 'extra_ids' = {count}, and {len(theirs)} such tokens")
    return [*(given or []), *([] if theirs else own)]


def _camembert_extra(source: TokenizerSource, given: list[Any] | None) -> list[Any]:
    return ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"] if given is None else given


BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
XLM_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
MASK_TOKEN = AddedToken("<mask>", lstrip=True, rstrip=False)
GPT_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")

_BERT_CLASS = TokenizerClass(
    _word_piece, BERT_TOKENS, ("cls_token", "sep_token"), partial(_template, second=1), typed=True
)
_ROBERTA_CLASS = TokenizerClass(_bytes, XLM_TOKENS, ("cls_token", "sep_token"), _roberta)
TOKENIZER_CLASSES: dict[str, TokenizerClass | None] = {
    "BertTokenizer": _BERT_CLASS,
    "DistilBertTokenizer": _BERT_CLASS._replace(typed=False),
    "ElectraTokenizer": _BERT_CLASS,
    "MobileBertTokenizer": _BERT_CLASS,
    "MPNetTokenizer": TokenizerClass(
        _word_piece,
        {name: AddedToken(token) for name, token in (XLM_TOKENS | {"unk_token": "[UNK]"}).items()}
        | {"mask_token": MASK_TOKEN},
        ("cls_token", "sep_token"),
        lambda source, ends: processors.RobertaProcessing(ends[1], ends[0], True, False),
    ),
    "RobertaTokenizer": _ROBERTA_CLASS,
    "LongformerTokenizer": _ROBERTA_CLASS,
    "BartTokenizer": _ROBERTA_CLASS,
    "XLMRobertaTokenizer": TokenizerClass(
        partial(_pieces, unk_id=3), XLM_TOKENS, ("bos_token", "eos_token"), partial(_template, again=True)
    ),
    "CamembertTokenizer": TokenizerClass(
        partial(_pieces, unk_id=None),
        XLM_TOKENS | {"mask_token": AddedToken("<mask>", lstrip=True, special=True)},
        ("bos_token", "eos_token"),
        partial(_template, again=True),
        more=_camembert_extra,
    ),
    "T5Tokenizer": TokenizerClass(
        _t5,
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        ("eos_token",),
        _template,
        more=_t5_extra,
    ),
    "LlamaTokenizer": TokenizerClass(
        _llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, keeps=True
    ),
    "GPT2Tokenizer": TokenizerClass(_bytes, GPT_TOKENS, keeps=True),
    "GPTNeoXTokenizer": TokenizerClass(
        partial(_bytes, normalizer=normalizers.NFC()), GPT_TOKENS | {"pad_token": "<|padding|>"}
    ),
    "GemmaTokenizer": TokenizerClass(
        _gemma,
        {name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        | {"mask_token": "<mask>"},
        keeps=True,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        _qwen2, dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"), keeps=True, again=True
    ),
    **dict.fromkeys(("PreTrainedTokenizer", "TokenizersBackend"), None),
}
"""By name, which may end in "Fast"; None is tokenizer.json as it is, with more tokens."""

CLASS_OF_TYPE = {
    **dict.fromkeys(("bert", "distilbert", "nomic_bert", "electra", "ernie", "megatron-bert"), "BertTokenizer"),
    **dict.fromkeys(("roberta", "longformer", "bart", "data2vec-text"), "RobertaTokenizer"),
    **dict.fromkeys(("xlm-roberta", "gte", "jina_embeddings_v3"), "XLMRobertaTokenizer"),
    **dict.fromkeys(("t5", "mt5", "switch_transformers"), "T5Tokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj"), "GPT2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"),
    **dict.fromkeys(("new", "llama"), "TokenizersBackend"),
    "camembert": "CamembertTokenizer",
    "mpnet": "MPNetTokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
}
"""For architectures whose folder names no class."""

FORCED_CLASS_OF_TYPE = {
    **dict.fromkeys(("modernbert", "mistral", "umt5", "xlm-roberta-xl", "nystromformer"), "TokenizersBackend"),
    "qwen2": "Qwen2Tokenizer",
}
"""For architectures whose folders often name a wrong class."""


def find_class(model_type: str, named: object, *, byte_level: bool, refuse: Refuse) -> TokenizerClass | None:
    """The class of a folder, None for tokenizer.json as it is. `byte_level`: tokenizer.json has the word ByteLevel."""
    if named is not None and not isinstance(named, str):
        raise refuse(f"tokenizer_config.json has 'tokenizer_class' = {named!r}"[:120])
    given = (named or "").removesuffix("Fast")
    if given == "LlamaTokenizer" and byte_level and model_type not in FORCED_CLASS_OF_TYPE:
        return None
    name = FORCED_CLASS_OF_TYPE.get(model_type) or given or CLASS_OF_TYPE.get(model_type)
    if name is None:
        raise refuse(f"its model type is {model_type!r} and tokenizer_config.json has no 'tokenizer_class' {AS_IT_IS}")
    if name not in TOKENIZER_CLASSES:
        raise refuse(f"tokenizer_config.json has 'tokenizer_class' = {named!r} {AS_IT_IS}")
    return TOKENIZER_CLASSES[name]
