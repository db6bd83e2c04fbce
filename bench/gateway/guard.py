"""Has a request become dearer? `python -m bench.gateway.guard [--rounds N] [--json]`: a minute, exit code 1 if so.

Absolute times say little on a shared machine: bench.gateway.bytecodes counts instead. Here the gateway with all its
work is compared with the one that only forwards, in turns, by the least CPU a request that any round of each needed:
what disturbs a round only adds.

What an operator can switch on, the access log in JSON and traces, is compared with the gateway without, in turns, by
the p50 at a steady rate: the least of all rounds of each, and the median of the rounds' ratios. Both must be too high
for a verdict.
"""

from collections import defaultdict
from contextlib import ExitStack
from statistics import median

import msgspec

from bench.gateway.collector import collecting
from bench.gateway.contenders import Setup, started
from bench.gateway.material import made_material
from bench.gateway.ours import ALONE
from bench.rig.command import bench, track

BASE = "forward"
TIMES_MAX = {"key": 2.6, "count": 2.3, "alone": 2.6, "hold": 2.8}
"""What each stage may cost over BASE, which goes the way of coroutines: a quarter more than it did when this was
written. On a busy machine a node seems slow, and requests share its calls but in `alone`: that is dearer."""
SECONDS = 1.5
UNWATCHED = "nothing"
P50_TIMES_MAX = {"JSON logs": 1.03, "traces": 1.05}
"""What watching may add to the p50: gates of issue 20."""
WATCHED_RATE = 500.0  # requests a second: the gateway is never behind
WATCHED_TURNS = 2  # in a round: a p50 is less steady than the least CPU


class Figures(msgspec.Struct, frozen=True):
    """By stage: the least CPU a request, and that over BASE's. By what watches: the least p50, and two ratios."""

    least_cpu_us: dict[str, float]
    times: dict[str, float]
    least_p50_us: dict[str, float]
    p50_times: dict[str, float]
    median_p50_times: dict[str, float]

    @property
    def broken(self) -> list[str]:
        """The stages that have become dearer, and what costs too much to watch."""
        dearer = [
            f"{name} costs {each:.2f} times {BASE}" for name, each in self.times.items() if each > TIMES_MAX[name]
        ]
        for name, most in P50_TIMES_MAX.items():
            best, middle = self.p50_times[name], self.median_p50_times[name]
            if min(best, middle) > most:
                dearer.append(f"with {name} the p50 is {best:.3f} times that without, {middle:.3f} in the median round")
        return dearer


def measure(rounds: int = 5) -> Figures:
    """All stages, in turns; then what watches, in turns."""
    least: dict[str, float] = {}
    p50s: dict[str, list[float]] = defaultdict(list)
    with made_material() as material, ExitStack() as stack:
        stages = {name: stack.enter_context(started(Setup(name), material)) for name in (BASE, *TIMES_MAX)}
        for name, stage in track([*stages.items()] * rounds, "measuring"):
            found = stage.load(SECONDS)
            if found.load.bad or not found.load.right:
                raise RuntimeError(f"{name} answers wrong: {found.load}")
            least[name] = min(found.cpu_us, least.get(name, found.cpu_us))
    with made_material() as material, collecting() as url, ExitStack() as stack:
        options = {"JSON logs": ("--log-format", "json", "--access-log", "on"), "traces": ("--traces", url)}
        setups = {UNWATCHED: Setup(ALONE)} | {name: Setup(ALONE, more=each) for name, each in options.items()}
        watched = {name: stack.enter_context(started(setup, material)) for name, setup in setups.items()}
        for name, stage in track([*watched.items()] * (rounds * WATCHED_TURNS), "watching"):
            found = stage.load(SECONDS, WATCHED_RATE)
            if found.load.bad or not found.load.right:
                raise RuntimeError(f"with {name} it answers wrong: {found.load}")
            p50s[name].append(found.load.p50_us)
    least_p50 = {name: min(each) for name, each in p50s.items()}
    ratios = {
        name: median(each / base for each, base in zip(p50s[name], p50s[UNWATCHED], strict=True))
        for name in P50_TIMES_MAX
    }
    return Figures(
        least,
        {name: least[name] / least[BASE] for name in TIMES_MAX},
        least_p50,
        {name: least_p50[name] / least_p50[UNWATCHED] for name in P50_TIMES_MAX},
        ratios,
    )


if __name__ == "__main__":
    bench(measure)
