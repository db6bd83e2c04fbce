"""The nodes of a gateway, alive: for each that was admitted a link to talk by, a place in the fleet, and its probes.

What is kept of a node is a record in the store; what is made of it here is gone with the process, and made again from
the records at the next start.
"""

import asyncio
import logging
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from embedmesh.fleet.pace import Pace
from embedmesh.fleet.probe import Prober
from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.gateway.nodes.foreign import UpstreamLink, parse_url
from embedmesh.gateway.nodes.http1 import Dialler, Inbound
from embedmesh.gateway.nodes.own import Link, NodeClients, OwnLink, Signing
from embedmesh.gateway.nodes.records import (
    asks_of,
    node_of,
    pack_sessions,
    same,
    server_of,
    sessions_of,
    way_to,
    wires_of,
)
from embedmesh.rules.errors import InsufficientScope, NotFound, Overloaded, StoreUnavailable
from embedmesh.rules.forwarding import Verify
from embedmesh.rules.membership import Heartbeat, Standing
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Catalogue, Clock, Dice, Tokenizer
from embedmesh.signing.audit import Audit
from embedmesh.signing.identity import node_id as node_id_of
from embedmesh.signing.messages import RequestChecker
from embedmesh.signing.session import Sessions
from embedmesh.storage.nodes import NodeBooks, NodeRecord

log = logging.getLogger("embedmesh.fleet")

PENDING_NOTED_MS = 60_000  # after which it is written down again that a pending node asks; it does every 5 s
PENDING_OF_ORIGIN_MAX = 10  # of a hundred in all; who has more nodes behind one address invites them
DIALLED_IN_FLIGHT_MAX = 16  # as many connections as a node that dials out keeps open


@dataclass(eq=False)
class Member:
    """One admitted node of our making."""

    record: NodeRecord
    node: Node
    wires: Dialler | Inbound
    signing: Signing
    checker: RequestChecker
    audit: Audit
    probing: asyncio.Task[None]
    seen: float | None = None  # its last heartbeat, on the monotonic clock
    reported: Heartbeat | None = None  # what it said then


