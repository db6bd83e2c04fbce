"""What schemas are made of."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

Json = dict[str, Any]

COUNT: Json = {"type": "integer", "minimum": 0}
TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
NUMBER: Json = {"type": "number"}


def ref(schema: str) -> Json:
    """A reference to a schema by its name."""
    return {"$ref": f"#/components/schemas/{schema}"}


def whole(properties: Json, **more: Any) -> Json:
    """An object whose members are always all there."""
    return {"type": "object", "required": list(properties), "properties": properties, **more}


def list_of(schema: str) -> Json:
    """A list of things, as the API answers one."""
    return whole({"object": {"const": "list"}, "data": {"type": "array", "items": ref(schema)}})


def page_of(schema: str, **more: Json) -> Json:
    """One page of such a list."""
    listed = list_of(schema)["properties"] | {"has_more": FLAG | {"description": "Whether there is another page."}}
    return whole(listed | more)


def of_structs(structs: Sequence[type[msgspec.Struct]]) -> Json:
    """The schemas of what structs decode, by name."""
    _, made = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for schema in made.values():
        del schema["title"]  # the name that it has already
        schema["description"] = inspect.cleandoc(schema["description"])
    return made


def or_null(schema: Json) -> Json:
    """The same, or null."""
    return schema | {"type": [schema["type"], "null"]}


def unique(values: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(values))
