"""Does a process that owes an answer work on it, wait for a CPU, or is it stuck? Judged by what the kernel says of it.

A clock cannot tell: a process that gets no CPU is as late as one that hangs, and to replace it only makes it later.
All time is counted in *looks*, each of which our own event loop has to come round for: when we are late ourselves,
that is no evidence against anybody. Nothing here reads or waits: `embedmesh.engine.kernel` takes the samples.
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from embedmesh.rules.nodes import Shortage

LOOK_S = 0.2  # between two looks at a process that has not answered yet: most batches are done before the first
BUSY = 0.5  # of a look's time: who runs so much is not short of CPU
IDLE = 0.1  # who wants no more than this is doing nothing; a hang that polls wants a few per cent
STARVED_MIN_S = 1.0  # of starving are worth a word,
STARVED_FOR_S = 10.0  # which holds for so long
DISK_S = 30.0  # a disk, or swapping, may be so long without an answer


class Sample(NamedTuple):
    """A process at one moment. Times in seconds since it began; `at` on the monotonic clock.

    `states` has one letter a thread, as the kernel writes them: R runs or could run, S sleeps, D waits for a disk,
    T or t was stopped. `waited_s` is the time that threads could have run and did not, as far as it is over;
    `throttled` how often the quota of its group has stopped it. Both are 0 where the kernel does not say.
    """

    at: float
    states: str
    ran_s: float
    waited_s: float = 0.0
    throttled: int = 0


class Doing(Enum):
    """What a process did between two looks."""

    WORKING = "working"
    STARVED = "starved"  # it could have run, and hardly did
    AT_DISK = "at the disk"
    STILL = "still"  # it sleeps, and wants nothing
    STOPPED = "stopped"


class RateLimit(NamedTuple):
    """What an answer may take before its process is stuck: CPU time, time without doing anything, and, where the
    kernel tells nothing, time on the clock. Seconds."""

    cpu_s: float
    still_s: float
    clock_s: float

    def times(self, factor: float) -> "RateLimit":
        """So many times as much of each."""
        return RateLimit(self.cpu_s * factor, self.still_s * factor, self.clock_s * factor)


def judge(before: Sample, now: Sample) -> Doing:
    """What it did from one sample to the next."""
    span_s = max(now.at - before.at, 1e-3)
    ran, waited = (now.ran_s - before.ran_s) / span_s, (now.waited_s - before.waited_s) / span_s
    if "T" in now.states or "t" in now.states:
        return Doing.STOPPED
    if ran >= BUSY:
        return Doing.WORKING
    if "R" in now.states or waited > IDLE:
        return Doing.STARVED
    if "D" in now.states:
        return Doing.WORKING if ran > 0 else Doing.AT_DISK
    return Doing.WORKING if ran > IDLE else Doing.STILL


class Starvation:
    """Whether a worker is starved now, and how long it was in all."""

    def __init__(self, monotonic: Callable[[], float], on_begin: Callable[[Shortage], None]) -> None:
        self._monotonic = monotonic
        self._on_begin = on_begin
        self._shortage: Shortage = ""
        self._until = float("-inf")
        self._of_late_s = 0.0
        self.seconds = 0.0

    @property
    def shortage(self) -> Shortage:
        """What it is short of, or was a moment ago: most batches are over before they are looked at. Else ""."""
        return self._shortage if self._of_late_s >= STARVED_MIN_S and self._monotonic() < self._until else ""

    def note(self, seconds: float, shortage: Shortage) -> None:
        """It was starved for so long, just now."""
        before = self.shortage
        if self._monotonic() >= self._until:
            self._of_late_s = 0.0
        self._until = self._monotonic() + STARVED_FOR_S
        self._of_late_s += seconds
        self.seconds += seconds
        self._shortage = shortage
        if not before and self.shortage:
            self._on_begin(self.shortage)


class Watch:
    """Looks at a process from when it was asked until it answers."""

    def __init__(self, allowed: RateLimit, on_starved: Callable[[float, Shortage], None]) -> None:
        """`on_starved` is told at each look for how many seconds it was starved since the last, and of what."""
        self._on_starved = on_starved
        self._allowed = allowed
        self._first: Sample | None = None
        self._last: Sample | None = None
        self._idle: Doing | None = None  # what it has done, other than working, in all of the last looks
        self._idle_looks = 0
        self.blind_looks = 0  # at which the kernel told nothing

    def look(self, sample: Sample | None) -> str | None:
        """One more look, a LOOK_S after the last or later. What is wrong, to go on after "the engine"; or None."""
        if sample is None:
            self.blind_looks += 1
            return "did not answer in time" if self.blind_looks * LOOK_S > self._allowed.clock_s else None
        if self._first is None or self._last is None:
            self._first = self._last = sample
            return None
        doing = judge(self._last, sample)
        if doing is Doing.STARVED:
            self._on_starved(sample.at - self._last.at, "quota" if sample.throttled > self._last.throttled else "cpu")
        self._last = sample
        spent_s = sample.ran_s - self._first.ran_s
        if spent_s > self._allowed.cpu_s:
            return f"spins: it used {spent_s:.1f} s of CPU time for what may take {self._allowed.cpu_s:.1f} s"
        self._idle_looks = self._idle_looks + 1 if doing is self._idle else 1
        self._idle = doing
        idle_s = self._idle_looks * LOOK_S
        match doing:
            case Doing.STOPPED if idle_s >= self._allowed.still_s:
                return "was stopped from outside (SIGSTOP, or a debugger)"
            case Doing.STILL if idle_s >= self._allowed.still_s:
                return "hangs: it sleeps, and uses no CPU time"
            case Doing.AT_DISK if idle_s >= max(DISK_S, self._allowed.still_s):
                return "hangs: it waits for a disk that does not answer"
        return None
