"""Thousands of lives of requests in virtual time: `make lives`, or `python -m bench.lives [--lives N]`.

A life is one request from its arrival to its end, its caller's retries included. The flow, the ledger, limits,
retries and recovery are the real ones, over real SQLite files; clock, dice, threads, disk, nodes and callers are
decided by a seed, which also says when gateways die: at any await. After each world the ledger is compared with what
callers got.

Exit code 1 when anything was wrong; the seed and the command that shows how it came to that are printed. To see one
world: `--only SEED`.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.lives.world import Ended, Template, folder_in_memory, live

LIVES_A_WORLD = 50
FAILURES_MAX = 20  # then it is no use to go on


class Failed(msgspec.Struct, frozen=True):
    """A world in which something was wrong."""

    seed: int
    wrong: list[str]
    replay: str


class Figures(msgspec.Struct, frozen=True):
    """Of a whole run."""

    lives: int
    worlds: int
    seconds: float
    lives_a_minute: int
    steps: int
    virtual_s: float
    seen: dict[str, int]
    failed: list[Failed]


def simulate(lives: int, seed: int, log: Console) -> Figures:
    """World after world, from a seed on."""
    worlds = -(-lives // LIVES_A_WORLD)
    seen: Counter[str] = Counter()
    failed: list[Failed] = []
    steps, virtual_s, done = 0, 0.0, 0
    began = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with tempfile.TemporaryDirectory(prefix="embedmesh-lives-", dir=folder_in_memory()) as folder:
        template = Template(Path(folder))
        with Progress(*columns, console=log) as progress:
            task = progress.add_task("living", total=worlds)
            for number in range(seed, seed + worlds):
                ended = live(number, template, LIVES_A_WORLD)
                seen.update(ended.seen)
                steps += ended.steps
                virtual_s += ended.virtual_s
                done += 1
                if ended.wrong:
                    failed.append(Failed(number, ended.wrong, f"python -m bench.lives --only {number}"))
                progress.update(task, advance=1, description=f"{done * LIVES_A_WORLD:,} lives, {len(failed)} wrong")
                if len(failed) >= FAILURES_MAX:
                    break
    seconds = time.monotonic() - began
    return Figures(
        lives=done * LIVES_A_WORLD,
        worlds=done,
        seconds=round(seconds, 1),
        lives_a_minute=round(done * LIVES_A_WORLD / seconds * 60),
        steps=steps,
        virtual_s=round(virtual_s, 1),
        seen=dict(sorted(seen.items(), key=lambda each: -each[1])),
        failed=failed,
    )


def show(figures: Figures, console: Console) -> None:
    """For people."""
    table = Table(
        "what happened", "times", title=f"{figures.worlds:,} worlds, {figures.virtual_s:,.0f} virtual seconds"
    )
    for what, times in figures.seen.items():
        table.add_row(what.replace("_", " "), f"{times:,}")
    console.print(table)
    for each in figures.failed:
        console.print(f"seed {each.seed}: {each.wrong[0]}", markup=False, soft_wrap=True)
        console.print(f"  and {len(each.wrong) - 1} more; see: {each.replay}", markup=False, soft_wrap=True)
    verdict = f"{len(figures.failed)} worlds went wrong" if figures.failed else "all promises were kept"
    console.print(
        f"lives: {verdict} in {figures.lives:,} lives; {figures.lives_a_minute:,} lives a minute, "
        f"{figures.seen.get('deaths', 0):,} gateways killed",
        soft_wrap=True,
    )


def tell(ended: Ended) -> None:
    """One world, from beginning to end."""
    print("\n".join(ended.trace))
    for each in ended.wrong:
        print(f"WRONG: {each}")
    verdict = f"{len(ended.wrong)} things went wrong" if ended.wrong else "all promises were kept"
    print(f"lives: {verdict} in the world of seed {ended.seed}, {ended.steps:,} steps, trace {ended.digest}")


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.lives", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lives", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, help="of the first world; the others follow")
    parser.add_argument("--only", type=int, metavar="SEED", help="one world, told step by step")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    asked: Any = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)  # dead gateways have much to say
    if asked.only is not None:
        with tempfile.TemporaryDirectory(prefix="embedmesh-lives-", dir=folder_in_memory()) as folder:
            ended = live(asked.only, Template(Path(folder)), LIVES_A_WORLD)
        if asked.json:
            print(msgspec.json.format(msgspec.json.encode(ended), indent=1).decode())
        else:
            tell(ended)
        return 1 if ended.wrong else 0
    figures = simulate(asked.lives, asked.seed, Console(stderr=True))
    if asked.json:
        print(msgspec.json.format(msgspec.json.encode(figures), indent=1).decode())
    else:
        show(figures, Console())
    return 1 if figures.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
