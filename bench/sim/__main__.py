"""Our scheduler beside other people's routers, in virtual time: `make sim`, or `python -m bench.sim [--json]`.

The scheduler is `embedmesh.fleet.scheduler` itself, driven by a clock that jumps from event to event, over nodes that
it has to get to know. Beside it, over the same nodes and the same requests: round robin, random, two choices, least
requests, least tokens, peak EWMA and expected finish, each in front of a queue at each node; and an oracle. What is
asked is in `bench/sim/workload.py`, and of whom in `bench/sim/scenarios.py`. The simulator checks itself first.

Writes `bench/results/sim.json`, and after a whole run `docs/fleet-sim.svg`. Exit code 1 when the simulator is wrong or
a target is missed. To try another constant: `--only "8 equal" --set spread.PART_S=0.1`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.sim.check import one_queue, twice
from bench.sim.figures import Figures, targets
from bench.sim.plot import plot
from bench.sim.scenarios import CONTENDERS, FATES, LARGE, SCHEDULER, STATIC, Scenario, run
from bench.sim.show import markdown, show
from bench.sim.workload import Trace

CHECKOUT = Path(__file__).parent.parent.parent
RESULTS = CHECKOUT / "bench" / "results"
PICTURE = CHECKOUT / "docs" / "fleet-sim.svg"
PLOTTED_LOADS = (50, 70, 90)
WIDTH_MIN = 150  # of the tables


def simulate(
    scenarios: Sequence[Scenario],
    loads: Sequence[int],
    contenders: Sequence[str],
    seed: int,
    scale: float,
    log: Console,
) -> Figures:
    """The whole run. Raises AssertionError where a request is not answered once."""
    cells = [(each, load, who) for each in scenarios for load in each.loads if load in loads for who in contenders]
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=log) as progress:
        task = progress.add_task("checking the simulator", total=len(cells) + 1)
        queue, same_twice = one_queue(), twice()
        found = []
        traces: dict[int, Trace] = {}
        for scenario, load, who in cells:
            progress.update(task, description=f"{scenario.name}, {load} %, {who}", advance=1)
            requests = round(scale * scenario.requests)
            if requests not in traces:
                traces = {requests: Trace(requests, seed)}
            found.append(run(scenario, load, who, traces[requests], seed))
        progress.update(task, advance=1)
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
    parser = argparse.ArgumentParser(prog="python -m bench.sim", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--markdown", action="store_true", help="the tables of docs/choosing.md")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="so many times as many requests")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="scenarios whose names begin so")
    parser.add_argument("--load", action="append", type=int, default=[], help="only this one, in percent")
    parser.add_argument("--who", action="append", default=[], choices=list(CONTENDERS), help="only this contender")
    parser.add_argument("--set", action="append", default=[], metavar="MODULE.NAME=VALUE", help="try a constant")
    asked: Any = parser.parse_args(arguments)
    for setting in asked.set:
        try_constant(setting)
    scenarios = [each for each in (*STATIC, *FATES) if each.name.startswith(tuple(asked.only or [""]))]
    scenarios += [each for each in LARGE if each.name.startswith(tuple(asked.only))]
    whole = not (asked.only or asked.load or asked.who or asked.set)
    figures = simulate(
        scenarios,
        asked.load or PLOTTED_LOADS,
        asked.who or list(CONTENDERS),
        asked.seed,
        asked.scale,
        Console(stderr=True),
    )
    RESULTS.mkdir(exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(figures), indent=1)
    (RESULTS / "sim.json").write_bytes(encoded)
    if whole:
        PICTURE.write_text(plot(figures, tuple(each.name for each in STATIC), PLOTTED_LOADS), encoding="utf-8")
    if asked.json:
        print(encoded.decode())
    elif asked.markdown:
        print(markdown(figures))
    else:
        show(figures, Console(width=max(WIDTH_MIN, Console().width)))
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
