"""What a gateway makes of a node's record: an entry in the registry, a connection pool, sessions."""

import msgspec

from embedmesh.fleet.addresses import parse
from embedmesh.fleet.registry import UPSTREAM, Node
from embedmesh.rules.nodes import NodeState, Reason
from embedmesh.signing.certificates import pinned_context
from embedmesh.signing.session import Session, Sessions
from embedmesh.storage.nodes import NodeRecord
from embedmesh.upstream.pools import InboundPool, OutboundPool, tcp_pool

REMOTE, DIALLED = "remote", "dialled"
"""Kinds of nodes of our make: reached at an address, or over connections that they open."""


def kind_of(record: NodeRecord) -> str:
    """REMOTE, DIALLED or UPSTREAM."""
    if record.kind == UPSTREAM:
        return UPSTREAM
    return REMOTE if record.address else DIALLED


def same(one: NodeRecord, other: NodeRecord) -> bool:
    """Whether two records are equal, how far the node's log was followed aside."""
    unread = {"receipts_count": 0, "receipts_head": b""}
    return msgspec.structs.replace(one, **unread) == msgspec.structs.replace(other, **unread)


def server_of(record: NodeRecord) -> tuple[object, ...]:
    """The fields that decide how an upstream is asked."""
    return record.address, record.offers, record.secret, record.inputs_max, record.in_flight_max


def node_of(record: NodeRecord) -> Node:
    return Node(
        record.node_id,
        record.address or "(dials out)",
        kind=kind_of(record),
        small_id=record.small_id,
        trusted=record.trusted,
        inputs_max=record.inputs_max,
        in_flight_max=record.in_flight_max,
        weight=record.weight,
        asks=asks_of(record),
        draining=record.draining,
        state=NodeState.QUARANTINED if record.quarantined else NodeState.UNPROVEN,
        last_failure=Reason.read(record.quarantined) if record.quarantined else None,
    )


def pool_of(record: NodeRecord) -> OutboundPool | InboundPool:
    if not record.address:
        return InboundPool()
    endpoint = parse(record.address)
    tls = pinned_context(record.certificate) if endpoint.tls else None
    return tcp_pool(record.ip, endpoint.port, tls, certificate=record.certificate if endpoint.tls else None)


def way_to(record: NodeRecord) -> tuple[object, ...]:
    """The fields that decide how a node is reached."""
    return record.address, record.ip, record.certificate


def asks_of(record: NodeRecord) -> dict[str, int]:
    return {offer.id: offer.price for offer in record.offers}


def pack_sessions(sessions: Sessions) -> bytes:
    return msgspec.msgpack.encode([(session.key_id, session.key) for session in sessions])


def sessions_of(secret: bytes) -> Sessions:
    of_gateway, of_node = msgspec.msgpack.decode(secret, type=tuple[tuple[str, bytes], tuple[str, bytes]])
    return Sessions(Session(*of_gateway), Session(*of_node))
