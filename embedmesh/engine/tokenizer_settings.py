"""A folder's tokenizer as `transformers` makes it, from tokenizer.json and the files beside it.

`transformers` takes the vocabulary of tokenizer.json, and for most classes nothing else: normalizer, pre-tokenizer and
special tokens are those of the class that `tokenizer_class` names (`tokenizer_classes.py`), by the settings of
tokenizer_config.json and special_tokens_map.json. So does this module; it refuses unknown settings by name. Code of a
folder is never run.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec
from tokenizers import AddedToken, Tokenizer

from embedmesh.engine.folder import Folder
from embedmesh.engine.jsonfile import Fields, read_object, refused
from embedmesh.engine.layout import SETTINGS_FILE, has_types
from embedmesh.engine.tokenizer_classes import TokenizerClass, find_class
from embedmesh.engine.tokenizer_source import TokenizerJson, TokenizerSource
from embedmesh.rules.errors import SetupError

TOKENS_MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
TOKENIZER_FILE = "tokenizer.json"
OTHER_VOCABULARY_FILES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, ADDITIONAL, DECODER = "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"
SPECIFIC = "model_specific_special_tokens"
UNKNOWN_TEXT = "\ua66e" * 300  # a letter that few vocabularies have, and a word too long for any
REFUSED_SETTINGS = (
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
"""Settings that change tokens, or may, and are not understood. False, null and empty ones do nothing."""

Token = str | AddedToken


class AddedTokenJson(msgspec.Struct):
    """An added token as the files write it."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def token(self) -> AddedToken:
        """The library's own."""
        given = msgspec.structs.asdict(self)
        return AddedToken(**{name: value for name, value in given.items() if value is not None})


class LoadedTokenizer(NamedTuple):
    """A tokenizer, and whether models are given its token types; None where the files do not say."""

    tokenizer: Tokenizer
    typed: bool | None


class AddedTokens(msgspec.Struct):
    """The tokens that are added: by id, named, and more; `optional` are texts that no file but only the class names."""

    added: dict[int, AddedToken]
    named: dict[str, Token]
    extra: list[Token]
    optional: set[str]


def load_tokenizer(folder: Folder) -> LoadedTokenizer:
    """The tokenizer that `transformers` would make of the folder. Raises SetupError, in one line.

    A static model's is tokenizer.json alone: the makers of such models read nothing else.
    """
    content, file, json = _read(folder)
    if folder.source == "static":
        return LoadedTokenizer(file, typed=False)
    refuse = partial(refused, folder.path)
    source = TokenizerSource(_read_config(folder), file, json, refuse)
    named = source.config.get("tokenizer_class") or folder.config.get("tokenizer_class")
    of_class = find_class(folder.model_type, named, byte_level=b'"ByteLevel"' in content, refuse=refuse)
    tokens = _find_tokens(folder, source, of_class)
    tokenizer = _add_to_file(folder, source, tokens) if of_class is None else _make(folder, source, of_class, tokens)
    _check_encodes(source, tokenizer)
    return LoadedTokenizer(tokenizer, _is_typed(folder, source, of_class))


def _is_typed(folder: Folder, source: TokenizerSource, of_class: TokenizerClass | None) -> bool | None:
    """Whether token types reach the model. Without a class, versions of `transformers` disagree, if no file says it."""
    if folder.reranks and source.config.get("truncation_side", "right") != "right":
        raise source.refuse(f"{SETTINGS_FILE} has 'truncation_side' = {source.config['truncation_side']!r}"[:120])
    if not has_types(folder.model_type, folder.config):
        return False
    named = source.config.get("model_input_names")
    if isinstance(named, list):
        return "token_type_ids" in named
    return None if of_class is None else of_class.typed


def _add_to_file(folder: Folder, source: TokenizerSource, tokens: AddedTokens) -> Tokenizer:
    file = source.file
    if file.padding is not None:
        tokens.named.setdefault("pad_token", file.padding["pad_token"])
    _add(file, tokens, folder.vocab_size)
    _check_flags(source, file, tokens.named)
    return file


