"""What a run found, in seconds and shares, and what it was to reach."""

from collections.abc import Sequence

import msgspec
import numpy as np

from bench.rig.command import wrong
from bench.rig.figures import Spread, Target, missed
from bench.sim.servers import FIXED_S, Log
from bench.sim.workload import ACCOUNTS, NOISY, SMALL, Request

WARM = 0.1  # of the requests: they only fill the queues
ERRORS_MAX, OFF_MAX = 3.0, 0.03  # standard errors, or a share of what is right: the larger of the two is forgiven


class ResponseTimes(msgspec.Struct, frozen=True):
    """Response times in seconds."""

    mean: float
    p50: float
    p99: float
    p999: float

    @classmethod
    def of(cls, seconds: np.ndarray) -> "ResponseTimes":
        if not len(seconds):
            return cls(0.0, 0.0, 0.0, 0.0)
        return cls(float(seconds.mean()), *(float(each) for each in np.percentile(seconds, [50, 99, 99.9])))


class SimCell(msgspec.Struct, frozen=True):
    """One contender in one scenario at one load.

    `fairness` is the p99 of the light accounts' small requests over that of the noisy one's. `jain` is Jain's index
    over the accounts' mean slowdowns: 1 where all are slowed down alike. `utilisation` and `wasted` are shares of the
    fleet's speed: busy, and idle while something waited anywhere. `cpu_us` is our own time to decide, a request.
    """

    scenario: str
    load: int
    contender: str
    all: ResponseTimes
    small: ResponseTimes
    fairness: float
    jain: float
    utilisation: float
    wasted: float
    failed: int
    requests: int
    cpu_us: float
    took_s: float


class Queue(msgspec.Struct, frozen=True):
    """One queue, by the simulator and by the formula: mean waiting times in seconds, the first with its standard error.

    `off_s` is the largest difference of any request's waiting time to Lindley's recursion over the same arrivals.
    """

    found_s: float
    error_s: float
    right_s: float
    off_s: float

    @property
    def ok(self) -> bool:
        allowed_s = max(ERRORS_MAX * self.error_s, OFF_MAX * self.right_s)
        return abs(self.found_s - self.right_s) <= allowed_s and self.off_s < 1e-6


class Figures(msgspec.Struct, frozen=True):
    """All of it. `queue` and `same_twice` say whether the simulator can be believed."""

    seed: int
    cells: list[SimCell]
    queue: Queue
    same_twice: bool
    targets: list[Target]

    def find(self, scenario: str, load: int, contender: str) -> SimCell | None:
        """That one, if it was run."""
        return _find(self.cells, scenario, load, contender)

    @property
    def broken(self) -> list[str]:
        """What fails the run."""
        checks: dict[str, object] = {
            "one queue differs from the formula": not self.queue.ok,
            "the same seed gave other figures": not self.same_twice,
        }
        return wrong(checks) + missed(self.targets)


RATIOS = {("4 very unequal", "round robin"): 4.0, ("4 very unequal", "two choices"): 2.0}  # at 70 %
NOT_WORSE = 1.05  # than least requests, at 90 %, anywhere


def targets(cells: Sequence[SimCell], scenarios: Sequence[str], ours: str) -> list[Target]:
    """Those that can be judged by what was run."""
    found = []

    def ratio(words: str, scenario: str, load: int, one: str, other: str, bound: float, at_least: bool) -> None:
        above, below = (_find(cells, scenario, load, who) for who in (one, other))
        if above is not None and below is not None:
            spread = Spread.of([above.all.p99 / below.all.p99])
            found.append(Target(f"p99 of {words}, {scenario}, {load} %", bound, at_least, spread))

    for (scenario, theirs), bound in RATIOS.items():
        ratio(f"{theirs} over ours", scenario, 70, theirs, ours, bound, True)
    for scenario in scenarios:
        ratio("ours over least requests", scenario, 90, ours, "least requests", NOT_WORSE, False)
    return found


def _find(cells: Sequence[SimCell], scenario: str, load: int, contender: str) -> SimCell | None:
    wanted = scenario, load, contender
    return next((cell for cell in cells if (cell.scenario, cell.load, cell.contender) == wanted), None)


def cell(
    scenario: str,
    load: int,
    contender: str,
    speeds: Sequence[float],
    requests: Sequence[Request],
    log: Log,
    cpu_ns: int,
    took_s: float,
) -> SimCell:
    """The figures of a run that is over. Raises AssertionError where a request got no end."""
    assert all(request.ended_at >= request.at for request in requests), "every request is ended"
    counted = requests[int(WARM * len(requests)) :]
    well = [request for request in counted if not request.failed]
    took = np.array([request.ended_at - request.at for request in well])
    small = np.array([request.kind is SMALL for request in well], dtype=bool)
    noisy = np.array([request.account == NOISY for request in well], dtype=bool)
    best = np.array([FIXED_S + request.tokens / max(speeds) for request in well])
    slowdown = took / best
    means = np.array(
        [slowdown[np.array([request.account == name for request in well], dtype=bool)].mean() for name in ACCOUNTS]
    )
    utilisation, wasted = _shares(speeds, log, counted[0].at, counted[-1].at)
    light_p99, noisy_p99 = (np.percentile(took[small & which], 99) for which in (~noisy, noisy))
    return SimCell(
        scenario=scenario,
        load=load,
        contender=contender,
        all=ResponseTimes.of(took),
        small=ResponseTimes.of(took[small]),
        fairness=float(light_p99 / noisy_p99),
        jain=float(means.sum() ** 2 / (len(means) * (means**2).sum())),
        utilisation=utilisation,
        wasted=wasted,
        failed=len(counted) - len(well),
        requests=len(requests),
        cpu_us=cpu_ns / 1_000 / len(requests),
        took_s=took_s,
    )


def _shares(speeds: Sequence[float], log: Log, start: float, end: float) -> tuple[float, float]:
    """Of the fleet's speed between two moments: busy, and idle while something waited."""
    busy, waited = np.array(log.busy).reshape(-1, 3), np.array(log.waited).reshape(-1, 2)
    speed = np.array(speeds)[busy[:, 2].astype(int)]
    times = np.concatenate([busy[:, 0], busy[:, 1], waited[:, 0], waited[:, 1], [start, end]])
    np.clip(times, start, end, out=times)
    none = np.zeros(len(speed))
    steps = np.concatenate([speed, -speed, np.zeros(2 * len(waited) + 2)])
    waits = np.concatenate([none, none, np.ones(len(waited)), -np.ones(len(waited)), [0, 0]])
    order = np.argsort(times, kind="stable")
    spans = np.diff(times[order])
    speed_then, waiting_then = np.cumsum(steps[order])[:-1], np.cumsum(waits[order])[:-1]
    whole = sum(speeds) * (end - start)
    idle = sum(speeds) - speed_then
    return float(spans @ speed_then / whole), float(spans @ (idle * (waiting_then > 0.5)) / whole)
