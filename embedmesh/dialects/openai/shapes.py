"""Shapes of JSON values: how each is checked, and how the OpenAPI document describes it.

Requests to generate are tables of shapes. A check gives back what was validated, of which the node's request is written
anew; it raises a CallerFailure that names the member, like `messages.3.content`.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import orjson

from embedmesh.dialects.openai.json_types import json_type
from embedmesh.dialects.openai.values import DEPTH_MAX, check_depth
from embedmesh.rules.errors import (
    CallerFailure,
    InvalidType,
    InvalidValue,
    MissingParameter,
    UnknownParameter,
)
from embedmesh.rules.models import Model

Schema = dict[str, Any]
SHOWN_CHARS_MAX = 64  # of an unknown member's name, in the error
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# more than is held for would be made: other words for the output limit, and how often it is reached
_OUTPUT = "best_of beam_width ignore_eos max_completion_tokens max_length max_new_tokens max_tokens min_length"
_MORE_OUTPUT = "min_new_tokens min_tokens n_cmpl n_predict n_probs num_predict num_return_sequences options"
_LARGE_OUTPUT = "prompt_logprobs use_beam_search"
# other images than are paid for
_IMAGES = "batch_size height num_images num_images_per_prompt width"
# more input than is counted: a template of the caller's own may repeat it without end
_INPUT = "chat_template documents input_embeds input_ids mm_processor_kwargs prompt_embeds prompt_token_ids template"
# a place in the node's queue before that of others
_QUEUE = "priority"
# the node would call an address, load a file or run code that the caller names
_REACH = "bootstrap_host bootstrap_port bootstrap_room custom_logit_processor kv_transfer_params logits_processors"
_MORE_REACH = "lora_path session_params"
# what the gateway itself decides
_OURS = "model request_id rid stream stream_options"
NEVER_PASSED = frozenset(
    f"{_OUTPUT} {_MORE_OUTPUT} {_LARGE_OUTPUT} {_IMAGES} {_INPUT} {_QUEUE} {_REACH} {_MORE_REACH} {_OURS}".split()
)
"""Members that no operator's `pass_unknown` sends on."""


class Reading(msgspec.Struct):
    """What is gathered while one request is checked: the strings that reach the template, and its images."""

    model: Model
    texts: list[str] = []
    images: int = 0

    def unknown(self, name: str, path: str, value: object, known: Sequence[str]) -> object:
        """A member that has no shape: as it is, where the model's entry allows it. Else raises UnknownParameter."""
        if self.model.pass_unknown and name not in NEVER_PASSED and PLAIN_NAME.fullmatch(name):
            check_depth(value, _levels_below(path))
            self.texts.append(compact(value))
            return value
        shown = path[: len(path) - len(name)] + name[:SHOWN_CHARS_MAX]
        near = difflib.get_close_matches(name[:SHOWN_CHARS_MAX], known, 1)
        hint = f"Did you mean `{near[0]}`?" if near else "Leave it out."
        raise UnknownParameter(f"Unknown parameter: `{shown}`. {hint}", param=shown or None)


class Shape(NamedTuple):
    """A kind of value. `check` gets the value, its path and the Reading; `sent`: whether the node gets it."""

    check: Callable[[Any, str, Reading], Any]
    schema: Schema
    sent: bool = True


def _levels_below(path: str) -> int:
    """How deep a value may be that stands there in a body."""
    return DEPTH_MAX - path.count(".") - 1


def compact(value: object) -> str:
    """As JSON without spaces, as a template may write it."""
    return orjson.dumps(value).decode()


def wrong_type(path: str, wanted: str, value: object) -> InvalidType:
    """The failure for a value of another JSON type."""
    return InvalidType(f"`{path}` must be {wanted}, not {json_type(value)}.", param=path)


# -- single values -----------------------------------------------------------------------------------------------------


def flag() -> Shape:
    """True or false."""

    def check(value: object, path: str, reading: Reading) -> bool:
        if not isinstance(value, bool):
            raise wrong_type(path, "true or false", value)
        return value

    return Shape(check, {"type": "boolean"})