class Members:
    """By node id. `gateway` is the fingerprint of our identity."""

    def __init__(
        self,
        books: NodeBooks,
        registry: Registry,
        clients: NodeClients,
        catalogue: Catalogue,
        tokenizers: dict[str, Tokenizer],
        clock: Clock,
        verify: Verify,
        gateway: str,
        normalizing: Collection[str] = (),
        dice: Dice | None = None,
        upstream_probe_s: float = 60.0,
    ) -> None:
        """`normalizing` are the models whose vectors have unit length. `upstream_probe_s` is between two probes of a
        server of another make that is well and idle.
        """
        self._dice = dice or random.Random()
        self._upstream_probe_s = upstream_probe_s
        self._normalizing = normalizing
        self._books = books
        self._registry = registry
        self._clients = clients
        self._catalogue = catalogue
        self._tokenizers = tokenizers
        self._clock = clock
        self._verify = verify
        self._gateway = gateway
        self._instance = secrets.token_hex(8)
        self._records: dict[str, NodeRecord] = {}
        self._alive: dict[str, Member] = {}
        self._upstreams: dict[str, asyncio.Task[None]] = {}  # what probes them
        self._origins: dict[str, str] = {}  # of pending nodes: from where they have asked
        self._saving: set[asyncio.Task[None]] = set()
        self._noting = asyncio.Lock()  # one stranger at a time waits for the next: it is the operators', too
        self._changing = asyncio.Lock()  # of records: nobody's word is lost to another's that began earlier
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends, with its exception, when what keeps a node's state true has ended: a bug of ours."""
        self.prove: Callable[[Node], Awaitable[bool]] = _anybody
        """Whether a new node may get callers' work."""
        registry.on_quarantine = self._quarantined

    async def start(self) -> None:
        """All admitted nodes of the store. Those whose session it still has get work once they answer a probe.

        Raises StoreUnavailable.
        """
        await self.reload()

    def changed_elsewhere(self) -> None:
        """Some gateway of the store has changed a node, perhaps this one: see what it was."""
        self._remember(self._reload_if_possible())

    async def reload(self) -> None:
        """Follow what other gateways of the store have made of nodes. Raises StoreUnavailable."""
        async with self._changing:
            records = {record.node_id: record for record in await self._books.all()}
            for gone in self._records.keys() - records.keys():
                del self._records[gone]  # it never was more than pending
            for record in records.values():
                known = self._records.get(record.node_id)
                if known is None or not same(known, record):
                    self._records[record.node_id] = record
                    self._follow(record, known)

    async def stop(self) -> None:
        """Probe nobody any more."""
        probing = [member.probing for member in self._alive.values()] + list(self._upstreams.values())
        tasks = [*probing, *self._saving]
        for task in probing:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- looking

    def records(self) -> list[NodeRecord]:
        """All nodes that are known, oldest first."""
        return list(self._records.values())

    def record(self, node_id: str) -> NodeRecord:
        """One of them. Raises NotFound."""
        if (record := self._records.get(node_id)) is None:
            raise NotFound("There is no node of that id. `embedmesh nodes list` shows them.")
        return record

    def by_key(self, public_key: bytes) -> NodeRecord | None:
        """The node whose identity this is."""
        record = self._records.get(node_id_of(public_key))
        return record if record is not None and record.public_key == public_key else None

    def alive(self, node_id: str) -> Member | None:
        """The admitted node of that id, if it has ever registered."""
        return self._alive.get(node_id)

    # -- changing

    async def note_pending(self, public_key: bytes, origin: str, **said: object) -> NodeRecord:
        """Somebody asks to join, or asks again: an operator may say yes. Raises Overloaded and StoreUnavailable.

        Of one that was noted just now nothing is written; of one that only asks again, that it is there still.
        """
        async with self._noting, self._changing:
            node_id, now_ms = node_id_of(public_key), self._clock.unix_ms()
            known = self.by_key(public_key)
            if known is not None and (
                known.standing is not Standing.PENDING or now_ms - known.registered_ms < PENDING_NOTED_MS
            ):
                return known  # the operator was faster, or nothing is new
            waiting = self._pending_from()
            if known is None and Counter(waiting.values())[origin] >= PENDING_OF_ORIGIN_MAX:
                raise Overloaded(
                    f"From one address at most {PENDING_OF_ORIGIN_MAX} nodes wait to be approved. Try again once the "
                    "operator has approved some, or join with an invite."
                )
            if known is not None and all(getattr(known, name) == value for name, value in said.items()):
                await self._books.touch(node_id, now_ms)
                record = self._records[node_id] = msgspec.structs.replace(known, registered_ms=now_ms)
                return record
            record = await self._update(node_id, lambda kept: self._said(kept, public_key, said))
            self._origins = waiting | {node_id: origin}
        if known is None:
            log.info("node %s asks to join: `embedmesh nodes approve %s`", record.node_id, record.node_id)
        return record

    def _pending_from(self) -> dict[str, str]:
        """From where those that this gateway has noted, and that are still pending, have asked."""
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
            member = self._join(record, sessions)
            member.checker.not_before_s = 0
            if member.node.draining != record.draining:
                self._registry.drain(member.node, record.draining)  # it is back, if it had said that it leaves
            return record

    async def move(self, public_key: bytes, **said: object) -> NodeRecord:
        """An admitted node has another address. Raises InsufficientScope and StoreUnavailable."""
        async with self._changing:
            record = await self._update(node_id_of(public_key), lambda kept: self._said(kept, public_key, said))
            if record.secret:
                self._join(record, sessions_of(record.secret))
            return record

    async def add_upstream(self, record: NodeRecord) -> NodeRecord:
        """A server of another make, on the operator's word. Raises StoreUnavailable."""
        async with self._changing:
            record = await self._update(record.node_id, lambda kept: record)
            self._leave(record.node_id)
            self._join_upstream(record)
            return record

    async def change(self, node_id: str, **members: object) -> NodeRecord:
        """An operator's word on a node, kept and followed. Raises NotFound and StoreUnavailable."""
        async with self._changing:
            self.record(node_id)
            record = await self._update(node_id, lambda kept: msgspec.structs.replace(_there(kept), **members))
            self._heed(record)
            node = self._registry.find(node_id)
            if node is not None and members.get("quarantined") == "" and node.state is NodeState.QUARANTINED:
                self._registry.readmit(node)
            return record

    def _said(self, known: NodeRecord | None, public_key: bytes, said: dict[str, object]) -> NodeRecord:
        """A node's record with what it says of itself; what operators say of it stays. Raises InsufficientScope."""
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

    async def _update(self, node_id: str, change: Callable[[NodeRecord | None], NodeRecord]) -> NodeRecord:
        """Keep what becomes of a node. Raises StoreUnavailable and what `change` does; then nothing has changed."""
        saved = await self._books.update(node_id, change)
        if saved.forgotten is not None:
            self._records.pop(saved.forgotten, None)
        self._records[node_id] = saved.record
        return saved.record

    def _follow(self, record: NodeRecord, known: NodeRecord | None) -> None:
        """Make of a node what its record says, which another gateway has written, or this one before it was started."""
        if record.standing is Standing.ADMITTED:
            if record.kind == UPSTREAM:
                if known is None or server_of(known) != server_of(record):
                    self._leave(record.node_id)
                    self._join_upstream(record)
            elif record.secret and (known is None or known.secret != record.secret or way_to(known) != way_to(record)):
                member = self._join(record, sessions_of(record.secret))
                if known is None:
                    member.checker.not_before_s = self._now_s()  # it does not remember what it has seen
        self._heed(record)
        node = self._registry.find(record.node_id)
        if node is None or known is None or known.quarantined == record.quarantined:
            return
        if record.quarantined and node.state is not NodeState.QUARANTINED:
            self._registry.quarantine(node, record.quarantined)
        elif not record.quarantined and node.state is NodeState.QUARANTINED:
            self._registry.readmit(node)

    def _heed(self, record: NodeRecord) -> None:
        """What operators say of a node that is alive here."""
        node = self._registry.find(record.node_id)
        if node is None:
            return
        if record.standing is not Standing.ADMITTED:
            self._leave(record.node_id)
            return
        if (member := self._alive.get(record.node_id)) is not None:
            member.record = record
        node.trusted, node.weight = record.trusted, record.weight
        if node.draining != record.draining:
            self._registry.drain(node, record.draining)

    async def refresh_audit(self, member: Member) -> None:
        """Another gateway may have followed the node's log further. Raises StoreUnavailable."""
        kept = await self._books.one(member.record.node_id)
        if kept is not None:
            member.audit.move_to(kept.receipts_count, kept.receipts_head)

    async def _reload_if_possible(self) -> None:
        try:
            await self.reload()
        except StoreUnavailable:
            log.warning("what became of nodes elsewhere could not be read; it is at their next change")

    def _join(self, record: NodeRecord, sessions: Sessions) -> Member:
        """A link to it and a place in the fleet, or what it has of these with what is new."""
        assert record.public_key is not None
        member = self._alive.get(record.node_id)
        if member is None or way_to(member.record) != way_to(record):
            member = self._connect(record, record.public_key, member)
        member.record = record
        member.signing.add(sessions.of_gateway)
        member.checker.add(sessions.of_node, self._now_s())
        member.node.asks = asks_of(record)
        member.node.inputs_max = record.inputs_max
        return member

    def _connect(self, record: NodeRecord, public_key: bytes, before: Member | None) -> Member:
        """A node at a new place. What was agreed with it `before`, and seen of it, it takes along."""
        self._leave(record.node_id)
        if before is not None:
            signing, checker, audit = before.signing, before.checker, before.audit
        else:
            count, head = record.receipts_count, record.receipts_head
            audit = Audit(record.node_id, public_key, self._gateway, count=count, head=head)
            signing = Signing(record.node_id, self._instance, self._clock, audit.answered)
            checker = RequestChecker(record.node_id)
        wires = wires_of(record)
        node = node_of(record)
        node.load.interleaves = True
        if not record.address:
            node.in_flight_max = DIALLED_IN_FLIGHT_MAX
        probing = self._begin(node, OwnLink(wires, self._clock, signing))
        member = Member(record, node, wires, signing, checker, audit, probing)
        self._alive[record.node_id] = member
        return member

    def _join_upstream(self, record: NodeRecord) -> None:
        node = node_of(record)
        node.reads_ids = False
        node.probe_every_s = self._upstream_probe_s
        token = record.secret.decode("ascii")
        link = UpstreamLink(parse_url(record.address), record.offers, self._catalogue, token, self._normalizing)
        self._upstreams[record.node_id] = self._begin(node, link, Pace(self._dice))

    def _begin(self, node: Node, link: Link, pace: Pace | None = None) -> asyncio.Task[None]:
        """Into the fleet; it gets work once it has answered a probe."""
        self._clients.add(node.node_id, link)
        self._registry.add(node)
        prober = Prober(
            node,
            self._registry,
            self._catalogue,
            self._tokenizers,
            self._clients,
            self._clock,
            self._verify,
            lambda newcomer: self.prove(newcomer),
            pace,
        )
        probing = asyncio.create_task(prober.run())
        probing.add_done_callback(self._ended)
        return probing

    def _leave(self, node_id: str) -> None:
        member = self._alive.pop(node_id, None)
        probing = member.probing if member is not None else self._upstreams.pop(node_id, None)
        if probing is not None:
            probing.cancel()
            self._registry.remove(node_id)
            self._clients.remove(node_id)

    def _quarantined(self, node: Node, why: str) -> None:
        """Remember it over a restart; if the store does not take it now, the node is found out again."""
        log.warning("node %s is quarantined: %s", node.node_id, why)
        record = self._records.get(node.node_id)
        if record is not None and not record.quarantined:
            self._remember(self._remember_quarantine(node.node_id, why))

    def _remember(self, saving: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(saving)
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _remember_quarantine(self, node_id: str, why: str) -> None:
        try:
            await self.change(node_id, quarantined=why)
        except StoreUnavailable:
            log.warning("the quarantine of node %s could not be written down", node_id)

    def readmitted(self, node: Node) -> None:
        """Its quarantine has ended by right answers: remember that, too."""
        log.info("node %s is readmitted: its answers have been right for a while", node.node_id)
        if node.node_id in self._records:
            self._remember(self._remember_quarantine(node.node_id, ""))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.broken.done():
            self.broken.set_exception(task.exception() or RuntimeError("a node is no longer probed"))

    def _now_s(self) -> int:
        return self._clock.unix_ms() // 1000


def _there(record: NodeRecord | None) -> NodeRecord:
    if record is None:
        raise NotFound("There is no node of that id. `embedmesh nodes list` shows them.")
    return record


async def _anybody(node: Node) -> bool:
    return True
