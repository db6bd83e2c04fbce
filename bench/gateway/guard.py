"""Has a request become dearer? `python -m bench.gateway.guard [--rounds N] [--json]`: half a minute, exit code 1 if so.

Absolute times say little on a shared machine. So what is compared is the gateway with all its work and the one that
only forwards, in turns, by the least CPU a request that any round of each needed: what disturbs a round only adds.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import track

from bench.gateway.contenders import started
from bench.gateway.material import Material, build
from embedmesh.catalogue import load_catalogue
from embedmesh.provision.assets import assets_dir

BASE = "forward"
TIMES_MAX = {"key": 4.3, "count": 5.0, "hold": 7.8}
"""What each stage may cost over BASE: a quarter more than it did when this was written."""
SECONDS = 1.5


def measure(rounds: int, console: Console) -> dict[str, float]:
    """The least CPU a request of each stage, in microseconds."""
    model = load_catalogue(None, assets=assets_dir()).models[0]
    least: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-guard-")))
        material = Material(folder / "material", model)
        program = build()
        stages = {
            name: stack.enter_context(started(name, program, material, folder / name)) for name in (BASE, *TIMES_MAX)
        }
        for _ in track(range(rounds), "measuring", console=console):
            for name, stage in stages.items():
                found = stage.ask(SECONDS)
                if found.load.bad or not found.load.right:
                    raise RuntimeError(f"{name} answers wrong: {found.load}")
                least[name] = min(found.cpu_us, least.get(name, found.cpu_us))
    return least


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gateway.guard", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked: Any = parser.parse_args(arguments)
    least = measure(asked.rounds, Console(stderr=True))
    times = {name: least[name] / least[BASE] for name in TIMES_MAX}
    dear = [name for name, each in times.items() if each > TIMES_MAX[name]]
    if asked.json:
        print(msgspec.json.encode({"ok": not dear, "least_cpu_us": least, "times": times}).decode())
        return 1 if dear else 0
    for name, each in times.items():
        print(f"{name}: {least[name]:.0f} us a request, {each:.2f} times {BASE}; at most {TIMES_MAX[name]:.2f}")
    print(f"DEARER THAN IT WAS: {', '.join(dear)}" if dear else "No stage has become dearer.")
    return 1 if dear else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
