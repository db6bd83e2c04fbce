"""What was measured, and what it is to reach."""

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from bench.gateway.contenders import Measurable
from bench.gateway.measure import Measured
from bench.rig.figures import Spread, Target, missed

TOKENS = 28  # of each text
BESIDE_PEERS = (("nginx", 0.16, 0.25), ("vllm-router", 0.40, 0.65), ("Portkey", 7.5, 11), ("LiteLLM", 75, 110))
"""Our requests a second over theirs: at least this, and what we aim at."""
NOTHING = 1e-9  # in place of 0: such a row has answers that were not right


class AtRate(msgspec.Struct):
    """Times at a fixed rate, in milliseconds from the moment at which each request was due."""

    per_s: float
    p50_ms: float
    p99_ms: float


class GatewayRow(msgspec.Struct):
    """One gateway. `bad` are answers that were not right."""

    name: str
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # a request, of all its processes
    cpu_s_per_million_tokens: float
    rss_mb: float
    first_s: float
    bad: int
    at: list[AtRate]

    @classmethod
    def of(cls, name: str, contender: Measurable, closed: Measured, at_rates: Sequence[Measured]) -> "GatewayRow":
        """From what was measured in one round."""
        at = [AtRate(one.load.per_s, one.load.p50_us / 1e3, one.load.p99_us / 1e3) for one in at_rates]
        bad = closed.load.bad + sum(one.load.bad for one in at_rates)
        p50_ms, p99_ms = closed.load.p50_us / 1e3, closed.load.p99_us / 1e3
        cpu_us, tokens = closed.cpu_us, TOKENS * (16 if "16 texts" in name else 1)
        times = closed.load.per_s, p50_ms, p99_ms, cpu_us, cpu_us / tokens
        return cls(name, *times, closed.rss_mb, contender.first_s, bad, at)


class Figures(msgspec.Struct):
    """All of it. `left_out` says why."""

    machine: str
    rounds: int
    seconds: float
    rows: list[GatewayRow]
    left_out: dict[str, str]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """The targets that were missed, in words."""
        return missed(self.targets)


def median_row(rows: Sequence[GatewayRow]) -> GatewayRow:
    """Of several rounds; what was bad in any of them is added up."""
    first = rows[0]
    at = [
        AtRate(*(median(values) for values in zip(*map(msgspec.structs.astuple, rates), strict=True)))
        for rates in zip(*(row.at for row in rows), strict=True)
    ]
    names = ("requests_per_s", "p50_ms", "p99_ms", "cpu_us", "cpu_s_per_million_tokens", "rss_mb")
    values = {name: median(getattr(row, name) for row in rows) for name in names}
    return GatewayRow(name=first.name, **values, first_s=first.first_s, bad=sum(row.bad for row in rows), at=at)


def found_targets(rows: Mapping[str, GatewayRow]) -> list[Target]:
    """Those whose rows were measured."""
    found: list[Target] = []

    def at_most(words: str, value: float, bound: float, aim: float | None = None) -> None:
        found.append(Target(words, bound, False, Spread.of([value]), aim=aim))

    def ratio(
        words: str, one: str, other: str, of: str, at_least: bool, bound: float, aim: float | None = None
    ) -> None:
        first, second = rows.get(one), rows.get(other)
        if first is not None and second is not None:
            value = getattr(first, of) / (getattr(second, of) or NOTHING)
            found.append(Target(words, bound, at_least, Spread.of([value]), aim=aim))

    hold, per_s = "hold", "requests_per_s"
    for peer, gate, aim in BESIDE_PEERS:
        ratio(f"requests/s over {peer}", hold, peer, per_s, True, gate, aim)
    for peer, gate, aim in (("vllm-router", 0.30, 0.5), ("LiteLLM", 40, 60)):
        ratio(f"16 texts, over {peer}", f"{hold}, 16 texts", f"{peer}, 16 texts", per_s, True, gate, aim)
    ratio("CPU a request over nginx", hold, "nginx", "cpu_us", False, 6, 4)
    ratio("answers signed over not", "signed", "plain", "cpu_us", False, 1 / 0.9)
    ratio("hold over no hold", hold, "count", per_s, True, 0.70, 0.85)
    ratio("shared calls over not", hold, "alone", per_s, True, 1.2)
    ratio("CPU of 2 workers over 1, no hold", "count, 2 workers", "count", "cpu_us", False, 1 / 0.9)
    ratio("CPU of 2 workers over 1, SQLite", f"{hold}, 2 workers", hold, "cpu_us", False, 1 / 0.7)
    many = "hold, PostgreSQL, 2 workers"
    ratio("CPU of 2 workers over 1, PostgreSQL", many, "hold, PostgreSQL", "cpu_us", False, 1 / 0.85)
    ratio("memory over LiteLLM", hold, "LiteLLM", "rss_mb", False, 0.3)
    ratio("first answer over LiteLLM", hold, "LiteLLM", "first_s", False, 0.1)
    if (row := rows.get(hold)) is not None:
        for one in row.at:
            at_most(f"p50 at {one.per_s:.0f}/s, ms", one.p50_ms, 1.0)
            at_most(f"p99 at {one.per_s:.0f}/s, ms", one.p99_ms, 4.0)
        other = rows.get("alone")
        if other is not None and row.at:
            at_most("shared calls over not: p50 at 1,000/s", row.at[-1].p50_ms / (other.at[-1].p50_ms or NOTHING), 1.15)
    if rows:
        at_most("answers that were not right", sum(row.bad for row in rows.values()), 0)
    return found
