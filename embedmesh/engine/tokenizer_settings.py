"""A folder's tokenizer as `transformers` makes it: tokenizer.json, and what other files say beside it.

`transformers` takes the vocabulary of tokenizer.json, and of most kinds nothing else: normalizer, cuts and special
tokens are those of the class that `tokenizer_class` names (`tokenizer_kinds.py`), by the settings of
tokenizer_config.json and special_tokens_map.json. So does this module, or it refuses by name what it does not know.
Code of a folder is never run.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from embedmesh.engine.folder import Folder
from embedmesh.engine.jsonfile import Members, read_object, refused
from embedmesh.engine.tokenizer_kinds import Kind, find_kind
from embedmesh.engine.tokenizer_source import Saved, Source
from embedmesh.rules.errors import SetupError

CONFIG = "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
FILE = "tokenizer.json"
OTHER_FILES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, ADDITIONAL, DECODER = "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"
SPECIFIC = "model_specific_special_tokens"
UNKNOWN = "\ua66e" * 300  # a letter that few vocabularies have, and a word too long for any
REFUSED = (
    "auto_map",  # code of the folder's own
    "add_special_tokens",  # `transformers` cannot load such a folder
    "split_special_tokens",
    "fast_tokenizer_files",  # another file than tokenizer.json, by version
    "fix_mistral_regex",
    "init_inputs",
    "tokenizer_object",
    "gguf_file",
    "post_processor",
    SPECIFIC,
    "unk_id",
    "vocab",
    "merges",
)
"""Members that change tokens, or may, and are not understood. False, null and empty ones say nothing."""

Token = str | AddedToken


class _Added(msgspec.Struct):
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def token(self) -> AddedToken:
        given = msgspec.structs.asdict(self)
        return AddedToken(**{name: value for name, value in given.items() if value is not None})


class _Tokens(msgspec.Struct):
    """The tokens that are added: by id, named, and more; `optional` are texts that only the class knows of."""

    added: dict[int, AddedToken]
    named: dict[str, Token]
    extra: list[Token]
    optional: set[str]


def load_tokenizer(folder: Folder) -> Tokenizer:
    """The tokenizer that `transformers` would make of the folder. Raises SetupError, in one line.

    A static model's is tokenizer.json alone: those who make such models read nothing else.
    """
    content, file = _read(folder)
    if folder.source == "static":
        return file
    refuse = partial(refused, folder.path)
    source = Source(_read_config(folder), file, _decode(content, folder), refuse)
    named = source.config.get("tokenizer_class") or folder.config.get("tokenizer_class")
    kind = find_kind(folder.model_type, named, byte_level=b'"ByteLevel"' in content, refuse=refuse)
    tokens = _find_tokens(folder, source, kind)
    tokenizer = _add_to_file(folder, source, tokens) if kind is None else _make(folder, source, kind, tokens)
    _check_encodes(source, tokenizer)
    return tokenizer


def _add_to_file(folder: Folder, source: Source, tokens: _Tokens) -> Tokenizer:
    file = source.file
    if file.padding is not None:
        tokens.named.setdefault("pad_token", file.padding["pad_token"])
    _add(file, tokens, folder.vocab_size)
    _check_flags(source, file, tokens.named)
    return file


def _make(folder: Folder, source: Source, kind: Kind, tokens: _Tokens) -> Tokenizer:
    parts = kind.build(source, {name: str(token) for name, token in tokens.named.items()})
    tokenizer = Tokenizer(parts.model)
    tokenizer.pre_tokenizer = parts.pre_tokenizer
    if parts.normalizer is not None:
        tokenizer.normalizer = parts.normalizer
    _add(tokenizer, tokens, folder.vocab_size)
    if kind.again:
        tokenizer.add_tokens([AddedToken(str(one), special=True) for one in [*tokens.named.values(), *tokens.extra]])
    if kind.around is not None:
        tokenizer.post_processor = kind.around(source, [_end(source, tokenizer, name, tokens) for name in kind.ends])
    elif kind.keeps:
        if source.file.post_processor is not None:
            tokenizer.post_processor = source.file.post_processor
        _check_flags(source, tokenizer, tokens.named)
    return tokenizer


def _end(source: Source, tokenizer: Tokenizer, name: str, tokens: _Tokens) -> tuple[str, int]:
    text = str(tokens.named[name])
    at = tokenizer.token_to_id(text)
    if at is None:
        raise source.refuse(f"its {name!r} {text!r} is not in its vocabulary")
    return text, at


def _read(folder: Folder) -> tuple[bytes, Tokenizer]:
    file = folder.transformer / FILE
    if not file.is_file():
        other = next((name for name in OTHER_FILES if (folder.transformer / name).is_file()), None)
        raise SetupError(
            f"Model folder {folder.path.name} has no {FILE}. "
            + (f"Convert its {other} with transformers, which saves one." if other else "Fetch the model again.")
        )
    try:
        content = file.read_bytes()
        return content, Tokenizer.from_buffer(content)
    except Exception:  # noqa: BLE001 - the library raises bare Exception
        raise SetupError(f"The {FILE} of {folder.path.name} is broken: fetch the model again.") from None


def _decode(content: bytes, folder: Folder) -> Saved:
    try:
        return msgspec.json.decode(content, type=Saved)
    except msgspec.DecodeError:
        raise SetupError(f"The {FILE} of {folder.path.name} is broken: fetch the model again.") from None


def _read_config(folder: Folder) -> Members:
    """The members of tokenizer_config.json, with those that special_tokens_map.json puts over them."""
    config = read_object(folder.transformer / CONFIG, absent_is_empty=True)
    for name in REFUSED:
        if config.get(name) and not (name == "fast_tokenizer_files" and config[name] == [FILE]):
            raise refused(folder.path, f"{CONFIG} has {name!r}")
    of_model = folder.config.get("auto_map")
    if isinstance(of_model, dict) and of_model.get("AutoTokenizer"):
        raise refused(folder.path, "config.json has 'auto_map' for its tokenizer")
    if ADDITIONAL in config and not config.get(EXTRA):
        config[EXTRA] = config.pop(ADDITIONAL)
    if isinstance(config.get(EXTRA), dict):
        config[SPECIFIC] = config.pop(EXTRA)
    if DECODER in config:  # then `transformers` does not look into the other file
        return config
    for name, value in read_object(folder.transformer / TOKENS_MAP, absent_is_empty=True).items():
        if isinstance(value, dict) and name != EXTRA:
            value = {**value, "special": True, "__type": "AddedToken"}
        elif name == EXTRA and isinstance(value, list) and isinstance(config.get(EXTRA) or [], list):
            kept = list(config.get(EXTRA) or [])
            typed = [
                {**one, "special": True, "__type": "AddedToken"} if isinstance(one, dict) else one for one in value
            ]
            value = kept + [one for one in typed if one not in kept]
        config[name] = value
    if isinstance(config.get(EXTRA), dict):
        config[SPECIFIC] = config.get(SPECIFIC, {}) | config.pop(EXTRA)
    return config


def _find_tokens(folder: Folder, source: Source, kind: Kind | None) -> _Tokens:
    config = source.config
    added = _added_tokens(folder, source)
    named: dict[str, Token] = dict(kind.tokens) if kind is not None else {}
    optional = {str(token) for name, token in named.items() if name not in config}
    specific: dict[str, Any] = {}  # other names, those of `extra_special_tokens` last
    for name, value in config.items():
        if name in NAMED and value is None:
            if kind is not None and name in (*kind.ends, "unk_token"):
                raise source.refuse(f"{CONFIG} has {name!r} = None")
            named.pop(name, None)
        elif name in NAMED:
            named[name] = _token(source, name, value)
        elif name.endswith("_token") and isinstance(value, str | dict):
            specific[name] = value
    named = {name: named[name] for name in NAMED if name in named}
    extra, further = (config[EXTRA] or []) if EXTRA in config else None, config.get(ADDITIONAL)
    listed = further if extra is None else extra
    if not isinstance(listed, list | None):
        raise source.refuse(f"{CONFIG} has {EXTRA!r} that is no list of tokens")
    if kind is not None and kind.more is not None and extra is None:
        listed = kind.more(source, listed)
        optional |= {str(one) for one in listed if one not in (further or [])}
    specific |= config.get(SPECIFIC, {})
    named |= {name: _token(source, name, value) for name, value in specific.items()}
    return _Tokens(added, named, [_token(source, EXTRA, one) for one in listed or []], optional)


def _added_tokens(folder: Folder, source: Source) -> dict[int, AddedToken]:
    """By id: those of `added_tokens_decoder`, else those of tokenizer.json over those of added_tokens.json."""
    config = source.config
    try:
        if DECODER in config:
            listed = msgspec.convert(config[DECODER], dict[str, _Added])
            return {int(at): token.token() for at, token in listed.items()}
        special = {str(_token(source, name, config[name])) for name in NAMED if config.get(name)}
        special |= {one for one in config.get(EXTRA) or [] if isinstance(one, str)}
        legacy = msgspec.convert(read_object(folder.transformer / ADDED, absent_is_empty=True), dict[str, int])
        added = {
            at: AddedToken(text, normalized=text not in special, special=text in special) for text, at in legacy.items()
        }
        return added | {int(one["id"]): msgspec.convert(one, _Added).token() for one in source.saved.added_tokens}
    except (msgspec.ValidationError, ValueError, KeyError, TypeError):
        raise source.refuse(f"{CONFIG} has {DECODER!r} that is no table of tokens by id") from None


def _token(source: Source, name: str, value: object) -> Token:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        try:
            return msgspec.convert(value, _Added).token()
        except msgspec.ValidationError:
            pass
    raise source.refuse(f"{CONFIG} has {name!r} that is no token")


def _add(tokenizer: Tokenizer, tokens: _Tokens, rows: int) -> None:
    """Add what `transformers` adds, in its order, which decides new ids.

    A token that only the class knows of and that would get an id without a row is left out: texts that have it would
    end the model there.
    """
    there = tokenizer.get_added_tokens_decoder()
    wanted: list[Token] = [token for _, token in sorted(tokens.added.items())]
    known = {token.content for token in there.values()} | {str(token) for token in wanted}
    more = {repr(token): token for token in [*tokens.named.values(), *tokens.extra] if str(token) not in known}
    wanted += more.values()
    names = {str(token) for token in tokens.named.values()}
    free = max(tokenizer.get_vocab_size(with_added_tokens=False), *(at + 1 for at in there), 0)
    chosen = []
    for token in wanted:
        if tokenizer.token_to_id(str(token)) is None:
            if free >= rows and str(token) in tokens.optional:
                continue
            free += 1
        one = AddedToken(token, special=True) if isinstance(token, str) else token
        one.special = one.special or one.content in names
        chosen.append(one)
    tokenizer.add_tokens(chosen)


def _check_encodes(source: Source, tokenizer: Tokenizer) -> None:
    """Refuse what would fail only at a text: an unknown letter, or spaces that two tokens want (the library panics)."""
    added = tokenizer.get_added_tokens_decoder().values()
    greedy = [token.content for token in added if token.lstrip and token.content.isspace()]
    if greedy and any(token.rstrip for token in added):
        raise source.refuse(f"its added token {greedy[0]!r} has 'lstrip', and another has 'rstrip'")
    try:
        tokenizer.encode(UNKNOWN, add_special_tokens=False)
    except Exception:  # noqa: BLE001 - the library raises bare Exception
        raise source.refuse("its 'unk_token' is not in its vocabulary") from None


def _check_flags(source: Source, tokenizer: Tokenizer, named: Mapping[str, Token]) -> None:
    """Versions of `transformers` disagree on these two: what they say must be what is done anyway."""
    around: list[int] = tokenizer.encode("", add_special_tokens=True).ids
    for flag, name, at in (("add_bos_token", "bos_token", around[:1]), ("add_eos_token", "eos_token", around[-1:])):
        asked = source.config.get(flag)
        does = name in named and at == [tokenizer.token_to_id(str(named[name]))]
        if isinstance(asked, bool) and asked != does:
            raise source.refuse(f"{CONFIG} has {flag!r} = {asked}, and {FILE} does otherwise")
