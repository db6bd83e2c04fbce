"""What was found, what was promised, and how it is shown."""

from collections.abc import Mapping, Sequence

import msgspec
from rich.console import Console

from bench.generation.contenders import DIRECT, OURS
from bench.generation.readers import Alone, Together
from bench.rig.figures import Spread, Target, missed, print_targets
from bench.rig.tables import print_table

FIRST_MS_MAX, EVENT_MS_MAX = 2.0, 1.0  # added
IN_TIME_MIN = 0.99
CPU_US_MAX = 40.0  # of an event: four tenths of a core for 10,000 a second
GROWTH_KB_MAX = 256.0


class Turn(msgspec.Struct, frozen=True):
    """One contender, once."""

    alone: Alone
    together: Together
    sync_ms: float  # what the disk needs for a write that is durable, at that time


class Row(msgspec.Struct, frozen=True):
    """One contender over all rounds. Times in ms, but for `cpu_us`."""

    name: str
    first_p50: Spread
    event_p50: Spread
    event_p99: Spread
    delay_p50: Spread
    delay_p99: Spread
    in_time: Spread
    cpu_us: Spread
    core: Spread

    @classmethod
    def of(cls, name: str, turns: Sequence[Turn]) -> "Row":
        """Of at least one turn."""
        found = [(*turn.alone, *turn.together) for turn in turns]
        return cls(name, *map(Spread.of, zip(*found, strict=True)))


class Figures(msgspec.Struct, frozen=True):
    """All of it."""

    machine: str
    busy: float  # processes that wanted a core, by the kernel's account of the last minute
    rounds: int
    streams: int
    events_a_s: float
    sync_ms: Spread
    rows: list[Row]
    growth_kb: float | None
    left_out: dict[str, str]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """The targets that no round has reached."""
        return missed(self.targets)


def targets_of(rows: Mapping[str, Row], growth_kb: float | None) -> list[Target]:
    """By the best rounds: what disturbs one only adds."""

    def most(what: str, bound: float, found: float | None, unit: str = "") -> Target:
        return Target(what, bound, False, None if found is None else Spread.of([found]), unit)

    ours, direct = rows.get(OURS), rows.get(DIRECT)

    def added(name: str) -> float | None:
        if ours is None or direct is None:
            return None
        return float(getattr(ours, name).low - getattr(direct, name).low)

    in_time = None if ours is None else Spread.of([ours.in_time.high])
    return [
        most("added to the first event, p50", FIRST_MS_MAX, added("first_p50"), " ms"),
        most("added to each other, p50", EVENT_MS_MAX, added("event_p50"), " ms"),
        most("added to each other, p99", EVENT_MS_MAX, added("event_p99"), " ms"),
        Target("events of all streams that come before the next is due", IN_TIME_MIN, True, in_time),
        most("CPU of an event", CPU_US_MAX, None if ours is None else ours.cpu_us.low, " µs"),
        most("memory for a reader of a kilobyte a second", GROWTH_KB_MAX, growth_kb, " kB"),
    ]


def show(figures: Figures, console: Console) -> None:
    """Tables; each figure is the median of the rounds, with the least and the greatest."""
    console.print(
        f"{figures.machine}; {figures.busy:.0f} processes want a core; {figures.rounds} rounds in turns; a durable "
        f"write takes the disk {figures.sync_ms} ms; {figures.streams} streams, {figures.events_a_s:,.0f} events/s",
        soft_wrap=True,
    )
    columns = ["", "first event, p50 ms", "others, p50", "p99", "all: delay, p50", "p99", "in time", "CPU/event, µs"]
    rows = [
        [row.name, row.first_p50, row.event_p50, row.event_p99, row.delay_p50, row.delay_p99, row.in_time, row.cpu_us]
        for row in figures.rows
    ]
    print_table(console, columns, rows)
    for name, why in figures.left_out.items():
        console.print(f"{name} is left out: {why}", markup=False)
    print_targets(console, figures.targets)