def number(low: float, high: float) -> Shape:
    """Any number from `low` to `high`."""

    def check(value: object, path: str, reading: Reading) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise wrong_type(path, "a number", value)
        if not low <= value <= high:
            raise InvalidValue(f"`{path}` must be from {low} to {high}.", param=path)
        return value

    return Shape(check, {"type": "number", "minimum": low, "maximum": high})


def whole(low: int, high: int) -> Shape:
    """A whole number from `low` to `high`, written without a fraction."""

    def check(value: object, path: str, reading: Reading) -> int:
        if type(value) is not int:
            raise wrong_type(path, "an integer", value)
        if not low <= value <= high:
            raise InvalidValue(f"`{path}` must be from {low} to {high}.", param=path)
        return value

    return Shape(check, {"type": "integer", "minimum": low, "maximum": high})


def string(
    *,
    chars_min: int = 0,
    chars_max: int | None = None,
    pattern: str | None = None,
    text: bool = False,
    empty: type[CallerFailure] = InvalidValue,
) -> Shape:
    """A string; with `text`, one that reaches the model's template."""
    matches = re.compile(pattern).fullmatch if pattern is not None else None

    def check(value: object, path: str, reading: Reading) -> str:
        if type(value) is not str:
            raise wrong_type(path, "a string", value)
        if len(value) < chars_min:
            raise empty(f"`{path}` must not be an empty string.", param=path)
        if chars_max is not None and len(value) > chars_max:
            raise InvalidValue(f"`{path}` must have at most {chars_max:,} characters.", param=path)
        if matches is not None and matches(value) is None:
            raise InvalidValue(f"`{path}` must match {pattern}.", param=path)
        if text:
            reading.texts.append(value)
        return value

    bounds = {"minLength": chars_min or None, "maxLength": chars_max, "pattern": pattern and f"^{pattern}$"}
    return Shape(check, {"type": "string"} | {name: bound for name, bound in bounds.items() if bound is not None})


def one_of(*words: str) -> Shape:
    """One of these strings."""

    def check(value: object, path: str, reading: Reading) -> str:
        if type(value) is not str:
            raise wrong_type(path, "a string", value)
        if value not in words:
            raise InvalidValue(f"`{path}` must be {'one of ' if words[1:] else ''}{', '.join(words)}.", param=path)
        return value

    return Shape(check, {"type": "string", "enum": list(words)})


def only(accepted: object, why: str) -> Shape:
    """A value that changes nothing. Any other is refused, because of `why`."""

    def check(value: object, path: str, reading: Reading) -> object:
        if type(value) is not type(accepted) or value != accepted:
            raise InvalidValue(f"`{path}` is taken as {compact(accepted)} only: {why}", param=path)
        return value

    return Shape(check, {"const": accepted})


def never(why: str) -> Shape:
    """Nothing but null."""

    def check(value: object, path: str, reading: Reading) -> object:
        raise InvalidValue(f"`{path}` is not taken: {why}", param=path)

    return Shape(check, {"type": "null"}, sent=False)


def dropped(shape: Shape) -> Shape:
    """Checked, and not sent to the node."""
    return shape._replace(sent=False)


# -- arrays and objects ------------------------------------------------------------------------------------------------


def array_of(shape: Shape, most: int, *, least: int = 1, empty: type[CallerFailure] = InvalidValue) -> Shape:
    """From `least` to `most` values of one shape."""

    def check(value: object, path: str, reading: Reading) -> list[Any]:
        if not isinstance(value, list):
            raise wrong_type(path, "an array", value)
        if len(value) < least:
            raise empty(f"`{path}` must not be an empty array.", param=path)
        if len(value) > most:
            raise InvalidValue(f"`{path}` has {len(value):,} entries; at most {most:,} are taken.", param=path)
        return [shape.check(each, f"{path}.{index}", reading) for index, each in enumerate(value)]

    bounds = {"minItems": least} if least else {}
    return Shape(check, {"type": "array", "items": shape.schema, "maxItems": most} | bounds)


