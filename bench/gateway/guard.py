"""Has a request become dearer? `python -m bench.gateway.guard [--rounds N] [--json]`: half a minute, exit code 1 if so.

Absolute times say little on a shared machine: bench.gateway.bytecodes counts instead. Here the gateway with all its
work is compared with the one that only forwards, in turns, by the least CPU a request that any round of each needed:
what disturbs a round only adds.
"""

from contextlib import ExitStack

import msgspec

from bench.gateway.contenders import Setup, started
from bench.gateway.material import made_material
from bench.rig.command import bench, track

BASE = "forward"
TIMES_MAX = {"key": 2.6, "count": 2.3, "alone": 2.6, "hold": 2.8}
"""What each stage may cost over BASE, which goes the way of coroutines: a quarter more than it did when this was
written. On a busy machine a node seems slow, and requests share its calls but in `alone`: that is dearer."""
SECONDS = 1.5


class Figures(msgspec.Struct, frozen=True):
    """By stage: the least CPU a request, and that over BASE's."""

    least_cpu_us: dict[str, float]
    times: dict[str, float]

    @property
    def broken(self) -> list[str]:
        """The stages that have become dearer."""
        return [f"{name} costs {each:.2f} times {BASE}" for name, each in self.times.items() if each > TIMES_MAX[name]]


def measure(rounds: int = 5) -> Figures:
    """All stages, in turns."""
    least: dict[str, float] = {}
    with made_material() as material, ExitStack() as stack:
        stages = {name: stack.enter_context(started(Setup(name), material)) for name in (BASE, *TIMES_MAX)}
        for name, stage in track([*stages.items()] * rounds, "measuring"):
            found = stage.load(SECONDS)
            if found.load.bad or not found.load.right:
                raise RuntimeError(f"{name} answers wrong: {found.load}")
            least[name] = min(found.cpu_us, least.get(name, found.cpu_us))
    return Figures(least, {name: least[name] / least[BASE] for name in TIMES_MAX})


if __name__ == "__main__":
    bench(measure)
