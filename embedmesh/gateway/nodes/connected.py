"""The admitted nodes as this process works with them: for each a link, an entry in the registry, and its probes.

All of it is made from the nodes' records, and made again from them at the next start.
"""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from embedmesh.fleet.examiner import Examiner
from embedmesh.fleet.pace import ProbePace
from embedmesh.fleet.parallel_load import ParallelLoad
from embedmesh.fleet.probe import Prober
from embedmesh.fleet.registry import UPSTREAM, Node
from embedmesh.gateway.nodes.foreign import UpstreamLink
from embedmesh.gateway.nodes.links import Link, NodeClients
from embedmesh.gateway.nodes.own import OwnLink, Signing
from embedmesh.gateway.nodes.records import asks_of, node_of, pool_of, server_of, sessions_of, way_to
from embedmesh.rules.limits import DIALLED_CONNECTIONS
from embedmesh.rules.membership import Heartbeat, Standing
from embedmesh.rules.nodes import NodeState
from embedmesh.signing.audit import Audit
from embedmesh.signing.messages import RequestChecker
from embedmesh.signing.session import Sessions
from embedmesh.storage.nodes import NodeRecord
from embedmesh.upstream.pools import InboundPool, OutboundPool
from embedmesh.upstream.server import UpstreamServer, parse_url


@dataclass(eq=False)
class ConnectedNode:
    """One admitted node of our making."""

    record: NodeRecord
    node: Node
    pool: OutboundPool | InboundPool
    signing: Signing
    checker: RequestChecker
    audit: Audit
    probing: asyncio.Task[None]
    seen: float | None = None  # its last heartbeat, on the monotonic clock
    reported: Heartbeat | None = None  # what it said then


