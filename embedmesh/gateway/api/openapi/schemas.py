"""Schemas of the types in the rows. msgspec makes all but some requests, which are tables, and the error envelope."""

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from embedmesh.dialects.openai.fields import FIELDS
from embedmesh.dialects.openai.members import request_schemas
from embedmesh.http.failures import TABLE
from embedmesh.rules import membership

Json = dict[str, Any]

REF = "#/components/schemas/"
LISTED = re.compile("Reply(List|Page)_(.+)_")  # of a generic struct, as msgspec names it


def ref(name: str) -> Json:
    """A reference to a schema by its name."""
    return {"$ref": REF + name}


def schemas_of(types: Sequence[Any]) -> tuple[list[Json], Json]:
    """A schema for each of the types, and the components that they refer to, by name."""
    made = msgspec.json.schema_components([*types, membership.Statement], ref_template=REF + "{name}")
    text = re.sub(f'"{REF}([^"]+)"', lambda found: f'"{REF}{_name(found[1])}"', json.dumps(made))
    references, components = json.loads(text)
    components = {_name(name): _described(schema) for name, schema in components.items()}
    statement = {"contentMediaType": "application/json", "contentSchema": references.pop()}
    components["Registration"]["properties"]["statement"] |= statement
    return references, components | request_schemas() | {"EmbeddingRequest": _embedding_request(), "Error": _error()}


def _name(name: str) -> str:
    """A struct's name in the document: `KeyReply` is `Key`, `ReplyPage[KeyReply]` is `KeyPage`."""
    if listed := LISTED.fullmatch(name):
        return _name(listed[2]) + listed[1]
    return name if hasattr(membership, name) else name.removesuffix("Reply")


def _described(schema: Json) -> Json:
    del schema["title"]  # the name of the struct
    if "description" in schema:
        schema["description"] = inspect.cleandoc(schema["description"])
    return schema


def _embedding_request() -> Json:
    return {
        "type": "object",
        "required": ["model", "input"],
        "additionalProperties": False,
        "properties": {name: member.schema for name, member in FIELDS.items()},
    }


def _error() -> Json:
    """The envelope of all failures."""
    fields = {
        "message": {"type": "string", "description": "What is wrong, where, and what to do."},
        "type": {"enum": unique(kind for _, kind in TABLE.values())},
        "param": {"type": ["string", "null"], "description": "The field at fault, like `input.3`."},
        "code": {"enum": unique(failure.code for failure in TABLE)},
    }
    return _closed({"error": _closed(fields)})


def _closed(properties: Json) -> Json:
    """An object with exactly these fields."""
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def unique(values: Iterable[str]) -> list[str]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))
