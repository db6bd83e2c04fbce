"""What takes the requests: a router in front of the servers, our scheduler, or an oracle that knows everything."""

import bisect
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from bench.sim.routers import Router
from bench.sim.servers import SimServer
from bench.sim.workload import Request
from bench.sim.world import World
from embedmesh.fleet.load import Load
from embedmesh.fleet.probe import NODE_PROBE_S, OUT_EVERY_S, SPEED_INPUTS, SPEED_TOKENS
from embedmesh.fleet.queued import QueuedRequest
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.rules.deadlines import attempt_s
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import NodeFailure, NodeTooSlow
from embedmesh.rules.forwarding import Part
from embedmesh.rules.limits import ATTEMPTS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState

MODEL = Model(id="sim/model", width=4, max_tokens=256, price=1)
PROBE_TOKENS = 12
START_S = 2.0  # before the first request: nodes are proven and measured


class SimContender:
    """Takes requests; sees to it that each is ended once."""

    def __init__(self, world: World, servers: Sequence[SimServer], seed: int) -> None:
        self.world = world
        self.servers = servers
        self.dice = Random(seed)
        self.waited: list[tuple[float, float]] = []  # in front of the servers
        self.cpu_ns = 0

    def arrive(self, request: Request) -> None:
        raise NotImplementedError

    def over(self) -> None:
        """All is done: say so by AssertionError if it is not."""

    def _end(self, request: Request, *, well: bool) -> None:
        assert request.ended_at < 0, "a request is answered once"
        request.ended_at = self.world.now
        request.failed = not well


class Routed(SimContender):
    """Another router. What fails is sent to another node, to three at most."""

    def __init__(
        self, make: Callable[[int, Random], Router], world: World, servers: Sequence[SimServer], seed: int
    ) -> None:
        super().__init__(world, servers, seed)
        self._router = make(len(servers), self.dice)

    def arrive(self, request: Request) -> None:
        world, router = self.world, self._router
        now = world.now
        number = router.pick(request.tokens, request.tried, now)
        router.began(number, request.tokens, now)

        def done(failure: NodeFailure | None) -> None:
            router.ended(number, request.tokens, world.now, world.now - now, failure is None)
            if failure is None:
                self._end(request, well=True)
                return
            request.tried.add(number)
            if len(request.tried) < min(ATTEMPTS_MAX, len(self.servers)):
                self.arrive(request)
            else:
                self._end(request, well=False)

        self.servers[number].ask(request.tokens, done)


class Scheduled(SimContender):
    """`embedmesh.fleet.scheduler.Scheduler`, the very thing, in front of nodes whose speed it has to learn."""

    def __init__(self, world: World, servers: Sequence[SimServer], seed: int) -> None:
        super().__init__(world, servers, seed)
        self.registry = Registry(world)
        self.scheduler = Scheduler(self.registry, world, self.dice, self._call_later)
        self.taken: list[tuple[SimRequest, Part]] = []  # to be sent as soon as the scheduler has done
        self._by_id = {f"n{server.number}": server for server in servers}
        for node_id, server in self._by_id.items():
            node = self.registry.add(Node(node_id, "", load=Load(interleaves=server.interleaves)))
            self._probe(node, PROBE_TOKENS, partial(self._probe, node, SPEED_INPUTS * SPEED_TOKENS))

    def arrive(self, request: Request) -> None:
        SimRequest(self, request)

    def over(self) -> None:
        assert not self.scheduler.queued_tokens, "nothing waits"
        assert all(not node.load.parts and not node.load.tokens for node in self.registry), "no load is left behind"

    def decide(self, what: Callable[[], object]) -> None:
        """Call the scheduler; then send the nodes what it has decided. Counts the time that it takes to decide."""
        began = time.process_time_ns()
        what()
        self.cpu_ns += time.process_time_ns() - began
        taken, self.taken = self.taken, []
        for asking, part in taken:
            asking.ask(part, self._by_id[part.node_id])

    def failed(self, node_id: str) -> None:
        """After a node's failure: once it is out it is probed, as `embedmesh.fleet.probe.Prober` does."""
        node = self.registry.find(node_id)
        assert node is not None
        if node.state is NodeState.EJECTED and not node.draining:
            node.draining = True  # stands for: a prober is at work
            self.world.call_later(OUT_EVERY_S, lambda: self._probe(node, PROBE_TOKENS))

    def _probe(self, node: Node, tokens: int, then: Callable[[], None] = lambda: None) -> None:
        """A small embedding. `then` is called after a right answer."""
        node.load.began(tokens, self.world.now)
        began = self.world.now

        def done(failure: NodeFailure | None) -> None:
            late = self.world.now - began > NODE_PROBE_S
            node.load.ended(tokens, self.world.now, well=failure is None and not late)
            if failure is None and not late:
                node.draining = False
                self.decide(lambda: self.registry.answered_right(node, [MODEL.id]))
                then()
            if node.state is not NodeState.READY:
                if failure is not None:
                    self.decide(lambda: self.registry.failed(node, failure))
                node.draining = True
                self.world.call_later(OUT_EVERY_S, lambda: self._probe(node, tokens))

        self._by_id[node.node_id].ask(tokens, done)

    def _call_later(self, seconds: float, what: Callable[[], None]) -> None:
        self.world.call_later(seconds, lambda: self.decide(what))


