"""What operators see of a node: what the store keeps of it, and what this gateway observes now."""

from collections import Counter
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from embedmesh.fleet.registry import Node, Registry
from embedmesh.gateway.api.replies import Count, doc
from embedmesh.gateway.nodes.connected import ConnectedNode
from embedmesh.gateway.nodes.records import DIALLED, kind_of
from embedmesh.rules.membership import Offer, Standing
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.rules.ports import Clock
from embedmesh.storage.nodes import NodeRecord

DRAINING = "draining"
STATES = [*(state.value for state in NodeState), DRAINING]
CHECKS = [check.value for check in Check]
KEPT = ("node_id", "small_id", "standing", "offers", "trusted", "weight", "draining", "created_ms", "registered_ms")
OBSERVED = ("node_id", "kind", "trusted", "weight", "draining")

C = TypeVar("C", bound=msgspec.Struct)

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
    small_id: Annotated[Count | None, doc("Its number; this machine's own node has none.")]
    kind: Literal["local", "remote", "dialled", "upstream"]
    standing: Annotated[Standing, doc("The operator's decision.")]
    state: Annotated[
        Annotated[str, Meta(extra_json_schema={"enum": STATES})] | None,
        doc("Its state with this gateway; null while it is not live here. `ready` needs a recent right answer."),
    ]
    address: str | None
    country: str | UnsetType | None = UNSET
    offers: tuple[Offer, ...] | UnsetType = UNSET
    trusted: bool | UnsetType = UNSET
    weight: float | UnsetType = UNSET
    draining: bool | UnsetType = UNSET
    quarantined: Annotated[str | UnsetType | None, doc("Why it is quarantined: the check that failed, and more.")] = (
        UNSET
    )
    created_ms: Count | UnsetType = UNSET
    registered_ms: Count | UnsetType = UNSET
    models: Annotated[list[str] | UnsetType, doc("The catalogue's models that it serves rightly.")] = UNSET
    tokens_outstanding: Count | UnsetType = UNSET
    parts_outstanding: Count | UnsetType = UNSET
    tokens_per_s: Annotated[Count | UnsetType | None, doc("As measured; null before the first measurement.")] = UNSET
    fixed_ms: float | UnsetType | None = UNSET
    threads: Annotated[
        str | UnsetType | None, doc("Threads of its engines, and the reason, as it says; null where it does not.")
    ] = UNSET
    answers: Count | UnsetType = UNSET
    tokens: Count | UnsetType = UNSET
    hedges: Count | UnsetType = UNSET
    canaries: CanaryCounts | UnsetType = UNSET
    reported: Reported | UnsetType | None = UNSET
    receipts: Annotated[Count | UnsetType, doc("How far its log was checked.")] = UNSET
    receipts_seen: ReceiptCounts | UnsetType = UNSET
    failures: Annotated[
        dict[Check, Count] | UnsetType,
        Meta(
            description="Attempts and probes that failed, by check.",
            extra_json_schema={"propertyNames": {"enum": CHECKS}},
        ),
    ] = UNSET
    busy: Annotated[Count | UnsetType, doc("How often it was busy: load, and no failure.")] = UNSET
    unreached: Annotated[
        Count | UnsetType,
        doc("How often it could not be reached before its first right answer: it may only be starting."),
    ] = UNSET
    last_check: Annotated[Check | UnsetType | None, doc("The check that it failed last; kept after it recovers.")] = (
        UNSET
    )
    last_failure: Annotated[str | UnsetType | None, doc("The same in words.")] = UNSET
    last_failed_s_ago: Seconds | UnsetType = UNSET
    last_answer_s_ago: Seconds | UnsetType = UNSET
    last_heartbeat_s_ago: Seconds | UnsetType = UNSET


def node_reply(
    record: NodeRecord | None, node: Node | None, member: ConnectedNode | None, registry: Registry, clock: Clock
) -> NodeReply:
    """A node of the store, of this machine, or both: at least one of `record` and `node` is given."""
    fields = {} if record is None else _kept(record)
    if node is not None:
        fields |= _observed(node, clock) | {"state": _state(node, registry.proven(node))} | _reported(member, clock)
    return NodeReply(**({"small_id": None, "standing": Standing.ADMITTED, "state": None} | fields))


def _kept(record: NodeRecord) -> dict[str, Any]:
    return _fields(record, KEPT) | {
        "kind": kind_of(record),
        "address": record.address or None,
        "country": record.country or None,
        "quarantined": record.quarantined or None,
    }


def _observed(node: Node, clock: Clock) -> dict[str, Any]:
    now, failure, load = clock.monotonic(), node.last_failure, node.load
    return _fields(node, OBSERVED) | {
        "address": node.address if node.kind != DIALLED else None,
        "models": sorted(node.models),
        "tokens_outstanding": load.tokens,
        "parts_outstanding": load.parts,
        "tokens_per_s": round(load.tokens_per_s) if load.measured else None,
        "fixed_ms": round(load.fixed_s * 1000, 2) if load.measured else None,
        "threads": node.threads or None,
        **{name: node.counts[name] for name in ("answers", "tokens", "hedges")},
        "canaries": _counts(node, "canaries", CanaryCounts),
        "receipts_seen": _counts(node, "receipts", ReceiptCounts),
        **_failed(node),
        "last_check": failure.check if failure is not None else None,
        "last_failure": failure.words if failure is not None else None,
        "last_failed_s_ago": _ago(node.last_failed, now),
        "last_answer_s_ago": _ago(node.last_right_answer, now),
    }


def _failed(node: Node) -> dict[str, Any]:
    """What failed, apart from what says nothing against a node."""
    unreached = node.counts["unreached"]
    failures = node.failed - Counter({Check.CONNECT: unreached, Check.BUSY: node.failed[Check.BUSY]})
    return {"failures": dict(failures), "busy": node.failed[Check.BUSY], "unreached": unreached}


def _fields(source: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def _counts(node: Node, prefix: str, kind: type[C]) -> C:
    return kind(*(node.counts[f"{prefix}_{name}"] for name in kind.__struct_fields__))


def _reported(member: ConnectedNode | None, clock: Clock) -> dict[str, Any]:
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
