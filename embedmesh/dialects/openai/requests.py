"""Reads a request to generate: a JSON body in, what it says and what its node gets out. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import orjson

from embedmesh.dialects.openai.broken import broken_json
from embedmesh.dialects.openai.modalities import unsupported_modality
from embedmesh.dialects.openai.shapes import Reading, Schema, Shape, object_schema, wrong_type
from embedmesh.dialects.openai.values import GENERATION_BOUNDS, check_values
from embedmesh.rules.errors import InvalidType, InvalidValue, MissingParameter
from embedmesh.rules.generation import Generating
from embedmesh.rules.models import Model


class Member(NamedTuple):
    """One member of a request.

    It `goes` to the node, or stays here and is understood, or nowhere: then it changes nothing, and a header names it.
    """

    shape: Shape
    goes: Literal["node", "here", "nowhere"]
    words: str  # for the OpenAPI document


Members = Mapping[str, Member]


class Read(msgspec.Struct, frozen=True):
    """A request whose members are each valid. `says` has those that are given, `sent` those that the node gets."""

    model: Model
    says: dict[str, Any]
    sent: dict[str, Any]
    texts: tuple[str, ...]
    images: int
    ignored: tuple[str, ...]


def read(
    body: bytes, find: Callable[[str], Model], modality: Generating, members: Members, required: Sequence[str]
) -> Read:
    """The request, each member by its own shape. `find` raises ModelNotFound. Raises a CallerFailure."""
    given = _given(body, members)
    model = _model(given, find, modality)
    reading = Reading(model)
    says: dict[str, Any] = {}
    sent: dict[str, Any] = {}
    ignored = []
    known = list(members)
    for name, value in given.items():
        member = members.get(name)
        if member is None:
            sent[name] = reading.unknown(name, name, value, known)
            continue
        says[name] = checked = member.shape.check(value, name, reading)
        if member.goes == "node":
            sent[name] = checked
        elif member.goes == "nowhere":
            ignored.append(name)
    for name in required:
        if name not in says:
            raise MissingParameter(f"You must give the parameter `{name}`.", param=name)
    return Read(model, says, sent, tuple(reading.texts), reading.images, tuple(ignored))


def _given(body: bytes, members: Members) -> dict[str, Any]:
    """The members that are not null."""
    check_values(body, GENERATION_BOUNDS)
    try:
        loaded = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise broken_json(body, error, members) from None
    if not isinstance(loaded, dict):
        raise InvalidType("The body must be a JSON object.")
    return {name: value for name, value in loaded.items() if value is not None}


def _model(given: dict[str, Any], find: Callable[[str], Model], modality: Generating) -> Model:
    name = given.get("model")
    if name is None:
        raise MissingParameter("You must give the parameter `model`.", param="model")
    if type(name) is not str:
        raise wrong_type("model", "a string", name)
    model = find(name)
    if modality not in model.modalities:
        raise unsupported_modality(model)
    return model


def check_stream(says: dict[str, Any]) -> None:
    """Raise InvalidValue where a request without a stream has options of one."""
    if "stream_options" in says and not says.get("stream"):
        raise InvalidValue("`stream_options` is for streams: send `stream: true`, too.", param="stream_options")


def wants_usage(says: dict[str, Any]) -> bool:
    """Whether the caller of a stream asks for its usage."""
    return bool(says.get("stream_options", {}).get("include_usage"))


def request_schema(members: Members, required: Sequence[str]) -> Schema:
    """What is accepted, for the OpenAPI document."""
    described = {name: member.shape.schema | {"description": member.words} for name, member in members.items()}
    return object_schema(described, required)
