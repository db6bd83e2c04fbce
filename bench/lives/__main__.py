"""Thousands of lives of requests in virtual time: `make lives`, or `python -m bench.lives [--lives N]`.

A life is one request from its arrival to its end, its caller's retries included. The flow, the ledger, limits,
retries and recovery are the real ones, over real SQLite files; clock, dice, threads, disk, nodes and callers are
decided by a seed, which also says when gateways die: at any await. After each world the ledger is compared with what
callers got. Ordinary requests go straight, as over the gateway's own connections; the last lines say how many did. In
half of the worlds some lives are confidential: they lock at one gateway, and send to another, late, twice or never.
In others some are chats, most of them streams: nodes speak by dice, fall silent, break or never end; callers leave
after some events, read slowly or not at all; the store is away for long. `--talks 1` makes all lives chats.

Exit code 1 when anything was wrong; the seed and the command that shows how it came to that are printed. To see one
world: `--only SEED`.
"""

import logging
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from bench.lives.exchange import STRAIGHT, TO_THE_END
from bench.lives.world import Ended, Template, folder_in_memory, live
from bench.rig.command import bench, progress
from bench.rig.tables import print_figures

LIVES_A_WORLD = 100
FAILURES_MAX = 20  # then the run ends


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
    requests: int  # to gateways that took them, retries included
    went_straight: int
    straight_to_the_end: int  # the others went on as coroutines, or their callers left
    steps: int
    virtual_s: float
    seen: dict[str, int]
    failed: list[Failed]

    @property
    def broken(self) -> list[str]:
        """The worlds that went wrong."""
        return [f"seed {each.seed}: {each.wrong[0]}" for each in self.failed]


def simulate(lives: int, seed: int, talks: float | None) -> Figures:
    """World after world, from a seed on."""
    with_talks = "" if talks is None else f" --talks {talks}"
    worlds = -(-lives // LIVES_A_WORLD)
    seen: Counter[str] = Counter()
    failed: list[Failed] = []
    steps, virtual_s, done = 0, 0.0, 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="embedmesh-lives-", dir=folder_in_memory()) as folder, progress() as bar:
        template, task = Template(Path(folder)), bar.add_task("living", total=worlds)
        for number in range(seed, seed + worlds):
            ended = live(number, template, LIVES_A_WORLD, talks)
            seen.update(ended.seen)
            steps += ended.steps
            virtual_s += ended.virtual_s
            done += 1
            if ended.wrong:
                failed.append(Failed(number, ended.wrong, f"python -m bench.lives --only {number}{with_talks}"))
            bar.update(task, advance=1, description=f"{done * LIVES_A_WORLD:,} lives, {len(failed)} wrong")
            if len(failed) >= FAILURES_MAX:
                break
    seconds = time.monotonic() - began
    return Figures(
        lives=done * LIVES_A_WORLD,
        worlds=done,
        seconds=round(seconds, 1),
        lives_a_minute=round(done * LIVES_A_WORLD / seconds * 60),
        requests=seen["requests"],
        went_straight=seen[STRAIGHT],
        straight_to_the_end=seen[TO_THE_END],
        steps=steps,
        virtual_s=round(virtual_s, 1),
        seen=dict(seen.most_common()),
        failed=failed,
    )


def show_one(ended: Ended, console: Console) -> None:
    """One world, from beginning to end."""
    console.print("\n".join(ended.trace), markup=False, highlight=False, soft_wrap=True)
    console.print(f"The world of seed {ended.seed}: {ended.steps:,} steps, trace {ended.digest}", soft_wrap=True)


def show(figures: Any, console: Console) -> None:
    """Of one world every step, of many what happened."""
    if isinstance(figures, Ended):
        show_one(figures, console)
        return
    print_figures(figures, console)
    asked, straight, to_the_end = figures.requests, figures.went_straight, figures.straight_to_the_end
    console.print(
        f"{straight:,} of {asked:,} requests went straight ({straight / max(asked, 1):.0%}), {to_the_end:,} of them to "
        "the end"
    )


def measure(lives: int = 10_000, seed: int = 1, only: int | None = None, talks: float | None = None) -> Figures | Ended:
    """Many worlds, or one."""
    logging.disable(logging.CRITICAL)  # dead gateways log much
    if only is None:
        return simulate(lives, seed, talks)
    with tempfile.TemporaryDirectory(prefix="embedmesh-lives-", dir=folder_in_memory()) as folder:
        return live(only, Template(Path(folder)), LIVES_A_WORLD, talks)


if __name__ == "__main__":
    bench(
        measure,
        show=show,
        seed="of the first world; the others follow",
        only="the seed of one world, step by step",
        talks="the share of lives that are chats and their streams, in all worlds; else some, in some",
    )
