"""The shapes of what nodes and operators send and get. Where a struct decodes it, its schema is the struct's own."""

from embedmesh.gateway.api.admin_api import InviteRequest, UpstreamRequest, WeightRequest
from embedmesh.gateway.api.nodes_api import AtomaRegistration
from embedmesh.gateway.api.openapi.shapes import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    Json,
    list_of,
    of_structs,
    or_null,
    ref,
    whole,
)
from embedmesh.rules.membership import (
    Greeting,
    Heartbeat,
    HeartbeatReply,
    Offer,
    Registration,
    Standing,
    Statement,
    Welcome,
)
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.signing.atoma import ATOMA_FIELDS

CHECKS = [check.value for check in Check]

STRUCTS = (
    Greeting,
    Statement,
    Registration,
    AtomaRegistration,
    Welcome,
    Heartbeat,
    HeartbeatReply,
    Offer,
    UpstreamRequest,
    WeightRequest,
    InviteRequest,
)


def fleet_schemas() -> Json:
    """All of them, by name."""
    return _of_structs() | {
        "Message": whole({"message": TEXT}),
        "Node": _node(),
        "NodeList": list_of("Node"),
        "Invite": whole(
            {
                "invite_id": TEXT,
                "note": TEXT,
                "state": {"enum": ["open", "used", "expired"]},
                "created_ms": COUNT,
                "expires_ms": COUNT,
                "used_ms": or_null(COUNT),
                "node_id": or_null(TEXT),
            }
        ),
        "InviteList": list_of("Invite"),
        "NewInvite": whole({"invite_id": TEXT, "token": TEXT, "expires_ms": COUNT}),
        "RevokedInvite": whole({"invite_id": TEXT, "revoked": {"const": True}}),
    }


def _of_structs() -> Json:
    made = of_structs(STRUCTS)
    inside = {"contentMediaType": "application/json", "contentSchema": ref("Statement")}
    made["Registration"]["properties"]["statement"] |= inside
    made["AtomaRegistration"]["properties"]["data"] = whole(
        {name: COUNT if kind is int else TEXT for name, kind in ATOMA_FIELDS.items()}
    )
    return made


def _node() -> Json:
    """What is kept of a node, and what is seen of it: the second is missing of one that is not live here."""
    kept = {
        "node_id": TEXT,
        "small_id": or_null(COUNT) | {"description": "Its number; this machine's own node has none."},
        "kind": {"enum": ["local", "remote", "dialled", "upstream"]},
        "standing": {"enum": [standing.value for standing in Standing], "description": "What the operator has said."},
        "state": {
            "anyOf": [{"enum": [state.value for state in NodeState] + ["draining"]}, {"type": "null"}],
            "description": "Where it stands with this gateway; null where it is not live here. `ready` is said only "
            "of one whose last right answer is no older than its probes are apart.",
        },
        "address": or_null(TEXT),
    }
    more = {
        "country": or_null(TEXT),
        "offers": {"type": "array", "items": ref("Offer")},
        "trusted": FLAG,
        "weight": NUMBER,
        "draining": FLAG,
        "quarantined": or_null(TEXT) | {"description": "Why it is, where it is: the check that failed, and more."},
        "created_ms": COUNT,
        "registered_ms": COUNT,
        "models": {"type": "array", "items": TEXT, "description": "Those of the catalogue that it serves rightly."},
        "tokens_outstanding": COUNT,
        "parts_outstanding": COUNT,
        "tokens_per_s": or_null(COUNT) | {"description": "As measured; null where nothing was measured yet."},
        "fixed_ms": or_null(NUMBER),
        "answers": COUNT,
        "tokens": COUNT,
        "hedges": COUNT,
        "canaries": whole(dict.fromkeys(("passed", "failed", "disputed"), COUNT)),
        "reported": or_null(whole({"tokens_waiting": COUNT, "tokens_per_s": COUNT})),
        "receipts": COUNT | {"description": "How far its log was checked."},
        "receipts_seen": whole(dict.fromkeys(("matched", "unmatched", "false", "refused"), COUNT)),
        "failures": {"type": "object", "propertyNames": {"enum": CHECKS}, "additionalProperties": COUNT},
        "last_check": {"enum": [*CHECKS, None], "description": "What it failed last; kept when it is well again."},
        "last_failure": or_null(TEXT) | {"description": "The same in words."},
        "last_failed_s_ago": or_null(NUMBER),
        "last_answer_s_ago": or_null(NUMBER),
        "last_heartbeat_s_ago": or_null(NUMBER),
    }
    return whole(kept) | {"properties": kept | more, "additionalProperties": False}
