"""What schemas are made of."""

from collections.abc import Iterable
from typing import Any

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


def or_null(schema: Json) -> Json:
    """The same, or null."""
    return schema | {"type": [schema["type"], "null"]}


def unique(values: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(values))
