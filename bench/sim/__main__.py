"""Our scheduler beside other people's routers, in virtual time: `make sim`, or `python -m bench.sim [--json]`.

The scheduler is `embedmesh.fleet.scheduler` itself, driven by a clock that jumps from event to event, over nodes whose
speed it has to learn. Beside it, over the same nodes and the same requests: round robin, random, two choices, least
requests, least tokens, peak EWMA and expected finish, each in front of a queue at each node; and an oracle. The
requests are in `bench/sim/workload.py`, the fleets in `bench/sim/scenarios.py`. The simulator checks itself first.

Writes `bench/results/sim.json`, and after a whole run `docs/fleet-sim.svg`. Exit code 1 when the simulator is wrong or
a target is missed. To try another constant: `--only "8 equal" --set spread.PART_S=0.1`.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from bench.rig.command import finish, parser, progress, run
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


def main(arguments: Sequence[str]) -> int:
    """The command."""
    made = parser("bench.sim", __doc__)
    made.add_argument("--markdown", action="store_true", help="the tables of docs/choosing.md")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--scale", type=float, default=1.0, help="times as many requests")
    made.add_argument("--only", action="append", default=[], metavar="WORDS", help="scenarios whose names begin so")
    made.add_argument("--load", action="append", type=int, default=[], help="only this one, in percent")
    made.add_argument("--who", action="append", default=[], choices=list(CONTENDERS), help="only this contender")
    made.add_argument("--set", action="append", default=[], metavar="MODULE.NAME=VALUE", help="try a constant")
    options: Any = made.parse_args(arguments)
    for setting in options.set:
        try_constant(setting)
    scenarios = [each for each in (*STATIC, *FATES) if each.name.startswith(tuple(options.only or [""]))]
    scenarios += [each for each in LARGE if each.name.startswith(tuple(options.only))]
    loads, contenders = options.load or PLOTTED_LOADS, options.who or list(CONTENDERS)
    figures = simulate(scenarios, loads, contenders, options.seed, options.scale)
    if not (options.only or options.load or options.who or options.set):
        PICTURE.write_text(plot(figures, [each.name for each in STATIC], PLOTTED_LOADS), encoding="utf-8")
    if options.markdown:
        print(markdown(figures))
        return 1 if figures.broken else 0
    return finish(figures, show, as_json=options.json, file="sim.json", width=WIDTH_MIN)


if __name__ == "__main__":
    run(main)