class ConnectedNodes:
    """By node id. `gateway` is the fingerprint of our identity, `prove` decides whether a new node may get work."""

    def __init__(
        self,
        examiner: Examiner,
        clients: NodeClients,
        gateway: str,
        prove: Callable[[Node], Awaitable[bool]] | None = None,
        *,
        normalizing: Collection[str] = (),
        upstream_probe_s: float = 60.0,
        own_link: type[OwnLink] = OwnLink,
        server: type[UpstreamServer] = UpstreamServer,
    ) -> None:
        """`normalizing` are the models whose vectors have unit length. `upstream_probe_s` is between two probes of an
        upstream that is well and idle. Nodes of ours and of other makes are asked by an `own_link` and a `server`.
        """
        self._examiner = examiner
        self._registry = examiner.registry
        self._clock = examiner.clock
        self._clients = clients
        self._gateway = gateway
        self._prove = prove
        self._normalizing = normalizing
        self._upstream_probe_s = upstream_probe_s
        self._own_link = own_link
        self._server = server
        self._dice = random.Random()
        self._instance = secrets.token_hex(8)
        self._nodes: dict[str, ConnectedNode] = {}
        self._upstreams: dict[str, asyncio.Task[None]] = {}  # their probes
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends, with the exception, when a node's probes have ended: a bug of ours."""

    def find(self, node_id: str) -> ConnectedNode | None:
        """The node of that id, if it is of our making and has registered."""
        return self._nodes.get(node_id)

    async def stop(self) -> None:
        """End all probes."""
        tasks = [node.probing for node in self._nodes.values()] + list(self._upstreams.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def follow(self, record: NodeRecord, known: NodeRecord | None) -> None:
        """Apply a record that another gateway has changed from what was `known`, or that is read at the start."""
        if record.standing is Standing.ADMITTED:
            if record.kind == UPSTREAM:
                if known is None or server_of(known) != server_of(record):
                    self.join_upstream(record)
            elif record.secret and (known is None or known.secret != record.secret or way_to(known) != way_to(record)):
                node = self.join(record, sessions_of(record.secret))
                if known is None:
                    node.checker.not_before_s = self._now_s()  # it does not remember which messages it has seen
        self.apply(record)
        entry = self._registry.find(record.node_id)
        if entry is None or known is None or known.quarantined == record.quarantined:
            return
        if record.quarantined and entry.state is not NodeState.QUARANTINED:
            self._registry.quarantine(entry, record.quarantined)
        elif not record.quarantined and entry.state is NodeState.QUARANTINED:
            self._registry.readmit(entry)

    def apply(self, record: NodeRecord) -> None:
        """Apply an operator's settings to a connected node."""
        entry = self._registry.find(record.node_id)
        if entry is None:
            return
        if record.standing is not Standing.ADMITTED:
            self.leave(record.node_id)
            return
        if (node := self._nodes.get(record.node_id)) is not None:
            node.record = record
        entry.trusted, entry.weight = record.trusted, record.weight
        if entry.draining != record.draining:
            self._registry.drain(entry, record.draining)

    def join(self, record: NodeRecord, sessions: Sessions) -> ConnectedNode:
        """Connect a node of our making, or update its sessions and offers."""
        assert record.public_key is not None
        node = self._nodes.get(record.node_id)
        if node is None or way_to(node.record) != way_to(record):
            node = self._connect(record, record.public_key, node)
        node.record = record
        node.signing.add(sessions.of_gateway)
        node.checker.add(sessions.of_node, self._now_s())
        node.node.asks = asks_of(record)
        node.node.inputs_max = record.inputs_max
        return node

    def join_upstream(self, record: NodeRecord) -> None:
        """Connect a server of another make, in place of what was connected under its id."""
        self.leave(record.node_id)
        entry = node_of(record)
        entry.reads_ids = False
        if self._generates(record):
            entry.load, entry.generates = ParallelLoad(), True
        entry.probe_every_s = self._upstream_probe_s
        url, token = parse_url(record.address), record.secret.decode("ascii")
        link = UpstreamLink(url, record.offers, self._examiner.catalogue, token, self._normalizing, self._server)
        self._upstreams[record.node_id] = self._begin(entry, link, ProbePace(self._dice))

    def _connect(self, record: NodeRecord, public_key: bytes, before: ConnectedNode | None) -> ConnectedNode:
        """Connect a node at a new address. It keeps its sessions and receipts from `before`."""
        self.leave(record.node_id)
        if before is not None:
            signing, checker, audit = before.signing, before.checker, before.audit
        else:
            count, head = record.receipts_count, record.receipts_head
            audit = Audit(record.node_id, public_key, self._gateway, count=count, head=head)
            signing = Signing(record.node_id, self._instance, self._clock, audit.answered)
            checker = RequestChecker(record.node_id)
        pool = pool_of(record)
        entry = node_of(record)
        generates = self._generates(record)
        if generates:
            entry.load, entry.generates = ParallelLoad(), True
        entry.load.interleaves = True
        if not record.address:
            entry.in_flight_max = DIALLED_CONNECTIONS - generates  # a stream has one for minutes: one is for our probes
        probing = self._begin(entry, self._own_link(pool, self._clock, signing))
        node = self._nodes[record.node_id] = ConnectedNode(record, entry, pool, signing, checker, audit, probing)
        return node

    def _generates(self, record: NodeRecord) -> bool:
        """Whether it offers a model that does something else than give numbers for inputs."""
        found = map(self._examiner.catalogue.find, (offer.id for offer in record.offers))
        return any(model is not None and not model.encodes for model in found)

    def _begin(self, entry: Node, link: Link, pace: ProbePace | None = None) -> asyncio.Task[None]:
        """Add a node to the registry. It gets work once it has answered a probe."""
        self._clients.add(entry.node_id, link)
        self._registry.add(entry)
        probing = asyncio.create_task(Prober(entry, self._examiner, self._prove, pace).run())
        probing.add_done_callback(self._ended)
        return probing

    def leave(self, node_id: str) -> None:
        """Disconnect a node, if it is connected."""
        node = self._nodes.pop(node_id, None)
        probing = node.probing if node is not None else self._upstreams.pop(node_id, None)
        if probing is not None:
            probing.cancel()
            self._registry.remove(node_id)
            self._clients.remove(node_id)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.broken.done():
            self.broken.set_exception(task.exception() or RuntimeError("a node is no longer probed"))

    def _now_s(self) -> int:
        return self._clock.unix_ms() // 1000
