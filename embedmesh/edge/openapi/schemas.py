"""The shapes of what is sent and answered."""

from collections.abc import Iterable
from typing import Any

from embedmesh.edge.failures import TABLE
from embedmesh.flow.members import MEMBERS
from embedmesh.rules.embeddings import INPUTS_MAX
from embedmesh.rules.models import TIERS

Json = dict[str, Any]


def ref(schema: str) -> Json:
    """A reference to one of `schemas`."""
    return {"$ref": f"#/components/schemas/{schema}"}


def _object(properties: Json, **more: Any) -> Json:
    """An object whose members are always all there."""
    return {"type": "object", "required": list(properties), "properties": properties, **more}


def schemas() -> Json:
    """All of them, by name."""
    count = {"type": "integer", "minimum": 0}
    text = {"type": "string"}
    return {
        "EmbeddingRequest": {
            "type": "object",
            "required": ["model", "input"],
            "additionalProperties": False,
            "properties": {name: member.schema for name, member in MEMBERS.items()},
        },
        "EmbeddingList": _object(
            {
                "object": {"const": "list"},
                "data": {"type": "array", "minItems": 1, "maxItems": INPUTS_MAX, "items": ref("Embedding")},
                "model": {"type": "string", "description": "As the request named it."},
                "usage": _object(
                    {"prompt_tokens": count, "total_tokens": count},
                    description="Tokens really embedded, special tokens included.",
                ),
            }
        ),
        "Embedding": _object(
            {
                "object": {"const": "embedding"},
                "index": {**count, "description": "The position of the input."},
                "embedding": {
                    "oneOf": [
                        {"type": "array", "minItems": 1, "items": {"type": "number"}},
                        {"type": "string", "contentEncoding": "base64"},
                    ],
                    "description": "Numbers, or base64 of little-endian float32, as `encoding_format` asked.",
                },
            }
        ),
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}),
        "Model": _object(
            {
                "id": text,
                "object": {"const": "model"},
                "created": {**count, "description": "Unix time in seconds; 0 where it is not known."},
                "owned_by": text,
                "aliases": {"type": "array", "items": text, "description": "Other names that requests may use."},
                "tier": {"enum": list(TIERS), "description": "The precision of the arithmetic."},
                "width": {"type": "integer", "minimum": 1, "description": "Components of a vector."},
                "max_tokens": {
                    "type": "integer",
                    "minimum": 1,
                    "description": "Of one input, special tokens included.",
                },
                "price_nanousd_per_million_tokens": {**count, "description": "Nano-USD (1e-9 USD) a million tokens."},
                "nodes": {**count, "description": "Live nodes that serve it."},
            }
        ),
        "Health": _object({"message": {"const": "ok"}}),
        "Readiness": _object(
            {
                "ready": {"type": "boolean"},
                "reasons": {"type": "array", "items": text, "description": "Why it is not; empty when it is."},
            }
        ),
        "Error": _object(
            {
                "error": _object(
                    {
                        "message": {"type": "string", "description": "What is wrong, where, and what to do."},
                        "type": {"enum": unique(kind for _, kind in TABLE.values())},
                        "param": {"type": ["string", "null"], "description": "The member at fault, like `input.3`."},
                        "code": {"enum": unique(failure.code for failure in TABLE)},
                    },
                    additionalProperties=False,
                )
            },
            additionalProperties=False,
        ),
    }


def unique(values: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(values))