class SimRequest:
    """One request in our scheduler, as `embedmesh.flow.forward.Asking` is. Implements the port `Asker`."""

    def __init__(self, scheduled: Scheduled, request: Request) -> None:
        self._scheduled = scheduled
        self._request = request
        self._answered = bytearray(len(request.lengths))
        self._missing = len(request.lengths)
        self._unsent = self._missing  # inputs that no node has now
        self._unsent_since = scheduled.world.now
        self._work: QueuedRequest | None = None
        counted = Counted(lengths=request.lengths, ids=[], texts=[])
        scheduled.decide(lambda: self._enter(counted))

    def _enter(self, counted: Counted) -> None:
        self._work = self._scheduled.scheduler.enter(MODEL, counted, self._request.account, self)

    def take(self, part: Part) -> None:
        self._unsent -= len(part.rows)
        if not self._unsent and self._scheduled.world.now > self._unsent_since:
            self._scheduled.waited.append((self._unsent_since, self._scheduled.world.now))
        self._scheduled.taken.append((self, part))

    def give_up(self, last: NodeFailure | None) -> None:
        self._failed()

    def ask(self, part: Part, server: SimServer) -> None:
        world = self._scheduled.world
        over = False

        def done(failure: NodeFailure | None) -> None:
            nonlocal over
            if not over:
                over = True
                self._ended(part, failure)

        job = server.ask(part.tokens, done)

        def too_late() -> None:
            if not over:
                server.give_up(job)
                done(NodeTooSlow("late"))

        world.call_later(attempt_s(part.expected_s), too_late)

    def _ended(self, part: Part, failure: NodeFailure | None) -> None:
        work = self._work
        assert work is not None
        again = False
        if failure is not None:
            if not self._unsent:
                self._unsent_since = self._scheduled.world.now
            self._unsent += len(part.rows)

        def ended() -> None:
            nonlocal again
            again = work.ended(part, failure)

        self._scheduled.decide(ended)
        if failure is not None:
            self._scheduled.failed(part.node_id)
            if not again:
                self._failed()
            return
        for at in part.rows:
            assert not self._answered[at], "an input is answered once"
            self._answered[at] = 1
        self._missing -= len(part.rows)
        if not self._missing and not self._request.failed:
            self._scheduled._end(self._request, well=True)

    def _failed(self) -> None:
        if not self._request.failed:
            self._scheduled._end(self._request, well=False)
            if self._work is not None:
                self._work.leave()


class Oracle(SimContender):
    """What is possible for one that knows each node's speed and end of work, has no wire, and no account to be fair to:
    one queue in front of all, the request with least left to do first (Schrage, 1968), given out in small pieces."""

    def __init__(self, world: World, servers: Sequence[SimServer], seed: int) -> None:
        super().__init__(world, servers, seed)
        self._queue: list[tuple[float, int, _Remainder]] = []
        self._idle = sorted(servers, key=lambda server: server.tokens_per_s)  # the fastest last
        self._speed = sum(server.tokens_per_s for server in servers)

    def arrive(self, request: Request) -> None:
        self._wait(_Remainder(request, request.tokens, 0, self.world.now))
        self._give()

    def _wait(self, remainder: "_Remainder") -> None:
        heapq.heappush(self._queue, (remainder.left, remainder.request.number, remainder))

    def _give(self) -> None:
        """Work for idle nodes, as long as that makes it sooner."""
        aside = []
        ahead = 0
        while self._queue and self._idle:
            _, _, remainder = heapq.heappop(self._queue)
            if not self._place(remainder, ahead):
                ahead += remainder.left
                aside.append(remainder)
                if len(aside) > 8:
                    break
        for remainder in aside:
            self._wait(remainder)

    def _place(self, remainder: "_Remainder", ahead: int) -> bool:
        """Whether all of it, or a piece, was given out."""
        now = self.world.now
        server = self._idle[-1]
        whole = remainder.request.tokens <= WHOLE_TOKENS
        idle_speed = sum(each.tokens_per_s for each in self._idle)
        share = remainder.left * server.tokens_per_s / idle_speed
        piece = remainder.left if whole else int(max(PIECE_TOKENS, min(share, server.tokens_per_s * PIECE_S)))
        piece = min(piece, remainder.left)
        takes_s = server.fixed_s + piece / server.tokens_per_s
        busy = [each for each in self.servers if each.busy and each.tokens_per_s > server.tokens_per_s]
        if busy:
            soonest_s = min(each.ends_at - now + each.fixed_s + piece / each.tokens_per_s for each in busy)
            running = sum((each.ends_at - now) * each.tokens_per_s for each in self.servers if each.busy)
            if takes_s > max(soonest_s, (running + ahead + remainder.left) / self._speed):
                return False
        self._idle.pop()
        remainder.left -= piece
        remainder.out += 1
        if remainder.left:
            self._wait(remainder)
        elif now > remainder.since:
            self.waited.append((remainder.since, now))
        server.ask(piece, lambda failure: self._done(remainder, piece, server, failure))
        return True

    def _done(self, remainder: "_Remainder", piece: int, server: SimServer, failure: NodeFailure | None) -> None:
        remainder.out -= 1
        if failure is not None:
            waits = remainder.left > 0
            remainder.left += piece
            if not waits:
                self._wait(remainder)
        elif not remainder.left and not remainder.out:
            self._end(remainder.request, well=True)
        self._back(server)
        self._give()

    def _back(self, server: SimServer) -> None:
        """It may get work again, once it lives."""
        if server.alive:
            bisect.insort(self._idle, server, key=lambda each: each.tokens_per_s)
            self._give()
        else:
            self.world.call_later(LOOKS_EVERY_S, lambda: self._back(server))


WHOLE_TOKENS, PIECE_TOKENS, PIECE_S = 1_024, 512, 0.1  # an oracle's pieces
LOOKS_EVERY_S = 0.05  # whether a dead node lives again


@dataclass(eq=False, slots=True)
class _Remainder:
    request: Request
    left: int  # tokens that no node was given
    out: int  # pieces at nodes
    since: float
