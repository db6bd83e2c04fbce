"""The roster: the records of all nodes that the store knows, and how nodes, operators and other gateways change them.

Each change is written to the store first, and then applied to the connected node.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec

from embedmesh.fleet.registry import Node, Registry
from embedmesh.gateway.nodes.connected import ConnectedNode, ConnectedNodes
from embedmesh.gateway.nodes.records import pack_sessions, same, sessions_of
from embedmesh.rules.acts import Act, Actor, Verb
from embedmesh.rules.errors import InsufficientScope, NotFound, Overloaded, StoreUnavailable
from embedmesh.rules.limits import PENDING_OF_ORIGIN_MAX
from embedmesh.rules.membership import Standing
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Clock
from embedmesh.signing.identity import node_id as node_id_of
from embedmesh.signing.session import Sessions
from embedmesh.storage.cached.changes import Changes
from embedmesh.storage.nodes import NodeBooks, NodeRecord

log = logging.getLogger("embedmesh.fleet")

PENDING_NOTED_MS = 60_000  # a pending node asks every 5 s; its record is written at most this often
UNKNOWN_NODE = "There is no node of that id. `embedmesh nodes list` shows them."


class Roster:
    """By node id."""

    def __init__(
        self, books: NodeBooks, connected: ConnectedNodes, registry: Registry, clock: Clock, changes: Changes
    ) -> None:
        self._books = books
        self._connected = connected
        self._registry = registry
        self._clock = clock
        self._records: dict[str, NodeRecord] = {}
        self._origins: dict[str, str] = {}  # from where pending nodes have asked
        self._saving: set[asyncio.Task[None]] = set()
        self._noting = asyncio.Lock()  # strangers queue here, so that at most one of them waits for `_changing`
        self._changing = asyncio.Lock()  # of records: no change is lost to another one that began earlier
        registry.on_quarantine.append(self._quarantined)
        registry.on_readmit.append(self._readmitted)
        changes.on(
            "nodes", lambda: self._spawn(self.reload(), "the changes of nodes are not read until the next change")
        )

    async def reload(self) -> None:
        """Read all records and apply those that other gateways have changed. Also the start. Raises StoreUnavailable.

        At the start, nodes whose session the store still has get work once they answer a probe.
        """
        async with self._changing:
            records = {record.node_id: record for record in await self._books.all()}
            for gone in self._records.keys() - records.keys():
                del self._records[gone]  # it never was more than pending
            for record in records.values():
                known = self._records.get(record.node_id)
                if known is None or not same(known, record):
                    self._records[record.node_id] = record
                    self._connected.follow(record, known)

    async def stop(self) -> None:
        """Wait until all is saved."""
        await asyncio.gather(*self._saving, return_exceptions=True)

    # -- looking

    def records(self) -> list[NodeRecord]:
        """All nodes that are known, oldest first."""
        return list(self._records.values())

    def record(self, node_id: str) -> NodeRecord:
        """One of them. Raises NotFound."""
        return _existing(self._records.get(node_id))

    def by_key(self, public_key: bytes) -> NodeRecord | None:
        """The node with this identity."""
        record = self._records.get(node_id_of(public_key))
        return record if record is not None and record.public_key == public_key else None

    def connected(self, node_id: str) -> ConnectedNode | None:
        """The admitted node of that id, if it has ever registered."""
        return self._connected.find(node_id)

    # -- changing

    async def note_pending(self, public_key: bytes, origin: str, **said: object) -> NodeRecord:
        """An unknown node asks to join: an operator may approve it. Raises Overloaded and StoreUnavailable.

        A node that was noted just now is not written again; one that asks again unchanged is only touched.
        """
        async with self._noting, self._changing:
            node_id, now_ms = node_id_of(public_key), self._clock.unix_ms()
            known = self.by_key(public_key)
            if known is not None and (
                known.standing is not Standing.PENDING or now_ms - known.registered_ms < PENDING_NOTED_MS
            ):
                return known  # the operator was faster, or nothing is new
            pending = self._pending_origins()
            if known is None and Counter(pending.values())[origin] >= PENDING_OF_ORIGIN_MAX:
                raise Overloaded(
                    f"From one address at most {PENDING_OF_ORIGIN_MAX} nodes wait to be approved. Try again once the "
                    "operator has approved some, or join with an invite."
                )
            if known is not None and all(getattr(known, name) == value for name, value in said.items()):
                await self._books.touch(node_id, now_ms)
                record = self._records[node_id] = msgspec.structs.replace(known, registered_ms=now_ms)
                return record
            record = await self._update(node_id, lambda kept: self._said(kept, public_key, said))
            self._origins = pending | {node_id: origin}
        if known is None:
            words = "node %s asks to join: `embedmesh nodes approve %s`"
            log.info(words, record.node_id, record.node_id, extra={"node": record.node_id})
        return record

    def _pending_origins(self) -> dict[str, str]:
        """The origins of nodes that this gateway has noted and that are still pending."""
        pending = {name for name, record in self._records.items() if record.standing is Standing.PENDING}
        return {name: origin for name, origin in self._origins.items() if name in pending}

    async def admit(self, public_key: bytes, sessions: Sessions, **said: object) -> NodeRecord:
        """A node has registered, for the first time or again. Raises InsufficientScope and StoreUnavailable."""
        async with self._changing:
            now = {"standing": Standing.ADMITTED, "secret": pack_sessions(sessions)}
            record = await self._update(
                node_id_of(public_key),
                lambda kept: msgspec.structs.replace(self._said(kept, public_key, said), **now),
            )
            node = self._connected.join(record, sessions)
            node.checker.not_before_s = 0
            if node.node.draining != record.draining:
                self._registry.drain(node.node, record.draining)  # a node that has left is back
            return record

    async def move(self, public_key: bytes, **said: object) -> NodeRecord:
        """An admitted node has another address. Raises InsufficientScope and StoreUnavailable."""
        async with self._changing:
            record = await self._update(node_id_of(public_key), lambda kept: self._said(kept, public_key, said))
            if record.secret:
                self._connected.join(record, sessions_of(record.secret))
            return record

    async def add_upstream(self, record: NodeRecord, by: Actor) -> NodeRecord:
        """An operator adds a server of another make. Raises StoreUnavailable."""
        async with self._changing:
            record = await self._update(record.node_id, lambda kept: record, (by, Verb.NODE_ADD))
            self._connected.join_upstream(record)
            return record

    async def change(self, node_id: str, by: tuple[Actor, Verb] | None, **fields: object) -> NodeRecord:
        """A node is changed by an operator, or by this gateway itself. Raises NotFound and StoreUnavailable."""
        async with self._changing:
            self.record(node_id)
            record = await self._update(node_id, lambda kept: msgspec.structs.replace(_existing(kept), **fields), by)
            self._connected.apply(record)
            node = self._registry.find(node_id)
            if node is not None and fields.get("quarantined") == "" and node.state is NodeState.QUARANTINED:
                self._registry.readmit(node)
            return record

    async def note(self, act: Act, by: Actor) -> None:
        """What an operator does to a node that has no record. Raises StoreUnavailable."""
        await self._books.note(act, by)

    async def refresh_audit(self, node: ConnectedNode) -> None:
        """Another gateway may have followed the node's log further. Raises StoreUnavailable."""
        kept = await self._books.one(node.record.node_id)
        if kept is not None:
            node.audit.move_to(kept.receipts_count, kept.receipts_head)

    def _said(self, known: NodeRecord | None, public_key: bytes, said: dict[str, object]) -> NodeRecord:
        """A node's record with what it says of itself; operators' settings stay. Raises InsufficientScope."""
        now_ms = self._clock.unix_ms()
        if known is None:
            known = NodeRecord(
                node_id=node_id_of(public_key),
                standing=Standing.PENDING,
                public_key=public_key,
                inputs_max=1,
                created_ms=now_ms,
            )
        if known.standing is Standing.REMOVED:
            raise InsufficientScope("This node was removed by the operator of this gateway.")
        return msgspec.structs.replace(known, registered_ms=now_ms, **said)

    async def _update(
        self, node_id: str, change: Callable[[NodeRecord | None], NodeRecord], by: tuple[Actor, Verb] | None = None
    ) -> NodeRecord:
        """Save a changed record. Raises StoreUnavailable and what `change` does; then nothing has changed."""
        saved = await self._books.update(node_id, change, by)
        if saved.forgotten is not None:
            self._records.pop(saved.forgotten, None)
        self._records[node_id] = saved.record
        return saved.record

    # -- following

    def _quarantined(self, node: Node, why: str) -> None:
        """Save it, for the next start. Without the store it is not saved, and the node is found out again."""
        log.warning("node %s is quarantined: %s", node.node_id, why, extra={"node": node.node_id})
        record = self._records.get(node.node_id)
        if record is not None and not record.quarantined:
            saving = self.change(node.node_id, None, quarantined=why)
            self._spawn(saving, f"the quarantine of {node.node_id} is not saved")

    def _readmitted(self, node: Node) -> None:
        """Save that its quarantine has ended by right answers."""
        record = self._records.get(node.node_id)
        if record is not None and record.quarantined:
            saving = self.change(node.node_id, None, quarantined="")
            self._spawn(saving, f"the readmission of {node.node_id} is not saved")

    def _spawn(self, work: Awaitable[object], loss: str) -> None:
        """Do it in a task. Without the store, log the loss."""

        async def if_possible() -> None:
            try:
                await work
            except StoreUnavailable:
                log.warning("the store is unavailable: %s", loss)

        task = asyncio.create_task(if_possible())
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)


def _existing(record: NodeRecord | None) -> NodeRecord:
    if record is None:
        raise NotFound(UNKNOWN_NODE)
    return record
