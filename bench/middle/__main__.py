"""Ten thousand attacks of a man in the middle on confidential calls: `make confidential`.

Client and node are the real ones, without sockets. Between them sits somebody with keys and a node of his own, who has
seen earlier calls pass. Each attack changes one thing that somebody reads: keys, documents, evidence, any byte; what
was sealed, answered or signed before; members, counts and statements of other calls. The client has to raise, before it
has sealed its texts or on the reply: not one attacked call may be answered. Calls that nobody attacks are made as well:
they must be answered, with the node's vectors. The seed decides the attack; keys and salts are random all the same.

Exit code 1 when an attack was accepted, or a text was seen. To see one attack: `--only SEED`.
"""

import time
from collections import Counter, defaultdict
from typing import Any

import msgspec
from rich.console import Console

from bench.middle.world import World, attack, honest
from bench.rig.command import bench, progress
from bench.rig.tables import print_figures

HONEST_EVERY = 20  # attacks
SHOWN_MAX = 10  # of what is wrong


class Noticed(msgspec.Struct, frozen=True):
    """Where attacks of one kind were noticed."""

    attacks: int
    before_it_sealed: int
    by_node_or_gateway: int
    on_the_reply: int
    accepted: int


class Figures(msgspec.Struct, frozen=True):
    """Of a whole run."""

    attacks: int
    accepted: int
    honest_calls: int
    seconds: float
    kinds: dict[str, Noticed]
    wrong: list[str]

    @property
    def broken(self) -> list[str]:
        """What is wrong, and with which seed."""
        more = len(self.wrong) - SHOWN_MAX
        return self.wrong[:SHOWN_MAX] + ([f"and {more:,} more"] if more > 0 else [])


def run(mutations: int, first: int) -> Figures:
    """As many attacks, from a seed on."""
    world = World()
    places: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: list[str] = []
    began, calls = time.monotonic(), 0
    with progress() as bar:
        task = bar.add_task("attacking", total=mutations)
        for seed in range(first, first + mutations):
            verdict = attack(world, seed)
            places[verdict.kind][verdict.where] += 1
            wrong += [f"{what} (seed {seed}, {verdict.kind})" for what in verdict.wrong]
            if seed % HONEST_EVERY == 0:
                calls += 1
                wrong += [f"{what} (honest call {seed})" for what in honest(world, seed)]
            bar.update(task, advance=1)
    world.close()
    kinds = {
        kind: Noticed(found.total(), *(found[where] for where in ("before", "refused", "reply", "")))
        for kind, found in sorted(places.items())
    }
    accepted = sum(each.accepted for each in kinds.values())
    return Figures(mutations, accepted, calls, round(time.monotonic() - began, 1), kinds, wrong)


def show(figures: Any, console: Console) -> None:
    """The table, and a line."""
    print_figures(figures, console)
    console.print(
        f"{figures.accepted:,} accepted of {figures.attacks:,} attacks of {len(figures.kinds)} kinds; "
        f"{figures.honest_calls:,} honest calls"
    )


def measure(mutations: int = 10_000, seed: int = 0, only: int | None = None) -> Figures:
    """Many attacks, or one."""
    return run(mutations, seed) if only is None else run(1, only)


if __name__ == "__main__":
    bench(measure, show=show, seed="of the first attack; the others follow", only="the seed of one attack")