def any_object(entries_max: int, values: Shape | None = None, names: str = ".*") -> Shape:
    """An object with any members, or with values of one shape under names that match."""
    matches = re.compile(names, re.DOTALL).fullmatch

    def check(value: object, path: str, reading: Reading) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        if len(value) > entries_max:
            raise InvalidValue(f"`{path}` has {len(value):,} members; at most {entries_max:,} are taken.", param=path)
        if values is None:
            check_depth(value, _levels_below(path))
            return value
        for name, each in value.items():
            if matches(name) is None:
                raise InvalidValue(f"The names in `{path}` must match {names}.", param=path)
            values.check(each, f"{path}.{name[:SHOWN_CHARS_MAX]}", reading)
        return value

    schema: Schema = {"type": "object", "maxProperties": entries_max}
    if values is not None:
        schema |= {"propertyNames": {"pattern": f"^{names}$"}, "additionalProperties": values.schema}
    return Shape(check, schema)


def object_of(members: Mapping[str, Shape], required: Sequence[str] = (), *, text: bool = False) -> Shape:
    """An object with these members, null as good as absent; with `text`, all of it reaches the model's template."""
    known = list(members)

    def check(value: object, path: str, reading: Reading) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        sent = {}
        for name, each in value.items():
            if each is None:
                continue
            inner = f"{path}.{name}"
            shape = members.get(name)
            if shape is None:
                sent[name] = reading.unknown(name, inner, each, known)
                continue
            checked = shape.check(each, inner, reading)
            if shape.sent:
                sent[name] = checked
        for name in required:
            if value.get(name) is None:
                raise MissingParameter(f"`{path}` must have the member `{name}`.", param=f"{path}.{name}")
        if text:
            reading.texts.append(compact(sent))
        return sent

    return Shape(check, object_schema({name: shape.schema for name, shape in members.items()}, required))


def by_member(tag: str, shapes: Mapping[str, Shape]) -> Shape:
    """An object of one of several shapes; its member `tag` says of which."""
    taken = {word: shape for word, shape in shapes.items() if shape.schema.get("type") != "null"}
    says = one_of(*taken)

    def check(value: object, path: str, reading: Reading) -> Any:
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        word = value.get(tag)
        if word is None:
            raise MissingParameter(f"`{path}` must have the member `{tag}`.", param=f"{path}.{tag}")
        if type(word) is not str or word not in shapes:
            says.check(word, f"{path}.{tag}", reading)  # refuses it
        return shapes[word].check(value, path, reading)

    return Shape(check, {"oneOf": [shape.schema for shape in taken.values()]})


def string_or(text: Shape, other: Shape, words: str) -> Shape:
    """A string of one shape, or a value of another; `words` say what."""

    def check(value: object, path: str, reading: Reading) -> Any:
        if type(value) is str:
            return text.check(value, path, reading)
        if not isinstance(value, list | dict):
            raise wrong_type(path, words, value)
        return other.check(value, path, reading)

    return Shape(check, {"anyOf": [text.schema, other.schema]})


# -- schemas -----------------------------------------------------------------------------------------------------------


def object_schema(members: Mapping[str, Schema], required: Sequence[str]) -> Schema:
    """The schema of an object with these members; those that are not required may be null."""
    properties = {name: schema if name in required else nullable(schema) for name, schema in members.items()}
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": list(required)} if required else {})


def nullable(schema: Schema) -> Schema:
    """The same, or null."""
    kind = schema.get("type")
    if kind == "null":
        return schema
    if "enum" in schema:
        return schema | {"type": [kind, "null"], "enum": [*schema["enum"], None]}
    if isinstance(kind, str):
        return schema | {"type": [kind, "null"]}
    if "const" in schema:
        others = {name: value for name, value in schema.items() if name != "const"}
        return others | {"enum": [schema["const"], None]}
    several = "anyOf" if "anyOf" in schema else "oneOf"
    return schema | {several: [*schema[several], {"type": "null"}]}
