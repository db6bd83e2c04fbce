"""Has a request become dearer? `python -m bench.gateway.guard [--rounds N] [--json]`: a minute, exit code 1 if so.

Absolute times say little on a shared machine: bench.gateway.bytecodes counts instead. Here the gateway with all its
work is compared with the one that only forwards, in turns, by the least CPU a request that any round of each needed:
what disturbs a round only adds. What an operator can switch on is compared with ALONE, in the same rounds, by the time
that the median request takes.
"""

import statistics
from collections import defaultdict
from contextlib import ExitStack

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
TRACES = "traces"
SLOWER_MAX = {TRACES: 1.05}
"""What the median request may take over ALONE's with that switched on: a gate of issue 20. It is passed by the least
times of both *and* by the median of the rounds' ratios."""
SECONDS = 1.5


class Figures(msgspec.Struct, frozen=True):
    """By stage: the least CPU a request, and that over BASE's; the least median time, and that over ALONE's."""

    least_cpu_us: dict[str, float]
    times: dict[str, float]
    least_p50_us: dict[str, float]
    slower: dict[str, float]
    slower_by_round: dict[str, float]

    @property
    def broken(self) -> list[str]:
        """The stages that have become dearer."""
        dearer = [
            f"{name} costs {each:.2f} times {BASE}" for name, each in self.times.items() if each > TIMES_MAX[name]
        ]
        for name, bound in SLOWER_MAX.items():
            least, rounds = self.slower[name], self.slower_by_round[name]
            if max(least, rounds) > bound:
                dearer.append(f"with {name} a request takes {least:.3f} times as long, by rounds {rounds:.3f}")
        return dearer


def measure(rounds: int = 5) -> Figures:
    """All stages, in turns."""
    cpu_us: dict[str, list[float]] = defaultdict(list)
    p50_us: dict[str, list[float]] = defaultdict(list)
    with made_material() as material, collecting() as url, ExitStack() as stack:
        setups = {name: Setup(name) for name in (BASE, *TIMES_MAX)} | {TRACES: Setup(ALONE, more=("--traces", url))}
        stages = {name: stack.enter_context(started(setup, material)) for name, setup in setups.items()}
        for name, stage in track([*stages.items()] * rounds, "measuring"):
            found = stage.load(SECONDS)
            if found.load.bad or not found.load.right:
                raise RuntimeError(f"{name} answers wrong: {found.load}")
            cpu_us[name].append(found.cpu_us)
            p50_us[name].append(found.load.p50_us)
    least = {name: min(each) for name, each in cpu_us.items()}
    p50 = {name: min(p50_us[name]) for name in (ALONE, *SLOWER_MAX)}
    by_round = {
        name: statistics.median(over / plain for over, plain in zip(p50_us[name], p50_us[ALONE], strict=True))
        for name in SLOWER_MAX
    }
    return Figures(
        least,
        {name: least[name] / least[BASE] for name in TIMES_MAX},
        p50,
        {name: p50[name] / p50[ALONE] for name in SLOWER_MAX},
        by_round,
    )


if __name__ == "__main__":
    bench(measure)
