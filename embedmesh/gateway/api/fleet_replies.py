"""What operators see of a node: what the store keeps of it, and what this gateway observes now."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from embedmesh.fleet.registry import Node, Registry
from embedmesh.gateway.api.replies import Count
from embedmesh.gateway.nodes.records import DIALLED, kind_of
from embedmesh.gateway.nodes.roster import Member
from embedmesh.rules.membership import Offer, Standing
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.rules.ports import Clock
from embedmesh.storage.nodes import NodeRecord

DRAINING = "draining"
STATES = [*(state.value for state in NodeState), DRAINING]
CHECKS = [check.value for check in Check]

Seconds = float | None


class CanaryCounts(msgspec.Struct, frozen=True):
    """Canaries by result."""

    passed: Count
    failed: Count
    disputed: Count


class ReceiptCounts(msgspec.Struct, frozen=True):
    """Receipts by result."""

    matched: Count
    unmatched: Count
    false: Count
    refused: Count


class Reported(msgspec.Struct, frozen=True):
    """The node's own word, from its last heartbeat."""

    tokens_waiting: Count
    tokens_per_s: Count


class NodeReply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node. Observations are missing while it is not live here; kept facts are missing of this machine's own node."""

    node_id: str
    small_id: Annotated[Count | None, Meta(description="Its number; this machine's own node has none.")]
    kind: Literal["local", "remote", "dialled", "upstream"]
    standing: Annotated[Standing, Meta(description="The operator's decision.")]
    state: Annotated[
        Annotated[str, Meta(extra_json_schema={"enum": STATES})] | None,
        Meta(
            description="Its state with this gateway; null while it is not live here. `ready` needs a last right "
            "answer that is no older than its probes are apart."
        ),
    ]
    address: str | None
    country: str | UnsetType | None = UNSET
    offers: tuple[Offer, ...] | UnsetType = UNSET
    trusted: bool | UnsetType = UNSET
    weight: float | UnsetType = UNSET
    draining: bool | UnsetType = UNSET
    quarantined: Annotated[
        str | UnsetType | None, Meta(description="Why it is quarantined: the check that failed, and more.")
    ] = UNSET
    created_ms: Count | UnsetType = UNSET
    registered_ms: Count | UnsetType = UNSET
    models: Annotated[list[str] | UnsetType, Meta(description="The catalogue's models that it serves rightly.")] = UNSET
    tokens_outstanding: Count | UnsetType = UNSET
    parts_outstanding: Count | UnsetType = UNSET
    tokens_per_s: Annotated[
        Count | UnsetType | None, Meta(description="As measured; null before the first measurement.")
    ] = UNSET
    fixed_ms: float | UnsetType | None = UNSET
    answers: Count | UnsetType = UNSET
    tokens: Count | UnsetType = UNSET
    hedges: Count | UnsetType = UNSET
    canaries: CanaryCounts | UnsetType = UNSET
    reported: Reported | UnsetType | None = UNSET
    receipts: Annotated[Count | UnsetType, Meta(description="How far its log was checked.")] = UNSET
    receipts_seen: ReceiptCounts | UnsetType = UNSET
    failures: Annotated[
        dict[Check, Count] | UnsetType,
        Meta(extra_json_schema={"propertyNames": {"enum": CHECKS}}),
    ] = UNSET
    last_check: Annotated[
        Check | UnsetType | None, Meta(description="The check that it failed last; kept after it recovers.")
    ] = UNSET
    last_failure: Annotated[str | UnsetType | None, Meta(description="The same in words.")] = UNSET
    last_failed_s_ago: Seconds | UnsetType = UNSET
    last_answer_s_ago: Seconds | UnsetType = UNSET
    last_heartbeat_s_ago: Seconds | UnsetType = UNSET


def node_reply(
    record: NodeRecord | None, node: Node | None, member: Member | None, registry: Registry, clock: Clock
) -> NodeReply:
    """A node of the store, of this machine, or both: at least one of `record` and `node` is given."""
    fields = {} if record is None else _kept(record)
    if node is not None:
        fields |= _observed(node, clock) | {"state": _state(node, registry.proven(node))} | _reported(member, clock)
    return NodeReply(**({"small_id": None, "standing": Standing.ADMITTED, "state": None} | fields))


def _kept(record: NodeRecord) -> dict[str, Any]:
    return {
        "node_id": record.node_id,
        "small_id": record.small_id,
        "kind": kind_of(record),
        "standing": record.standing,
        "address": record.address or None,
        "country": record.country or None,
        "offers": record.offers,
        "trusted": record.trusted,
        "weight": record.weight,
        "draining": record.draining,
        "quarantined": record.quarantined or None,
        "created_ms": record.created_ms,
        "registered_ms": record.registered_ms,
    }


def _observed(node: Node, clock: Clock) -> dict[str, Any]:
    now, counts, failure, load = clock.monotonic(), node.counts, node.last_failure, node.load
    return {
        "node_id": node.node_id,
        "kind": node.kind,
        "address": node.address if node.kind != DIALLED else None,
        "models": sorted(node.models),
        "trusted": node.trusted,
        "weight": node.weight,
        "draining": node.draining,
        "tokens_outstanding": load.tokens,
        "parts_outstanding": load.parts,
        "tokens_per_s": round(load.tokens_per_s) if load.measured else None,
        "fixed_ms": round(load.fixed_s * 1000, 2) if load.measured else None,
        "answers": counts["answers"],
        "tokens": counts["tokens"],
        "hedges": counts["hedges"],
        "canaries": CanaryCounts(*(counts[f"canaries_{name}"] for name in CanaryCounts.__struct_fields__)),
        "receipts_seen": ReceiptCounts(*(counts[f"receipts_{name}"] for name in ReceiptCounts.__struct_fields__)),
        "failures": dict(node.failed),
        "last_check": failure.check if failure is not None else None,
        "last_failure": failure.words if failure is not None else None,
        "last_failed_s_ago": _ago(node.last_failed, now),
        "last_answer_s_ago": _ago(node.last_right_answer, now),
    }


def _reported(member: Member | None, clock: Clock) -> dict[str, Any]:
    if member is None:
        return {"reported": None, "receipts": 0, "last_heartbeat_s_ago": None}
    beat = member.reported
    return {
        "reported": None if beat is None else Reported(beat.tokens_waiting, round(beat.tokens_per_s)),
        "receipts": member.audit.count,
        "last_heartbeat_s_ago": _ago(member.seen, clock.monotonic()),
    }


def _state(node: Node, proven: bool) -> str:
    """A node whose last right answer is old is not called ready, though it may still get work."""
    if node.state is not NodeState.READY:
        return str(node.state.value)
    if node.draining:
        return DRAINING
    return "ready" if proven else NodeState.UNPROVEN.value


def _ago(when: float | None, now: float) -> float | None:
    return None if when is None else round(now - when, 1)
