"""The fields of a request: for each its rule and its documentation, in one table.

The OpenAPI page is generated from `FIELDS`, so it says what is checked. Several fields may mean the same, each in
the words of another API: `Field.says` names the meaning, and such fields must not contradict each other.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast, get_args

from embedmesh.dialects.openai.json_types import json_type
from embedmesh.dialects.openai.spellings import HARMLESS, ROLES, Harmless
from embedmesh.rules.embeddings import Dtype, Encoding, Role, Truncate
from embedmesh.rules.errors import EmptyInput, InvalidType, InvalidValue, TooManyInputs
from embedmesh.rules.limits import REQUEST_INPUTS_MAX, USER_CHARS_MAX

DTYPES: tuple[Dtype, ...] = get_args(Dtype)


def _model(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidType(f"`model` must be a string, not {json_type(value)}.", param="model")
    return value


def _input(value: object) -> str | list[Any]:
    if isinstance(value, str):
        if not value:
            raise EmptyInput("`input` must not be an empty string.", param="input")
        return value
    if not isinstance(value, list):
        raise InvalidType(
            f"`input` must be a string, an array of strings, or token ids, not {json_type(value)}.", param="input"
        )
    if not value:
        raise EmptyInput("`input` must not be an empty array.", param="input")
    match value[0]:
        case bool():
            raise InvalidType("`input.0` must be a string or token ids, not a boolean.", param="input.0")
        case str():
            _check_strings(value)
        case int():
            _check_ids(value, "input.{}")
        case list():
            _check_arrays(value)
        case other:
            raise InvalidType(f"`input.0` must be a string or token ids, not {json_type(other)}.", param="input.0")
    return value


def _check_strings(texts: list[Any]) -> None:
    _check_how_many(texts)
    for index, text in enumerate(texts):
        if type(text) is not str:
            raise _mixed(index, text, "a string")
        if not text:
            raise EmptyInput(f"`input.{index}` must not be an empty string.", param=f"input.{index}")


def _check_arrays(arrays: list[Any]) -> None:
    _check_how_many(arrays)
    for index, ids in enumerate(arrays):
        if type(ids) is not list:
            raise _mixed(index, ids, "an array of token ids")
        if not ids:
            raise EmptyInput(f"`input.{index}` must not be an empty array.", param=f"input.{index}")
        _check_ids(ids, f"input.{index}")


def _check_ids(ids: list[Any], name: str) -> None:
    for index, token in enumerate(ids):
        if type(token) is not int:
            raise InvalidType(
                f"`{name.format(index)}`: a token id must be an integer, not {json_type(token)}.",
                param=name.format(index),
            )
        if token < 0:
            raise InvalidValue(f"`{name.format(index)}`: a token id is not negative.", param=name.format(index))


def _check_how_many(inputs: list[Any]) -> None:
    if len(inputs) > REQUEST_INPUTS_MAX:
        raise TooManyInputs(
            f"`input` has {len(inputs):,} entries; one request takes at most {REQUEST_INPUTS_MAX:,}. Split it.",
            param="input",
        )


def _mixed(index: int, value: object, expected: str) -> InvalidType:
    return InvalidType(
        f"`input.{index}` must be {expected} like the entries before it, not {json_type(value)}.",
        param=f"input.{index}",
    )


def _flag(name: str) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        if not isinstance(value, bool):
            raise InvalidType(f"`{name}` must be true or false, not {json_type(value)}.", param=name)
        return value

    return check


def _encoding_format(value: object) -> Encoding:
    return cast(Encoding, _one_of("encoding_format", value, ("float", "base64")))


def _output_dtype(value: object) -> Dtype:
    return cast(Dtype, _one_of("output_dtype", value, DTYPES))


def _embedding_type(value: object) -> Dtype | Literal["base64"]:
    alone = value[0] if isinstance(value, list) and len(value) == 1 else value
    return cast(Dtype, _one_of("embedding_type", alone, (*DTYPES, "base64")))


def _whole_number(name: str) -> Callable[[object], int]:
    def check(value: object) -> int:
        if type(value) is not int:
            raise InvalidType(f"`{name}` must be an integer, not {json_type(value)}.", param=name)
        if value < 1:
            raise InvalidValue(f"`{name}` must be at least 1.", param=name)
        return value

    return check


def _user(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidType(f"`user` must be a string, not {json_type(value)}.", param="user")
    if len(value) > USER_CHARS_MAX:
        raise InvalidValue(f"`user` must have at most {USER_CHARS_MAX} characters.", param="user")
    return value


def _role_in(name: str) -> Callable[[object], Role | None]:
    return lambda value: ROLES[_one_of(name, value, tuple(ROLES))]


def _prompt_name(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidType(f"`prompt_name` must be a string, not {json_type(value)}.", param="prompt_name")
    return value


def _truncate(value: object) -> Truncate:
    if isinstance(value, bool):  # Jina
        return "end" if value else "none"
    return cast(
        Truncate,
        _one_of("truncate", value.lower() if isinstance(value, str) else value, ("none", "end", "start")),
    )


def _truncation(value: object) -> Truncate:
    return "end" if _flag("truncation")(value) else "none"


def _truncate_prompt_tokens(value: object) -> int:
    return -1 if type(value) is int and value == -1 else _whole_number("truncate_prompt_tokens")(value)


def _without_effect(name: str, harmless: Harmless) -> Callable[[object], None]:
    def check(value: object) -> None:
        if not harmless.takes(value):
            raise InvalidValue(f"`{name}` is taken as {harmless.words} only, which changes nothing.", param=name)

    return check


class Field(NamedTuple):
    """One field of the request: how it is checked, how the OpenAPI page describes it, and what it is about.

    Members that say the same must agree; one that `says` nothing is ignored, and named in a header.
    """

    check: Callable[[object], Any]
    schema: dict[str, Any]
    says: str | None


FIELDS: dict[str, Field] = {
    "model": Field(
        _model,
        {
            "type": "string",
            "description": "A served model, an alias of it, or either with a precision suffix such as `:exact`.",
            "examples": ["sentence-transformers/all-MiniLM-L6-v2"],
        },
        "model",
    ),
    "input": Field(
        _input,
        {
            "description": "A text, an array of texts, an array of token ids, or an array of such arrays.",
            "oneOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": REQUEST_INPUTS_MAX,
                    "items": {"type": "string", "minLength": 1},
                },
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": REQUEST_INPUTS_MAX,
                    "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                },
            ],
            "examples": ["The quick brown fox jumped over the lazy dog"],
        },
        "input",
    ),
    "encoding_format": Field(
        _encoding_format,
        {
            "type": ["string", "null"],
            "enum": ["float", "base64", None],
            "default": "float",
            "description": "`base64` is little-endian float32 in the padded standard alphabet.",
        },
        "encoding_format",
    ),
    "dimensions": Field(
        _whole_number("dimensions"),
        {
            "type": ["integer", "null"],
            "minimum": 1,
            "description": "Keep the first n components, scaled back to unit length.",
        },
        "dimensions",
    ),
    "user": Field(
        _user,
        {
            "type": ["string", "null"],
            "maxLength": USER_CHARS_MAX,
            "description": "Your own id of the person behind the call; only a keyed hash of it is kept.",
        },
        "user",
    ),
    "input_type": Field(
        _role_in("input_type"),
        {
            "type": ["string", "null"],
            "enum": [*ROLES, None],
            "description": "The role of the texts; chooses the model's own prompt, if it has one.",
        },
        "role",
    ),
    "truncate": Field(
        _truncate,
        {
            "type": ["string", "boolean", "null"],
            "pattern": "^([nN][oO][nN][eE]|[eE][nN][dD]|[sS][tT][aA][rR][tT])$",
            "default": "none",
            "description": "What to cut from an input that is longer than the model takes: `none` refuses it, which "
            "`false` means, too; `true` means `end`.",
        },
        "truncate",
    ),
    "truncation": Field(
        _truncation,
        {"type": ["boolean", "null"], "description": "`true` means `truncate: end`, `false` means `truncate: none`."},
        "truncate",
    ),
    "truncate_prompt_tokens": Field(
        _truncate_prompt_tokens,
        {
            "type": ["integer", "null"],
            "anyOf": [{"minimum": 1}, {"const": -1}, {"type": "null"}],
            "description": "Cut each input to this many tokens, special tokens included; at its end unless `truncate` "
            "is `start`; -1 means `truncate: end`.",
        },
        "keep",
    ),
    "output_dimension": Field(
        _whole_number("output_dimension"),
        {"type": ["integer", "null"], "minimum": 1, "description": "The same as `dimensions`."},
        "dimensions",
    ),
    "output_dtype": Field(
        _output_dtype,
        {
            "type": ["string", "null"],
            "enum": [*DTYPES, None],
            "default": "float",
            "description": "What a component is, after rounding: docs/reference/dialects.md has the formulas.",
        },
        "dtype",
    ),
    "embedding_type": Field(
        _embedding_type,
        {
            "anyOf": [
                {"enum": [*DTYPES, "base64", None]},
                {"type": "array", "items": {"enum": [*DTYPES, "base64"]}, "minItems": 1, "maxItems": 1},
            ],
            "description": "The same as `output_dtype`; `base64` is float32 as `encoding_format` has it.",
        },
        "embedding_type",
    ),
    "task": Field(
        _role_in("task"),
        {"type": ["string", "null"], "enum": [*ROLES, None], "description": "The same as `input_type`."},
        "role",
    ),
    "prompt_name": Field(
        _prompt_name,
        {
            "type": ["string", "null"],
            "enum": ["query", "document", None],
            "description": "One of the model's prompts by its name. Refused where the model has none of that name.",
        },
        "prompt",
    ),
    "normalize": Field(
        _flag("normalize"),
        {
            "type": ["boolean", "null"],
            "description": "`true`: vectors of unit length. `false` is refused where the model itself gives them so.",
        },
        "normalize",
    ),
    "normalized": Field(
        _flag("normalized"),
        {"type": ["boolean", "null"], "description": "The same as `normalize`."},
        "normalize",
    ),
    **{
        name: Field(
            _without_effect(name, harmless),
            harmless.schema | {"description": "Changes nothing: it is named in `x-embedmesh-ignored`."},
            None,
        )
        for name, harmless in HARMLESS.items()
    },
}


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise InvalidType(f"`{name}` must be a string, not {json_type(value)}.", param=name)
    if value not in accepted:
        raise InvalidValue(f"`{name}` must be one of {', '.join(accepted)}.", param=name)
    return value