def _make(folder: Folder, source: TokenizerSource, of_class: TokenizerClass, tokens: AddedTokens) -> Tokenizer:
    parts = of_class.build(source, {name: str(token) for name, token in tokens.named.items()})
    tokenizer = Tokenizer(parts.model)
    tokenizer.pre_tokenizer = parts.pre_tokenizer
    if parts.normalizer is not None:
        tokenizer.normalizer = parts.normalizer
    _add(tokenizer, tokens, folder.vocab_size)
    if of_class.again:
        tokenizer.add_tokens([AddedToken(str(one), special=True) for one in [*tokens.named.values(), *tokens.extra]])
    if of_class.around is not None:
        tokenizer.post_processor = of_class.around(
            source, [_end(source, tokenizer, name, tokens) for name in of_class.ends]
        )
    elif of_class.keeps:
        if source.file.post_processor is not None:
            tokenizer.post_processor = source.file.post_processor
        _check_flags(source, tokenizer, tokens.named)
    return tokenizer


def _end(source: TokenizerSource, tokenizer: Tokenizer, name: str, tokens: AddedTokens) -> tuple[str, int]:
    text = str(tokens.named[name])
    at = tokenizer.token_to_id(text)
    if at is None:
        raise source.refuse(f"its {name!r} {text!r} is not in its vocabulary")
    return text, at


def _read(folder: Folder) -> tuple[bytes, Tokenizer, TokenizerJson]:
    file = folder.transformer / TOKENIZER_FILE
    if not file.is_file():
        other = next((name for name in OTHER_VOCABULARY_FILES if (folder.transformer / name).is_file()), None)
        raise SetupError(
            f"Model folder {folder.path.name} has no {TOKENIZER_FILE}. "
            + (f"Convert its {other} with transformers, which saves one." if other else "Fetch the model again.")
        )
    try:
        content = file.read_bytes()
        return content, Tokenizer.from_buffer(content), msgspec.json.decode(content, type=TokenizerJson)
    except Exception:  # noqa: BLE001 - the library raises bare Exception
        raise SetupError(f"The {TOKENIZER_FILE} of {folder.path.name} is broken: fetch the model again.") from None


def _read_config(folder: Folder) -> Fields:
    """The settings of tokenizer_config.json, overridden by those of special_tokens_map.json."""
    config = read_object(folder.transformer / SETTINGS_FILE, absent_is_empty=True)
    for name in REFUSED_SETTINGS:
        if config.get(name) and not (name == "fast_tokenizer_files" and config[name] == [TOKENIZER_FILE]):
            raise refused(folder.path, f"{SETTINGS_FILE} has {name!r}")
    of_model = folder.config.get("auto_map")
    if isinstance(of_model, dict) and of_model.get("AutoTokenizer"):
        raise refused(folder.path, "config.json has 'auto_map' for its tokenizer")
    if ADDITIONAL in config and not config.get(EXTRA):
        config[EXTRA] = config.pop(ADDITIONAL)
    if isinstance(config.get(EXTRA), dict):
        config[SPECIFIC] = config.pop(EXTRA)
    if DECODER in config:  # then `transformers` does not look into the other file
        return config
    for name, value in read_object(folder.transformer / TOKENS_MAP_FILE, absent_is_empty=True).items():
        if name != EXTRA:
            config[name] = _as_special(value)
        elif isinstance(value, list) and isinstance(config.get(EXTRA) or [], list):
            kept = list(config.get(EXTRA) or [])
            config[EXTRA] = kept + [one for one in map(_as_special, value) if one not in kept]
        else:
            config[EXTRA] = value
    if isinstance(config.get(EXTRA), dict):
        config[SPECIFIC] = config.get(SPECIFIC, {}) | config.pop(EXTRA)
    return config


def _as_special(token: object) -> object:
    return {**token, "special": True, "__type": "AddedToken"} if isinstance(token, dict) else token


