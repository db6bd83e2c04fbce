"""The shapes of what is sent and answered."""

from embedmesh.dialects.openai.fields import MEMBERS
from embedmesh.gateway.api.openapi.fleet_schemas import fleet_schemas
from embedmesh.gateway.api.openapi.money_schemas import money_schemas
from embedmesh.gateway.api.openapi.shapes import COUNT, TEXT, Json, list_of, ref, unique, whole
from embedmesh.http.failures import TABLE
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.models import TIERS


def schemas() -> Json:
    """All of them, by name."""
    return (
        fleet_schemas()
        | money_schemas()
        | {
            "EmbeddingRequest": {
                "type": "object",
                "required": ["model", "input"],
                "additionalProperties": False,
                "properties": {name: member.schema for name, member in MEMBERS.items()},
            },
            "EmbeddingList": whole(
                {
                    "object": {"const": "list"},
                    "data": {"type": "array", "minItems": 1, "maxItems": REQUEST_INPUTS_MAX, "items": ref("Embedding")},
                    "model": {"type": "string", "description": "As the request named it."},
                    "usage": whole(
                        {"prompt_tokens": COUNT, "total_tokens": COUNT},
                        description="Tokens really embedded, special tokens included.",
                    ),
                }
            ),
            "Embedding": whole(
                {
                    "object": {"const": "embedding"},
                    "index": {**COUNT, "description": "The position of the input."},
                    "embedding": {
                        "oneOf": [
                            {"type": "array", "minItems": 1, "items": {"type": "number"}},
                            {"type": "string", "contentEncoding": "base64"},
                        ],
                        "description": "Numbers, or base64 of little-endian float32, as `encoding_format` asked.",
                    },
                }
            ),
            "ModelList": list_of("Model"),
            "Model": whole(
                {
                    "id": TEXT,
                    "object": {"const": "model"},
                    "created": {**COUNT, "description": "Unix time in seconds; 0 where it is not known."},
                    "owned_by": TEXT,
                    "aliases": {"type": "array", "items": TEXT, "description": "Other names that requests may use."},
                    "tier": {"enum": list(TIERS), "description": "The precision of the arithmetic."},
                    "width": {"type": "integer", "minimum": 1, "description": "Components of a vector."},
                    "max_tokens": {
                        "type": "integer",
                        "minimum": 1,
                        "description": "Of one input, special tokens included.",
                    },
                    "price_nanousd_per_million_tokens": {
                        **COUNT,
                        "description": "Nano-USD (1e-9 USD) a million tokens.",
                    },
                    "nodes": {**COUNT, "description": "Live nodes that serve it."},
                }
            ),
            "Health": whole({"message": {"const": "ok"}}),
            "Readiness": whole(
                {
                    "ready": {"type": "boolean"},
                    "reasons": {"type": "array", "items": TEXT, "description": "Why it is not, or what makes it slow."},
                }
            ),
            "Error": whole(
                {
                    "error": whole(
                        {
                            "message": {"type": "string", "description": "What is wrong, where, and what to do."},
                            "type": {"enum": unique(kind for _, kind in TABLE.values())},
                            "param": {
                                "type": ["string", "null"],
                                "description": "The member at fault, like `input.3`.",
                            },
                            "code": {"enum": unique(failure.code for failure in TABLE)},
                        },
                        additionalProperties=False,
                    )
                },
                additionalProperties=False,
            ),
        }
    )
