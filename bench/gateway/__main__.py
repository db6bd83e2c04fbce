"""The gateway's own cost, beside its peers': `python -m bench.gateway [--rounds N] [--only NAME ...] [--json]`.

Loopback only. Every gateway has one core to itself, in front of a node that costs nearly nothing; every vector is
checked. Ours is measured in stages, and beside nginx, vllm-router, LiteLLM and Portkey, each of which is installed in
an environment of its own under `.bench`; one that does not install is named and left out. All of them are measured in
turns, round by round, and medians are told: exit code 1 where a target that could be measured is missed.
"""

import argparse
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from bench.engine.install import NotInstalled
from bench.gateway.contenders import PLAIN, Contender, started
from bench.gateway.figures import Figures, Row, median_row, targets
from bench.gateway.material import Material, build
from bench.gateway.ours import ALONE, SIGNED, STAGES
from bench.gateway.peers import PEERS
from bench.gateway.show import plot, show
from embedmesh.catalogue import load_catalogue
from embedmesh.provision.assets import assets_dir

SEVERAL = 16  # texts a request
RATES = (200.0, 1_000.0)  # requests a second, open loop
TWO = 2  # workers
SOLO = (*STAGES, ALONE, PLAIN, SIGNED, *PEERS)
IN_SIXTEENS = ("hold", "nginx", "vllm-router", "LiteLLM")
PLOT = Path(__file__).parents[1] / "results" / "gateway.svg"


def wanted(only: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """What is measured, by the name that is shown, and how it is started."""
    all_of_them: list[tuple[str, dict[str, Any]]] = [(name, {"name": name}) for name in SOLO]
    all_of_them += [(f"{name}, {SEVERAL} texts", {"name": name, "inputs": SEVERAL}) for name in IN_SIXTEENS]
    all_of_them += [
        ("count, 2 workers", {"name": "count", "workers": TWO}),
        ("hold, 2 workers", {"name": "hold", "workers": TWO}),
        ("hold, PostgreSQL", {"name": "hold", "store": "postgres"}),
        ("hold, PostgreSQL, 2 workers", {"name": "hold", "store": "postgres", "workers": TWO}),
    ]
    return [one for one in all_of_them if not only or one[0] in only]


def measure(only: list[str], rounds: int, seconds: float, console: Console) -> Figures:
    """All of it."""
    program = build()
    model = load_catalogue(None, assets=assets_dir()).models[0]
    rows: dict[str, list[Row]] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-gateway-")))
        material = Material(folder / "material", model)
        contenders: dict[str, Contender] = {}
        asked = wanted(only)
        bar = stack.enter_context(Progress(console=console))
        starting = bar.add_task("starting", total=len(asked))
        for number, (shown, how) in enumerate(asked):
            if how.get("store"):
                from bench.postgres import serving

                how = how | {"store": stack.enter_context(serving(on_disk=True)).new()}
            try:
                contenders[shown] = stack.enter_context(
                    started(how.pop("name"), program, material, folder / str(number), **how)
                )
            except NotInstalled as error:
                left_out[shown] = str(error)
            else:
                contenders[shown].sleep()
            bar.advance(starting)
        running = bar.add_task("measuring", total=rounds * len(contenders))
        for _ in range(rounds):
            for shown, contender in contenders.items():
                rates = RATES if shown in ("hold", ALONE) else ()
                with contender.awake():
                    at_rates = [contender.ask(seconds, rate) for rate in rates]
                    rows.setdefault(shown, []).append(Row.of(shown, contender, contender.ask(seconds), at_rates))
                bar.advance(running)
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    return Figures(machine, rounds, seconds, [median_row(each) for each in rows.values()], left_out)


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one load")
    parser.add_argument("--only", nargs="*", default=[], help="names as the table shows them, such as hold nginx")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked: Any = parser.parse_args(arguments)
    figures = measure(asked.only, asked.rounds, asked.seconds, Console(stderr=True))
    missed = [target for target in targets(figures) if not target.met]
    if asked.json:
        print(msgspec.json.encode({"ok": not missed, "targets": targets(figures), "figures": figures}).decode())
    else:
        show(figures, Console())
        PLOT.parent.mkdir(exist_ok=True)
        PLOT.write_text(plot(figures))
        print(f"Drawn: {PLOT}")
        words = "; ".join(f"{target.name}: {target.value:.3g}" for target in missed)
        print(f"MISSED: {words}" if missed else "Every target that could be measured is met.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