def _find_tokens(folder: Folder, source: TokenizerSource, of_class: TokenizerClass | None) -> AddedTokens:
    config = source.config
    added = _added_tokens(folder, source)
    named: dict[str, Token] = dict(of_class.tokens) if of_class is not None else {}
    optional = {str(token) for name, token in named.items() if name not in config}
    specific: dict[str, Any] = {}  # other names, those of `extra_special_tokens` last
    for name, value in config.items():
        if name in TOKEN_NAMES and value is None:
            if of_class is not None and name in (*of_class.ends, "unk_token"):
                raise source.refuse(f"{SETTINGS_FILE} has {name!r} = None")
            named.pop(name, None)
        elif name in TOKEN_NAMES:
            named[name] = _token(source, name, value)
        elif name.endswith("_token") and isinstance(value, str | dict):
            specific[name] = value
    named = {name: named[name] for name in TOKEN_NAMES if name in named}
    extra, further = (config[EXTRA] or []) if EXTRA in config else None, config.get(ADDITIONAL)
    listed = further if extra is None else extra
    if not isinstance(listed, list | None):
        raise source.refuse(f"{SETTINGS_FILE} has {EXTRA!r} that is no list of tokens")
    if of_class is not None and of_class.more is not None and extra is None:
        listed = of_class.more(source, listed)
        optional |= {str(one) for one in listed if one not in (further or [])}
    specific |= config.get(SPECIFIC, {})
    named |= {name: _token(source, name, value) for name, value in specific.items()}
    return AddedTokens(added, named, [_token(source, EXTRA, one) for one in listed or []], optional)


def _added_tokens(folder: Folder, source: TokenizerSource) -> dict[int, AddedToken]:
    """By id: those of `added_tokens_decoder`, else those of tokenizer.json over those of added_tokens.json."""
    config = source.config
    try:
        if DECODER in config:
            listed = msgspec.convert(config[DECODER], dict[str, AddedTokenJson])
            return {int(at): token.token() for at, token in listed.items()}
        special = {str(_token(source, name, config[name])) for name in TOKEN_NAMES if config.get(name)}
        special |= {one for one in config.get(EXTRA) or [] if isinstance(one, str)}
        legacy = msgspec.convert(read_object(folder.transformer / ADDED_FILE, absent_is_empty=True), dict[str, int])
        added = {
            at: AddedToken(text, normalized=text not in special, special=text in special) for text, at in legacy.items()
        }
        return added | {
            int(one["id"]): msgspec.convert(one, AddedTokenJson).token() for one in source.json.added_tokens
        }
    except (msgspec.ValidationError, ValueError, KeyError, TypeError):
        raise source.refuse(f"{SETTINGS_FILE} has {DECODER!r} that is no table of tokens by id") from None


def _token(source: TokenizerSource, name: str, value: object) -> Token:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        try:
            return msgspec.convert(value, AddedTokenJson).token()
        except msgspec.ValidationError:
            pass
    raise source.refuse(f"{SETTINGS_FILE} has {name!r} that is no token")


def _add(tokenizer: Tokenizer, tokens: AddedTokens, rows: int) -> None:
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


def _check_encodes(source: TokenizerSource, tokenizer: Tokenizer) -> None:
    """Refuse what would fail only with a text: an unknown letter, or spaces that two tokens want (a panic)."""
    added = tokenizer.get_added_tokens_decoder().values()
    greedy = [token.content for token in added if token.lstrip and token.content.isspace()]
    if greedy and any(token.rstrip for token in added):
        raise source.refuse(f"its added token {greedy[0]!r} has 'lstrip', and another has 'rstrip'")
    try:
        tokenizer.encode(UNKNOWN_TEXT, add_special_tokens=False)
    except Exception:  # noqa: BLE001 - the library raises bare Exception
        raise source.refuse("its 'unk_token' is not in its vocabulary") from None


def _check_flags(source: TokenizerSource, tokenizer: Tokenizer, named: Mapping[str, Token]) -> None:
    """Versions of `transformers` disagree on these two, so they must agree with tokenizer.json."""
    around: list[int] = tokenizer.encode("", add_special_tokens=True).ids
    for flag, name, at in (("add_bos_token", "bos_token", around[:1]), ("add_eos_token", "eos_token", around[-1:])):
        wanted = source.config.get(flag)
        does = name in named and at == [tokenizer.token_to_id(str(named[name]))]
        if isinstance(wanted, bool) and wanted != does:
            raise source.refuse(f"{SETTINGS_FILE} has {flag!r} = {wanted}, and {TOKENIZER_FILE} does otherwise")
