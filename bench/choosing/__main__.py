"""`python -m bench.choosing [--load 0.7 0.9] [--seconds N] [--rounds N] [--json]`: real processes, unequal nodes.

Four scripted nodes (bench.faultnode) of unequal speed are started once. Our gateway has them as nodes that joined it,
the others in front of the same processes' OpenAI form. Then each contender gets the same arrivals, one after the
other, in turns over the rounds.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.choosing.load import Answered, Arrival, Texts, arrivals, play
from bench.choosing.peers import PEERS, Peer, running
from bench.engine.install import NotInstalled
from bench.fault.rig import HOST, Rig, Speed, free_port, rigged
from embedmesh.engine.tokens import ModelTokenizer
from tests.data import find_model_folder

SPEEDS = (60_000.0, 30_000.0, 15_000.0, 5_000.0)  # tokens per second
FIXED_MS = 2.0
OURS = "embedmesh"
SEED = 11
P99_OVER_ROUND_ROBIN, P99_OVER_TWO_CHOICES = 4.0, 2.0  # at the first load
WORSE_THAN_LEAST = 1.05  # at the second
LIMIT = 256  # tokens of the default model


async def run(loads: Sequence[float], seconds: float, rounds: int, progress: Progress) -> dict[float, Any]:
    """All of it: load -> contender -> what came of its requests."""
    folder = find_model_folder()
    if folder is None:
        raise RuntimeError("the default model's files are not here; run `embedmesh setup`")
    texts = Texts(ModelTokenizer(folder, LIMIT))
    figures: dict[float, Any] = {}
    with tempfile.TemporaryDirectory(prefix="embedmesh-choosing-") as scratch:
        place = Path(scratch)
        async with rigged(place) as rig:
            ports = await start_nodes(rig)
            missing: set[str] = set()
            task = progress.add_task("playing", total=len(loads) * rounds * (1 + len(PEERS)))
            for load in loads:
                per_contender: dict[str, list[Answered]] = {}
                for number in range(rounds):
                    planned = arrivals(texts, load * sum(SPEEDS), seconds, SEED + number)
                    for at, peer in enumerate((None, *PEERS)):
                        name = peer.name if peer is not None else OURS
                        progress.update(task, description=f"load {load:.0%}: {name}")
                        if name not in missing:
                            try:
                                took = await contend(peer, rig, planned, ports, place / f"{load}-{number}-{at}")
                                per_contender.setdefault(name, []).extend(took)
                            except NotInstalled as why:
                                progress.console.print(f"{name} is left out: {why}")
                                missing.add(name)
                        progress.advance(task)
                        progress.console.print(f"load {load:.0%}, round {number + 1}: {name} done", soft_wrap=True)
                figures[load] = {name: summary(answered) for name, answered in per_contender.items()}
    return figures


async def start_nodes(rig: Rig) -> list[int]:
    """The nodes, joined; the ports of their OpenAI form."""
    ports = []
    for seed, speed in enumerate(SPEEDS):
        ports.append(free_port())
        options = ("--openai-port", str(ports[-1]))
        node = await rig.start(Speed(speed, FIXED_MS), seed=seed, options=options)
        await rig.join(node)
    return ports


async def contend(
    peer: Peer | None, rig: Rig, planned: Sequence[Arrival], ports: Sequence[int], place: Path
) -> list[Answered]:
    """One contender, alone with the nodes."""
    if peer is None:
        return await play(planned, HOST, rig.port, rig.credentials.api_key)
    async with running(peer, ports, place) as port:
        return await play(planned, HOST, port, "none")


def summary(answered: Sequence[Answered]) -> dict[str, Any]:
    """Milliseconds by quantile, of all and of the small ones; what failed, what was wrong."""
    every = [one.took_s * 1000 for one in answered]
    small = [one.took_s * 1000 for one in answered if one.kind == "small"]
    return {
        "requests": len(answered),
        "failed": sum(one.status != 200 for one in answered),
        "wrong_vectors": sum(one.wrong for one in answered),
        "mean_ms": statistics.fmean(every),
        **{f"p{name}_ms": quantile(every, q) for name, q in (("50", 0.5), ("90", 0.9), ("99", 0.99))},
        **{f"small_p{name}_ms": quantile(small, q) for name, q in (("50", 0.5), ("99", 0.99))},
    }


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share `q` of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def verdict(figures: dict[float, Any]) -> list[str]:
    """The targets that were missed, in words."""
    missed = []
    for load, rows in figures.items():
        ours = rows[OURS]
        if ours["failed"] or ours["wrong_vectors"]:
            missed.append(f"at {load:.0%} {ours['failed']} failed, {ours['wrong_vectors']} vectors were wrong")
        for name, row in rows.items():
            ratio = row["p99_ms"] / ours["p99_ms"]
            least = 0.0
            if load < 0.8 and "round robin" in name:
                least = P99_OVER_ROUND_ROBIN
            elif load < 0.8 and "two choices" in name:
                least = P99_OVER_TWO_CHOICES
            elif "least requests" in name:
                least = 1 / WORSE_THAN_LEAST
            if ratio < least:
                missed.append(f"at {load:.0%} p99 is {ratio:.2f}x better than {name}, not {least:.2f}x")
    return missed


def show(figures: dict[float, Any], console: Console) -> None:
    """A table a load."""
    for load, rows in figures.items():
        table = Table(title=f"{load:.0%} of what nodes of {', '.join(f'{one:,.0f}' for one in SPEEDS)} tokens/s can do")
        for column in (
            "contender",
            "p50",
            "p90",
            "p99 ms",
            "ours is better",
            "small p50",
            "small p99",
            "failed",
            "wrong",
        ):
            table.add_column(column, justify="left" if column == "contender" else "right")
        ours = rows[OURS]
        for name, row in rows.items():
            cells = [f"{row[key]:,.0f}" for key in ("p50_ms", "p90_ms", "p99_ms")]
            cells += [f"{row['p99_ms'] / ours['p99_ms']:.1f}x"]
            cells += [f"{row[key]:,.0f}" for key in ("small_p50_ms", "small_p99_ms", "failed", "wrong_vectors")]
            table.add_row(name, *cells)
        console.print(table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.choosing", description=__doc__.split("\n\n")[0])
    parser.add_argument("--load", type=float, nargs="+", default=[0.7, 0.9], help="of what the nodes can do together")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    console = Console(stderr=asked.json)
    with Progress(console=console, transient=True) as progress:
        figures = uvloop.run(run(asked.load, asked.seconds, asked.rounds, progress))
    show(figures, console)
    if asked.json:
        print(json.dumps({str(load): rows for load, rows in figures.items()}))
    missed = verdict(figures)
    console.print("Every target is met." if not missed else "Missed: " + "; ".join(missed) + ".")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
