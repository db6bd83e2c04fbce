"""The JSON type of a value, in words, for errors."""

from typing import Literal

JsonType = Literal["null", "a boolean", "an integer", "a number", "a string", "an array", "an object"]


def json_type(value: object) -> JsonType:
    """The JSON type of a value, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"
