"""Our scheduler beside other people's routers, in virtual time: `make sim`, or `python -m bench.sim [--json]`.

The scheduler is `embedmesh.fleet.scheduler` itself, driven by a clock that jumps from event to event, over nodes whose
speed it has to learn. Beside it, over the same nodes and the same requests: round robin, random, two choices, least
requests, least tokens, peak EWMA and expected finish, each in front of a queue at each node; and an oracle. The
requests are in `bench/sim/workload.py`, the fleets in `bench/sim/scenarios.py`. The simulator checks itself first.

Writes `bench/results/sim.json` and `sim.md` (the tables of docs/choosing.md), and after a whole run
`docs/fleet-sim.svg`. Exit code 1 when the simulator is wrong or a target is missed. To try another constant:
`--only "8 equal" --set spread.PART_S=0.1`.
"""

import importlib
from collections.abc import Sequence

from bench.rig.command import bench, check_names, progress, save
from bench.sim.check import one_queue, twice
from bench.sim.figures import Figures, targets
from bench.sim.scenarios import CONTENDERS, FATES, LARGE, SCHEDULER, STATIC, Scenario
from bench.sim.scenarios import run as run_cell
from bench.sim.show import markdown, plot, show
from bench.sim.workload import Trace
from tests.data import CHECKOUT

PICTURE = CHECKOUT / "docs" / "fleet-sim.svg"
PLOTTED_LOADS = (50, 70, 90)
WIDTH_MIN = 150  # of the tables


def simulate(
    scenarios: Sequence[Scenario], loads: Sequence[int], contenders: Sequence[str], seed: int, scale: float
) -> Figures:
    """The whole run. Raises AssertionError where a request is not answered once."""
    cells = [(each, load, who) for each in scenarios for load in each.loads if load in loads for who in contenders]
    with progress() as bar:
        task = bar.add_task("checking the simulator", total=len(cells) + 1)
        queue, same_twice = one_queue(), twice()
        found = []
        traces: dict[int, Trace] = {}
        for scenario, load, who in cells:
            bar.update(task, description=f"{scenario.name}, {load} %, {who}", advance=1)
            requests = round(scale * scenario.requests)
            if requests not in traces:
                traces = {requests: Trace(requests, seed)}
            found.append(run_cell(scenario, load, who, traces[requests], seed))
        bar.advance(task)
    judged = targets(found, [scenario.name for scenario in STATIC], SCHEDULER)
    return Figures(seed=seed, cells=found, queue=queue, same_twice=same_twice, targets=judged)


def try_constant(setting: str) -> None:
    """`spread.PART_S=0.1`: another value for a constant of `embedmesh.fleet`, in this process."""
    where, _, value = setting.partition("=")
    module, _, name = where.partition(".")
    of = importlib.import_module(f"embedmesh.fleet.{module}")
    setattr(of, name, type(getattr(of, name))(value))


def measure(
    seed: int = 1,
    scale: float = 1.0,
    only: Sequence[str] = (),
    load: Sequence[int] = (),
    who: Sequence[str] = (),
    set_: Sequence[str] = (),
) -> Figures:
    """The chosen scenarios, loads and contenders; all of them by default."""
    check_names(who, list(CONTENDERS))
    for setting in set_:
        try_constant(setting)
    scenarios = [each for each in (*STATIC, *FATES) if each.name.startswith(tuple(only or [""]))]
    scenarios += [each for each in LARGE if each.name.startswith(tuple(only))]
    figures = simulate(scenarios, load or PLOTTED_LOADS, who or list(CONTENDERS), seed, scale)
    save("sim.md", markdown(figures))
    if not (only or load or who or set_):
        PICTURE.write_text(plot(figures, [each.name for each in STATIC], PLOTTED_LOADS), encoding="utf-8")
    return figures


if __name__ == "__main__":
    bench(
        measure,
        show=show,
        file="sim.json",
        width=WIDTH_MIN,
        scale="times as many requests",
        only="scenarios whose names begin so",
        load="only these, in percent",
        who="only these contenders",
        set_="try constants, as MODULE.NAME=VALUE",
    )
