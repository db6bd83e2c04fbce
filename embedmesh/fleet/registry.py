"""The nodes a gateway knows: their states, their load, what they serve. Decides; never waits.

The table `embedmesh.rules.nodes.MOVES` holds a node's states. A node gets work once it has given a verified embedding.
After an ejection it needs another one, and is on trial: it gets one part at a time, and its first failure ejects it
again, each time for longer.
"""

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from embedmesh.fleet.load import Load
from embedmesh.rules.confidential import SignedKeys
from embedmesh.rules.errors import (
    NodeBusy,
    NodeFailure,
    NodeTooSlow,
    NodeUnreachable,
    NotAsAsked,
    UpstreamRefused,
    WrongAnswer,
)
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.nodes import (
    EJECTED_SHARE_MAX,
    FAILURES_TO_EJECT,
    FAILURES_TO_EJECT_LAST,
    FORGIVEN_S,
    MOVES,
    OUT_FIRST_S,
    OUT_MAX_S,
    PROBE_EVERY_S,
    PROBE_GRACE_S,
    RECENT_ANSWERS,
    RECENT_FAILURES_TO_EJECT,
    RECENT_WRONG,
    TRIAL_ANSWERS,
    WRONG_TO_QUARANTINE,
    Check,
    NodeEvent,
    NodeState,
    Reason,
)
from embedmesh.rules.ports import Clock

log = logging.getLogger("embedmesh.fleet")

UPSTREAM = "upstream"  # the kind of a node that is a server of another make
IN_FLIGHT_PARTS_MAX = 64  # on one node: more than an engine batches together; each needs a connection
PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0  # of a node that answered 429 or 503, whatever its Retry-After
NO_PROBES_MAX_S = 60.0  # of a server's Retry-After, in which it is not probed; it can ask again
READY = NodeState.READY  # an enum's member is slow to look up
PENALTY_FIRST_S, PENALTY_MAX_S = 0.25, 8.0  # added to the expected time of a node in doubt
DOUBT = (1, 4, 16, 64, 256)  # right answers that end the doubt, by recent failures: from one probe to a minute's work


@dataclass(eq=False)
class Node:
    """One node as this gateway sees it. `models` are ids of the catalogue that it serves with the right digest."""

    node_id: str
    address: str
    kind: str = "local"  # local, remote, dialled or UPSTREAM
    trusted: bool = False  # its vectors decide when two other nodes disagree
    inputs_max: int = REQUEST_INPUTS_MAX  # what it takes in one call
    in_flight_max: int = IN_FLIGHT_PARTS_MAX
    weight: float = 1.0
    asks: dict[str, int] = field(default_factory=dict)  # by model: nano-USD per million tokens
    generates: bool = False  # chat and the like: what fails for one caller may do for others
    reads_ids: bool = True  # whether it takes token ids of the model's own vocabulary, or texts only
    state: NodeState = NodeState.UNPROVEN
    draining: bool = False
    models: frozenset[str] = frozenset()
    load: Load = field(default_factory=Load)
    failures_in_a_row: int = 0
    doubt: int = 0  # right answers still needed, after failures, before it is treated like the others
    trial: int = 0  # right answers still needed before it gets more than one part at a time
    paused_until: float = 0.0  # on the monotonic clock, as all times here
    spotless: bool = False  # no failure counts any more: a right answer changes nothing but its own time
    fresh_answers: int = 0  # since it was admitted or readmitted: canaries check the first ones more often
    generation: int = 0  # see `Registry.generation`
    ejections: int = 0  # of late
    out_until: float = 0.0
    ejected_at: float = float("-inf")
    probe_every_s: float = PROBE_EVERY_S  # while it is well and idle
    leave_alone_until: float = 0.0  # no probes until then: it sent Retry-After, or was wrong again
    last_right_answer: float | None = None
    last_failure: Reason | None = None  # kept after the node has recovered
    last_failed: float | None = None
    small_id: int = 0  # its number in the store; a local one has none
    keys: SignedKeys | None = None  # for confidential requests, as it sends them: not verified
    shortage: str = ""  # why its engine lacks CPU, by its own report: see SHORTAGES
    threads: str = ""  # how many its engines have, and why, in its own words
    counts: Counter[str] = field(default_factory=Counter)  # answers, tokens, hedges, canaries, receipts, unreached
    failed: Counter[Check] = field(default_factory=Counter)  # attempts and probes, by check; the unreached, too
    sent_away: Counter[tuple[NodeState, Check]] = field(default_factory=Counter)  # ejections and quarantines
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT_ANSWERS))  # whether attempts failed
    wrong: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT_WRONG))  # whether answers were wrong

    def start(self, now: float, small: bool, tokens: int = 0) -> tuple[float, bool, float]:
        """Of one more part with these tokens: when it would begin, whether it may have that now, when it would be done.

        Seconds from now. More tokens take `per_token_s` each.
        """
        load = self.load
        begins_s, room = load.start(now, small, 1 if self.trial else self.in_flight_max)
        if now < self.paused_until:  # or all would wait for a full node
            begins_s, room = max(begins_s, self.paused_until - now), False
        done_s = begins_s + load.fit.fixed_s + tokens * load.fit.per_token_s
        return begins_s, room, done_s + self.penalty_s if self.doubt else done_s

    @property
    def penalty_s(self) -> float:
        """Added to its expected time: a node that fails fast would look idle."""
        if not self.doubt:
            return 0.0
        return float(min(PENALTY_FIRST_S * 2 ** max(sum(self.recent) - 1, 0), PENALTY_MAX_S))


