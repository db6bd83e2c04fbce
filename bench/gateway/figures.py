"""What was measured, and what it is to reach."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from bench.gateway.contenders import Contender
from bench.gateway.measure import Measured

TOKENS = 28  # of each text
BESIDE_PEERS = (("nginx", 0.16, 0.25), ("vllm-router", 0.40, 0.65), ("Portkey", 7.5, 11), ("LiteLLM", 75, 110))
"""At least so many of their requests a second, and what we aim at."""
NOTHING = 1e-9  # in place of none at all: such a row has answers that were not right


class AtRate(msgspec.Struct):
    """Times at a fixed rate, in milliseconds from the moment at which each request was due."""

    per_s: float
    p50_ms: float
    p99_ms: float


class Row(msgspec.Struct):
    """One gateway. `bad` are answers that were not right."""

    name: str
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # a request, of all its processes
    rss_mb: float
    first_s: float
    bad: int
    at: list[AtRate]

    @classmethod
    def of(cls, name: str, contender: Contender, closed: Measured, at_rates: Sequence[Measured]) -> "Row":
        """From what was measured in one round."""
        at = [AtRate(one.load.per_s, one.load.p50_us / 1e3, one.load.p99_us / 1e3) for one in at_rates]
        bad = closed.load.bad + sum(one.load.bad for one in at_rates)
        p50_ms, p99_ms = closed.load.p50_us / 1e3, closed.load.p99_us / 1e3
        return cls(name, closed.load.per_s, p50_ms, p99_ms, closed.cpu_us, closed.rss_mb, contender.first_s, bad, at)


class Figures(msgspec.Struct):
    """All of it. `left_out` says why."""

    machine: str
    rounds: int
    seconds: float
    rows: list[Row]
    left_out: dict[str, str]

    def find(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)


class Target(NamedTuple):
    """A ratio or a time. Where it is no more than `at_most`, or no less than `at_least`, it is met."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    aim: float | None = None

    @property
    def met(self) -> bool:
        """Whether it holds."""
        high = self.at_least is None or self.value >= self.at_least
        return high and (self.at_most is None or self.value <= self.at_most)


def median_row(rows: Sequence[Row]) -> Row:
    """Of several rounds; what was bad in any of them is added up."""

    def median(of: str) -> float:
        return statistics.median(getattr(row, of) for row in rows)

    first = rows[0]
    at = [
        AtRate(
            *(
                statistics.median(getattr(row.at[number], member) for row in rows)
                for member in ("per_s", "p50_ms", "p99_ms")
            )
        )
        for number in range(len(first.at))
    ]
    names = ("requests_per_s", "p50_ms", "p99_ms", "cpu_us", "rss_mb")
    values = {name: median(name) for name in names}
    return Row(name=first.name, **values, first_s=first.first_s, bad=sum(row.bad for row in rows), at=at)


def targets(figures: Figures) -> list[Target]:
    """Those whose rows were measured."""
    found: list[Target] = []

    def ratio(words: str, one: str, other: str, of: str, **bounds: float) -> None:
        first, second = figures.find(one), figures.find(other)
        if first is not None and second is not None:
            found.append(Target(words, getattr(first, of) / (getattr(second, of) or NOTHING), **bounds))

    hold, per_s = "hold", "requests_per_s"
    for peer, gate, aim in BESIDE_PEERS:
        ratio(f"requests/s over {peer}", hold, peer, per_s, at_least=gate, aim=aim)
    for peer, gate, aim in (("vllm-router", 0.30, 0.5), ("LiteLLM", 40, 60)):
        ratio(f"16 texts, over {peer}", f"{hold}, 16 texts", f"{peer}, 16 texts", per_s, at_least=gate, aim=aim)
    ratio("CPU a request over nginx", hold, "nginx", "cpu_us", at_most=6, aim=4)
    ratio("answers signed over not", "signed", "plain", "cpu_us", at_most=1 / 0.9)
    ratio("hold over no hold", hold, "count", per_s, at_least=0.70, aim=0.85)
    ratio("shared calls over not", hold, "alone", per_s, at_least=1.2)
    ratio("CPU of 2 workers over 1, no hold", "count, 2 workers", "count", "cpu_us", at_most=1 / 0.9)
    ratio("CPU of 2 workers over 1, SQLite", f"{hold}, 2 workers", hold, "cpu_us", at_most=1 / 0.7)
    many = "hold, PostgreSQL, 2 workers"
    ratio("CPU of 2 workers over 1, PostgreSQL", many, "hold, PostgreSQL", "cpu_us", at_most=1 / 0.85)
    ratio("memory over LiteLLM", hold, "LiteLLM", "rss_mb", at_most=0.3)
    ratio("first answer over LiteLLM", hold, "LiteLLM", "first_s", at_most=0.1)
    if (row := figures.find(hold)) is not None:
        for one in row.at:
            found.append(Target(f"p50 at {one.per_s:.0f}/s, ms", one.p50_ms, at_most=1.0))
            found.append(Target(f"p99 at {one.per_s:.0f}/s, ms", one.p99_ms, at_most=4.0))
        other = figures.find("alone")
        if other is not None and row.at:
            shared = row.at[-1].p50_ms / other.at[-1].p50_ms
            found.append(Target("shared calls over not: p50 at 1,000/s", shared, at_most=1.15))
    if figures.rows:
        found.append(Target("answers that were not right", sum(row.bad for row in figures.rows), at_most=0))
    return found
