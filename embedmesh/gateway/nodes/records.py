"""What a node's record says, made into what a gateway works with: a place in the fleet, wires, sessions."""

import msgspec

from embedmesh.fleet.addresses import parse
from embedmesh.fleet.registry import UPSTREAM, Node
from embedmesh.gateway.nodes.http1 import Dialler, Inbound, tcp_dialler
from embedmesh.rules.nodes import NodeState, Reason
from embedmesh.signing.certificates import pinned_context
from embedmesh.signing.session import Session, Sessions
from embedmesh.storage.nodes import NodeRecord

REMOTE, DIALLED = "remote", "dialled"
"""Kinds of nodes of our make: at an address, over their own connections."""


def kind_of(record: NodeRecord) -> str:
    """REMOTE, DIALLED or UPSTREAM."""
    if record.kind == UPSTREAM:
        return UPSTREAM
    return REMOTE if record.address else DIALLED


def same(one: NodeRecord, other: NodeRecord) -> bool:
    """But for how far the node's log was followed."""
    unread = {"receipts_count": 0, "receipts_head": b""}
    return msgspec.structs.replace(one, **unread) == msgspec.structs.replace(other, **unread)


def server_of(record: NodeRecord) -> tuple[object, ...]:
    """What decides how a server of another make is asked."""
    return record.address, record.offers, record.secret, record.inputs_max, record.in_flight_max


def node_of(record: NodeRecord) -> Node:
    return Node(
        record.node_id,
        record.address or "(dials out)",
        kind=kind_of(record),
        trusted=record.trusted,
        inputs_max=record.inputs_max,
        in_flight_max=record.in_flight_max,
        weight=record.weight,
        asks=asks_of(record),
        draining=record.draining,
        state=NodeState.QUARANTINED if record.quarantined else NodeState.UNPROVEN,
        last_failure=Reason.read(record.quarantined) if record.quarantined else None,
    )


def wires_of(record: NodeRecord) -> Dialler | Inbound:
    if not record.address:
        return Inbound()
    endpoint = parse(record.address)
    tls = pinned_context(record.certificate) if endpoint.tls else None
    return tcp_dialler(record.ip, endpoint.port, tls, certificate=record.certificate if endpoint.tls else None)


def way_to(record: NodeRecord) -> tuple[object, ...]:
    """What decides how a node is reached."""
    return record.address, record.ip, record.certificate


def asks_of(record: NodeRecord) -> dict[str, int]:
    return {offer.id: offer.price for offer in record.offers}


class _Kept(msgspec.Struct, array_like=True):
    of_gateway: tuple[str, bytes]
    of_node: tuple[str, bytes]


def pack_sessions(sessions: Sessions) -> bytes:
    both = [(session.key_id, session.key) for session in sessions]
    return msgspec.msgpack.encode(_Kept(*both))


def sessions_of(secret: bytes) -> Sessions:
    kept = msgspec.msgpack.decode(secret, type=_Kept)
    return Sessions(Session(*kept.of_gateway), Session(*kept.of_node))