class Registry:
    """All nodes, by id. Parts that need to know of changes append a callback when they are constructed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._nodes: dict[str, Node] = {}
        self.last_ready: dict[str, list[Node]] = {}  # by model: what `ready` has said since anything changed
        self._served: set[str] = set()  # ids of the catalogue's models that any node has ever been known to serve
        self._generations = itertools.count()
        self.on_change: list[Callable[[], None]] = []
        """Called when the set of nodes that get work has changed."""
        self.on_quarantine: list[Callable[[Node, str], None]] = []
        """Called with each node that is quarantined, and why."""
        self.on_readmit: list[Callable[[Node], None]] = []
        """Called with each node whose quarantine has ended."""

    def add(self, node: Node) -> Node:
        """Add a node. It replaces the node of that id."""
        node.generation = next(self._generations)
        self._nodes[node.node_id] = node
        self._changed()
        return node

    def remove(self, node_id: str) -> None:
        """Forget a node. Its running attempts go on."""
        if self._nodes.pop(node_id, None) is not None:
            self._changed()

    def find(self, node_id: str) -> Node | None:
        """The node of that id."""
        return self._nodes.get(node_id)

    def generation(self, node_id: str) -> int | None:
        """Generation counter: changes when the node is quarantined or re-added. None while it is quarantined."""
        node = self._nodes.get(node_id)
        if node is None or node.state is NodeState.QUARANTINED:
            return None
        return node.generation

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))

    def ready(self, model_id: str) -> list[Node]:
        """The nodes that get work for this model."""
        ready = self.last_ready.get(model_id)
        if ready is None:
            ready = self.last_ready[model_id] = [
                node
                for node in self._nodes.values()
                if node.state is NodeState.READY and not node.draining and model_id in node.models
            ]
        return ready

    def may_come(self, model_id: str) -> bool:
        """Whether waiting for this model may help: a node has served it, or may yet report that it does."""
        return (
            model_id in self._served
            or not self._nodes
            or any(not node.models or model_id in node.models for node in self._nodes.values())
        )

    def drain(self, node: Node, draining: bool = True) -> None:
        """Stop giving a node work, or resume."""
        node.draining = draining
        self._changed()

    def answered_right(self, node: Node, models: Iterable[str] | None = None, now: float | None = None) -> None:
        """A node gave a verified embedding, the only way to become ready. `models` are what a probe found."""
        now = now or self._clock.monotonic()
        node.failures_in_a_row = 0
        if node.doubt:
            node.doubt -= 1
        node.last_right_answer = now
        node.wrong.append(False)
        if models is None:
            node.recent.append(False)  # a caller's request: a node that answers only probes stays in doubt for longer
        else:
            self.serves(node, models)
        if node.state is READY:
            if node.trial:
                node.trial -= 1
        elif now >= node.out_until or not self._others_work(node):
            node.trial = TRIAL_ANSWERS if node.state is NodeState.EJECTED else 0
            node.recent.clear()
            node.doubt = 0
            self._move(node, NodeEvent.RIGHT_ANSWER)
        lately = node.doubt or node.trial or any(node.recent) or any(node.wrong)
        node.spotless = node.state is READY and not lately

    def serves(self, node: Node, models: Iterable[str]) -> None:
        """Note what a node reports to serve, which is not yet proven."""
        self._served.update(models := tuple(models))
        if node.models != (served := frozenset(models)):
            node.models = served
            self._changed()

    def failed(self, node: Node, failure: NodeFailure, *, by_probe: bool = False) -> None:
        """Note that an attempt or a probe failed.

        Refused load does not count against the node. Nor does a caller's request that an upstream server calls invalid,
        or answers without all that was asked for: no caller shall send it away. Nor does a 5xx of one that generates:
        many of them say that of a conversation whose turns, or a grammar, they cannot follow. A probe tells.
        """
        now = self._clock.monotonic()
        node.spotless = False
        node.failed[failure.check] += 1
        node.counts["unreached"] += isinstance(failure, NodeUnreachable) and node.last_right_answer is None
        node.leave_alone_until = max(node.leave_alone_until, now + min(failure.retry_after_s, NO_PROBES_MAX_S))
        if not isinstance(failure, NodeBusy) or node.last_failure is None or node.last_failure.check is Check.BUSY:
            node.last_failure, node.last_failed = Reason(failure.check, failure.message), now
        if isinstance(failure, NodeBusy):
            node.paused_until = now + min(max(failure.retry_after_s, PAUSE_MIN_S), PAUSE_MAX_S)
            return
        of_request = isinstance(failure, UpstreamRefused | NotAsAsked)
        if (of_request or (node.generates and failure.check is Check.STATUS_5XX)) and not by_probe:
            node.doubt = max(node.doubt, 1)
            return
        node.failures_in_a_row += 1
        node.recent.append(True)
        node.doubt = DOUBT[min(sum(node.recent), len(DOUBT)) - 1]
        node.wrong.append(isinstance(failure, WrongAnswer) and not _is_a_page(node, failure))
        bad = (
            node.trial > 0
            or node.failures_in_a_row >= FAILURES_TO_EJECT
            or sum(node.recent) >= RECENT_FAILURES_TO_EJECT
        )
        if isinstance(failure, NodeUnreachable):
            self._move(node, NodeEvent.UNREACHABLE)
        elif sum(node.wrong) >= WRONG_TO_QUARANTINE and not node.trusted:
            self.quarantine(
                node, f"{WRONG_TO_QUARANTINE} wrong answers of late, at last: {failure.message}", failure.check
            )
        elif isinstance(failure, NodeTooSlow) and self._is_the_only_one(node):
            pass  # slow answers are better than none
        elif bad and self._may_eject(node):
            self._move(node, NodeEvent.FAILURES)

    def quarantine(self, node: Node, why: str, check: Check | None = None) -> None:
        """Give a node no work until it is readmitted: its vectors are wrong. Operators see the `check` and `why`.

        Without a check, `why` is the whole reason as another gateway has stored it.
        """
        if node.state is not NodeState.QUARANTINED:
            reason = Reason(check, why) if check is not None else Reason.read(why)
            node.last_failure, node.last_failed = reason, self._clock.monotonic()
            self._move(node, NodeEvent.WRONG_ANSWERS)
            for call in self.on_quarantine:
                call(node, str(reason))

    def readmit(self, node: Node) -> None:
        """End a quarantine, by an operator or a run of right answers. The node still has to pass one probe."""
        node.wrong.clear()
        node.recent.clear()
        node.failures_in_a_row = node.doubt = 0
        node.ejections = 0
        node.fresh_answers = 0
        node.out_until = node.leave_alone_until = 0.0
        self._move(node, NodeEvent.READMITTED)
        for call in self.on_readmit:
            call(node)

    def seconds_since_right_answer(self) -> float | None:
        """Since the last verified embedding of any node; None before the first."""
        times = [node.last_right_answer for node in self if node.last_right_answer is not None]
        return self._clock.monotonic() - max(times) if times else None

    def proven(self, node: Node, within_s: float = 0.0) -> bool:
        """Whether its last right answer is no older than its probe interval, or than `within_s`.

        After failures the interval is that of our own nodes.
        """
        every_s = PROBE_EVERY_S if node.failures_in_a_row else node.probe_every_s
        last = node.last_right_answer
        return last is not None and self._clock.monotonic() - last <= max(within_s, every_s + PROBE_GRACE_S)

    def _may_eject(self, node: Node) -> bool:
        """At most EJECTED_SHARE_MAX of the nodes are ejected for slowness and errors.

        Beyond that, only a node that has not answered for a while is ejected, and only while another one works.
        """
        out = sum(each.state is NodeState.EJECTED for each in self if each is not node)
        if out + 1 <= EJECTED_SHARE_MAX * len(self._nodes):
            return True
        return node.failures_in_a_row >= FAILURES_TO_EJECT_LAST and any(
            self._works(each) for each in self if each is not node
        )

    def _is_the_only_one(self, node: Node) -> bool:
        """Whether it serves a model that no other node serves."""
        return not all(any(each is not node for each in self.ready(model_id)) for model_id in node.models)

    def _others_work(self, node: Node) -> bool:
        """Whether other nodes work for each of its models, so that it may stay out."""
        return all(
            any(self._works(each) for each in self.ready(model_id) if each is not node) for model_id in node.models
        )

    def _works(self, node: Node) -> bool:
        return node.state is NodeState.READY and not node.draining and not node.doubt and self.proven(node)

    def _move(self, node: Node, event: NodeEvent) -> None:
        before = node.state
        node.spotless = False
        node.state = MOVES[before, event]
        if node.state is before:
            return
        if node.state is NodeState.QUARANTINED:
            node.generation = next(self._generations)
        if node.state is NodeState.EJECTED:
            now = self._clock.monotonic()
            node.ejections = node.ejections + 1 if now - node.ejected_at < FORGIVEN_S else 1
            node.ejected_at = now
            wait_s = OUT_FIRST_S * 2 ** (node.ejections - 2) if node.ejections > 1 else 0.0
            node.out_until = now + min(wait_s, OUT_MAX_S)
            log.warning("node %s is ejected: %s", node.node_id, node.last_failure, extra={"node": node.node_id})
        reason = node.last_failure
        if node.state in (NodeState.EJECTED, NodeState.QUARANTINED) and reason is not None and reason.check is not None:
            node.sent_away[node.state, reason.check] += 1
        self._changed()

    def _changed(self) -> None:
        self.last_ready.clear()
        for call in self.on_change:
            call()


def _is_a_page(node: Node, failure: NodeFailure) -> bool:
    """Whether an upstream answered no vectors at all: a proxy's error page says that the server is away."""
    return node.kind == UPSTREAM and failure.check in (Check.FORM, Check.HTTP)
