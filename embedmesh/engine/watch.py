"""Decides whether a process that owes an answer works, waits for a CPU, or is stuck, from what the kernel says of it.

A clock cannot tell: a process that gets no CPU is as late as one that hangs, and to replace it only makes it later.
All time is counted in *looks*, each of which our own event loop has to come round for: when we are late ourselves,
that is no evidence against the process. Nothing here reads or waits: `embedmesh.engine.kernel` takes the samples.
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from embedmesh.rules.nodes import Shortage

WATCH_LOOK_S = 0.2  # between two looks at a process that has not answered yet: most batches are done before the first
BUSY_SHARE = 0.5  # of a look's time: a process that runs this much is not short of CPU
IDLE_SHARE = 0.1  # a process that wants no more than this does nothing; a hang that polls wants a few per cent
STARVED_MIN_S = 1.0  # shorter starvation is not reported
STARVED_FOR_S = 10.0  # how long a report holds: most batches are over before they are looked at
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


class TimeAllowed(NamedTuple):
    """What an answer may take before its process is stuck, in seconds: CPU time, time without doing anything, and time
    on the clock where the kernel says nothing."""

    cpu_s: float
    still_s: float
    clock_s: float

    def times(self, factor: float) -> "TimeAllowed":
        """Each multiplied by a factor."""
        return TimeAllowed(*(seconds * factor for seconds in self))


def judge(before: Sample, now: Sample) -> Doing:
    """What it did from one sample to the next."""
    span_s = max(now.at - before.at, 1e-3)
    ran, waited = (now.ran_s - before.ran_s) / span_s, (now.waited_s - before.waited_s) / span_s
    if "T" in now.states or "t" in now.states:
        return Doing.STOPPED
    if ran >= BUSY_SHARE:
        return Doing.WORKING
    if "R" in now.states or waited > IDLE_SHARE:
        return Doing.STARVED
    if "D" in now.states:
        return Doing.WORKING if ran > 0 else Doing.AT_DISK
    return Doing.WORKING if ran > IDLE_SHARE else Doing.STILL


class Starvation:
    """Whether a worker is starved now, and how long it was in all."""

    def __init__(self, monotonic: Callable[[], float], on_begin: Callable[[Shortage], None]) -> None:
        self._monotonic = monotonic
        self._on_begin = on_begin
        self._shortage: Shortage = ""
        self._until = float("-inf")
        self._recent_s = 0.0
        self.seconds = 0.0

    @property
    def shortage(self) -> Shortage:
        """What it is short of, or was a moment ago; "" where it is not starved."""
        return self._shortage if self._recent_s >= STARVED_MIN_S and self._monotonic() < self._until else ""

    def note(self, seconds: float, shortage: Shortage) -> None:
        """Add seconds of starvation that have just ended."""
        before = self.shortage
        if self._monotonic() >= self._until:
            self._recent_s = 0.0
        self._until = self._monotonic() + STARVED_FOR_S
        self._recent_s += seconds
        self.seconds += seconds
        self._shortage = shortage
        if not before and self.shortage:
            self._on_begin(self.shortage)


class Watch:
    """Looks at a process from a message to its answer."""

    def __init__(self, allowed: TimeAllowed, on_starved: Callable[[float, Shortage], None]) -> None:
        """`on_starved` gets, at each look, the seconds that it was starved since the last, and what of."""
        self._on_starved = on_starved
        self._allowed = allowed
        self._first: Sample | None = None
        self._last: Sample | None = None
        self._doing: Doing | None = None  # in all of the last `_same_looks` looks
        self._same_looks = 0
        self.blind_looks = 0  # at which the kernel said nothing

    def look(self, sample: Sample | None) -> str | None:
        """One more look, a WATCH_LOOK_S after the last or later. What is wrong (see WorkerBroke), or None."""
        if sample is None:
            self.blind_looks += 1
            return "did not answer in time" if self.blind_looks * WATCH_LOOK_S > self._allowed.clock_s else None
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
        self._same_looks = self._same_looks + 1 if doing is self._doing else 1
        self._doing = doing
        same_s = self._same_looks * WATCH_LOOK_S
        match doing:
            case Doing.STOPPED if same_s >= self._allowed.still_s:
                return "was stopped from outside (SIGSTOP, or a debugger)"
            case Doing.STILL if same_s >= self._allowed.still_s:
                return "hangs: it sleeps, and uses no CPU time"
            case Doing.AT_DISK if same_s >= max(DISK_S, self._allowed.still_s):
                return "hangs: it waits for a disk that does not answer"
        return None


class LazyWatch:
    """A Watch that is made at its first look, as most batches are done before."""

    def __init__(self, make: Callable[[], Watch]) -> None:
        self._make = make
        self._watch: Watch | None = None

    @property
    def blind_looks(self) -> int:
        """At which the kernel said nothing."""
        return 0 if self._watch is None else self._watch.blind_looks

    def look(self, sample: Sample | None) -> str | None:
        """See Watch."""
        if self._watch is None:
            self._watch = self._make()
        return self._watch.look(sample)
