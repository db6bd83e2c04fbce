"""Nodes, from the inside: what they are given takes time.

Two kinds. `Fifo` does one part after another, as a plain server would. `Turns` does what our own node does
(`embedmesh.engine.plan`): batches of at most so many tokens, short calls together, and in turns with bulk ones.
Both say when they were busy and what waited in them, so that somebody else can judge the chooser.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from bench.sim.world import World
from embedmesh.engine.plan import BATCH_COST_TOKENS, BATCH_TOKENS_MAX
from embedmesh.rules.errors import NodeBroke, NodeFailure, NodeUnreachable

FIXED_S = 0.002  # what a part costs besides its tokens: HTTP, and the start of a batch
WIRE_S = 0.000_5  # one way, to a machine nearby
NOISE = 0.10  # sigma of the lognormal factor on each part's time; its mean is 1
NOISES = 8_192  # drawn once: every node walks through them from a place of its own

Done = Callable[[NodeFailure | None], None]


class Noise:
    """Factors on the time of parts: the n-th part of a node has the same one whoever chose that node."""

    def __init__(self, seed: int, sigma: float = NOISE) -> None:
        dice = np.random.default_rng([seed, 1])
        self._factors: list[float] = np.exp(dice.normal(-(sigma**2) / 2, sigma, NOISES)).tolist()

    def moments(self) -> tuple[float, float]:
        """The mean, and the mean of the square, of those that were drawn."""
        return fmean(self._factors), fmean(factor * factor for factor in self._factors)

    def factor(self, node: int, part: int) -> float:
        return self._factors[(node * 977 + part) % NOISES]


@dataclass(eq=False, slots=True)
class Job:
    """A part at a node."""

    tokens: int
    there_at: float
    done: Done
    left: int = 0  # tokens that no batch has taken yet
    began: float = -1.0
    given_up: bool = False


@dataclass
class Log:
    """When who was busy, and between what times something waited. Read once, at the end."""

    busy: list[tuple[float, float, int]] = field(default_factory=list)  # from, until, node
    waited: list[tuple[float, float]] = field(default_factory=list)


class Server:
    """What both kinds share: being slow, dying, coming back."""

    interleaves = False  # whether short calls pass bulk ones: nodes of ours say so, and the scheduler knows

    def __init__(
        self,
        world: World,
        number: int,
        tokens_per_s: float,
        noise: Noise,
        log: Log,
        *,
        fixed_s: float = FIXED_S,
        wire_s: float = WIRE_S,
    ) -> None:
        self.number = number
        self.tokens_per_s = tokens_per_s
        self.fixed_s = fixed_s
        self.alive = True
        self.slowness = 1.0
        self.ends_at = 0.0  # of what runs
        self._world = world
        self._noise = noise
        self._log = log
        self._wire_s = wire_s
        self._begun = 0
        self._began_at = 0.0
        self._run = 0  # which event ends what runs: one that was overtaken says nothing

    def ask(self, tokens: int, done: Done) -> Job:
        """A part comes; `done` is called when its answer, or the news of its failure, is back."""
        job = Job(tokens, self._world.now + self._wire_s, done, tokens)
        if self.alive:
            self._take(job)
        else:
            self._world.call_later(2 * self._wire_s, lambda: done(NodeUnreachable("refused")))
        return job

    def give_up(self, job: Job) -> None:
        """Nobody wants its answer any more: what has not run need not."""
        raise NotImplementedError

    def slow_down(self, factor: float) -> None:
        """From now on everything takes so many times as long as at first, what runs included."""
        left = max(0.0, self.ends_at - self._world.now) * factor / self.slowness
        self.slowness = factor
        if self.busy:
            self._ends(self._world.now + left)

    def die(self) -> None:
        """What it had fails at once, what comes is refused."""
        lost = self._lose()
        self.alive = False
        self._run += 1
        for job in lost:
            job.done(NodeBroke("reset"))

    def come_back(self) -> None:
        self.alive = True

    def _ends(self, at: float) -> None:
        """What runs ends then."""
        self.ends_at = at
        self._run = run = self._run + 1

        def ended() -> None:
            if run == self._run:
                self._ended()

        self._world.call_at(max(at + self._wire_s, self._world.now), ended)

    def _begin(self, at: float, seconds: float) -> None:
        self._began_at = at
        self._begun += 1
        self._ends(at + seconds * self.slowness * self._noise.factor(self.number, self._begun))

    def _note(self) -> None:
        self._log.busy.append((self._began_at, self.ends_at, self.number))

    @property
    def busy(self) -> bool:
        raise NotImplementedError

    def _take(self, job: Job) -> None:
        raise NotImplementedError

    def _ended(self) -> None:
        raise NotImplementedError

    def _lose(self) -> list[Job]:
        raise NotImplementedError


class Fifo(Server):
    """One part after another."""

    def __init__(self, world: World, number: int, tokens_per_s: float, noise: Noise, log: Log, **costs: float) -> None:
        super().__init__(world, number, tokens_per_s, noise, log, **costs)
        self._running: Job | None = None
        self._queue: deque[Job] = deque()

    @property
    def busy(self) -> bool:
        return self._running is not None

    def give_up(self, job: Job) -> None:
        job.given_up = True
        if job is self._running:
            self.ends_at = self._world.now
            self._run += 1
            self._ended()

    def _take(self, job: Job) -> None:
        if self._running is None:
            self._start(job, job.there_at)
        else:
            self._queue.append(job)

    def _start(self, job: Job, at: float) -> None:
        self._running = job
        job.began = at
        if at > job.there_at:
            self._log.waited.append((job.there_at, at))
        self._begin(at, self.fixed_s + job.tokens / self.tokens_per_s)

    def _ended(self) -> None:
        job, at = self._running, self.ends_at
        assert job is not None
        self._note()
        self._running = None
        while self._queue and self._running is None:
            following = self._queue.popleft()
            if not following.given_up:
                self._start(following, max(at, following.there_at))
        if not job.given_up:
            job.done(None)

    def _lose(self) -> list[Job]:
        lost = [job for job in self._queue if not job.given_up]
        self._queue.clear()
        if self._running is not None:
            self.ends_at = min(self.ends_at, self._world.now)
            self._note()
            lost.insert(0, self._running)
            self._running = None
        return lost


class Turns(Server):
    """Batches; short calls run together, and in turns with bulk ones, of which the oldest leads."""

    interleaves = True

    def __init__(self, world: World, number: int, tokens_per_s: float, noise: Noise, log: Log, **costs: float) -> None:
        super().__init__(world, number, tokens_per_s, noise, log, **costs)
        self._short: deque[Job] = deque()
        self._bulk: deque[Job] = deque()
        self._batch: list[Job] = []
        self._last_was_bulk = False

    @property
    def busy(self) -> bool:
        return bool(self._batch)

    def give_up(self, job: Job) -> None:
        job.given_up = True
        for line in (self._short, self._bulk):
            if job in line:
                line.remove(job)

    def _take(self, job: Job) -> None:
        job.there_at += self.fixed_s  # is not the engine's time: others' batches run meanwhile
        self._world.call_at(job.there_at, lambda: self._there(job))

    def _there(self, job: Job) -> None:
        if not self.alive:
            job.done(NodeBroke("reset"))
        elif not job.given_up:
            (self._bulk if job.tokens > BATCH_TOKENS_MAX else self._short).append(job)
            if not self._batch:
                self._next(self._world.now)

    def _next(self, at: float) -> None:
        line, others = self._bulk, self._short
        if others and (not line or self._last_was_bulk):
            line, others = others, line
        self._last_was_bulk = line is self._bulk
        if line:
            at = max(at, line[0].there_at)
        left = BATCH_TOKENS_MAX
        while line and left and (not self._batch or line is self._bulk or line[0].left <= left):
            job = line[0]
            tokens = min(job.left, left)
            self._batch.append(job)
            left -= tokens
            job.left -= tokens
            if job.began < 0:
                job.began = at
                if at > job.there_at:
                    self._log.waited.append((job.there_at, at))
            if job.left:
                break
            line.popleft()
        if self._batch:
            self._begin(at, (BATCH_TOKENS_MAX - left + BATCH_COST_TOKENS) / self.tokens_per_s)

    def _ended(self) -> None:
        self._note()
        finished = [job for job in self._batch if not job.left and not job.given_up]
        self._batch = []
        self._next(self.ends_at)
        for job in finished:
            job.done(None)

    def _lose(self) -> list[Job]:
        if self._batch:
            self.ends_at = min(self.ends_at, self._world.now)
            self._note()
        running = [job for job in self._batch if not job.left]
        lost = [job for job in (*running, *self._short, *self._bulk) if not job.given_up]
        for line in (self._short, self._bulk):
            line.clear()
        self._batch = []
        return lost
