"""What was measured, and the gates that it is to pass."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from statistics import median
from typing import Literal

import msgspec

from bench.gateway.contenders import Measurable
from bench.gateway.measure import Measured

TOKENS = 28  # of each text
HELD_MIN = 0.95  # of a rate: what was answered of it in time
HOLD, DIRECT = "hold", "direct"
POSTGRES = f"{HOLD}, PostgreSQL"
RATES = (200.0, 1_000.0)  # requests a second, open loop

Rounds = Mapping[str, Sequence["GatewayRow"]]
"""By label, a row a round."""


class AtRate(msgspec.Struct):
    """Times at a fixed rate, in milliseconds from the moment at which each request was due. Infinite where it was not
    held: what was answered too late is not among the times."""

    per_s: float
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, rate: float, found: Measured) -> "AtRate":
        """`rate` is what was asked for."""
        held = found.load.per_s >= HELD_MIN * rate
        return cls(rate, found.load.p50_us / 1e3 if held else inf, found.load.p99_us / 1e3 if held else inf)


class GatewayRow(msgspec.Struct):
    """One gateway in one round, or the medians of all. `bad` are answers that were not right."""

    name: str
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # a request, of all its processes, as the kernel accounts for it
    cpu_us_min: float
    cpu_s_per_million_tokens: float
    rss_mb: float
    first_s: float
    bad: int
    at: list[AtRate]

    @classmethod
    def of(
        cls, name: str, inputs: int, contender: Measurable, closed: Measured, at_rates: Sequence[Measured]
    ) -> "GatewayRow":
        """From what was measured in one round."""
        at = [AtRate.of(rate, one) for rate, one in zip(RATES, at_rates, strict=False)]
        bad = closed.load.bad + sum(one.load.bad for one in at_rates)
        cpu_us = closed.cpu_us
        return cls(
            name=name,
            requests_per_s=closed.load.per_s,
            p50_ms=closed.load.p50_us / 1e3,
            p99_ms=closed.load.p99_us / 1e3,
            cpu_us=cpu_us,
            cpu_us_min=cpu_us,
            cpu_s_per_million_tokens=cpu_us / (TOKENS * inputs),
            rss_mb=closed.rss_mb,
            first_s=contender.first_s,
            bad=bad,
            at=at,
        )


def median_row(rows: Sequence[GatewayRow]) -> GatewayRow:
    """Of several rounds, and the least CPU of them; what was bad in any of them is added up."""
    first = rows[0]
    at = [
        AtRate(*(median(values) for values in zip(*map(msgspec.structs.astuple, rates), strict=True)))
        for rates in zip(*(row.at for row in rows), strict=True)
    ]
    names = ("requests_per_s", "p50_ms", "p99_ms", "cpu_us", "cpu_s_per_million_tokens", "rss_mb")
    values = {name: median(getattr(row, name) for row in rows) for name in names}
    least, bad = min(row.cpu_us for row in rows), sum(row.bad for row in rows)
    return GatewayRow(name=first.name, **values, cpu_us_min=least, first_s=first.first_s, bad=bad, at=at)


Verdict = Literal["pass", "not yet", "not measured"]


class Gate(msgspec.Struct):
    """What is to be reached. `best` compares the best rounds of both sides, what disturbs a round only makes it worse;
    `middle` is the median of the rounds' own. None: not measured, `what` says what does."""

    what: str
    gate: float
    at_least: bool
    aim: float | None = None
    best: float | None = None
    middle: float | None = None

    @property
    def verdict(self) -> Verdict:
        """It passes where both do."""
        if self.best is None or self.middle is None:
            return "not measured"
        if self.at_least:
            return "pass" if min(self.best, self.middle) >= self.gate else "not yet"
        return "pass" if max(self.best, self.middle) <= self.gate else "not yet"


class Figures(msgspec.Struct):
    """All of it. `left_out` says why."""

    machine: str
    rounds: int
    seconds: float
    rows: list[GatewayRow]
    left_out: dict[str, str]
    gates: list[Gate]

    @property
    def broken(self) -> list[str]:
        """The gates that are not passed, in words, and wrong answers."""
        found = [f"{gate.what}: {gate.middle:.3g}" for gate in self.gates if gate.verdict == "not yet"]
        return found + [f"{row.name}: {row.bad} answers that were not right" for row in self.rows if row.bad]


Value = Callable[[GatewayRow], float]


def cpu(row: GatewayRow) -> float:
    """Microseconds a request."""
    return row.cpu_us


def per_cpu_s(row: GatewayRow) -> float:
    """Requests a second of CPU."""
    return 1e6 / row.cpu_us


def per_s(row: GatewayRow) -> float:
    """Requests a second."""
    return row.requests_per_s


def ratio(rounds: Rounds, one: str, other: str, value: Value, *, more_is_better: bool) -> tuple[float, float] | None:
    """Of the best rounds, and the median of the rounds'; None where one of the two was not measured, or had a round
    without a right answer."""
    first, second = list(map(value, rounds.get(one, ()))), list(map(value, rounds.get(other, ())))
    if not first or not second or not all(0 < each < inf for each in (*first, *second)):
        return None
    best = max if more_is_better else min
    return best(first) / best(second), median(a / b for a, b in zip(first, second, strict=True))


def added(rounds: Rounds, number: int, value: Callable[[AtRate], float]) -> tuple[float, float] | None:
    """Milliseconds that HOLD adds to DIRECT at a rate, likewise."""
    ours, direct = rounds.get(HOLD), rounds.get(DIRECT)
    if not ours or not direct:
        return None
    pairs = [(value(a.at[number]), value(b.at[number])) for a, b in zip(ours, direct, strict=True)]
    if any(b == inf for _, b in pairs):
        return None
    best = min(a for a, _ in pairs) - min(b for _, b in pairs)
    return best, median(a - b for a, b in pairs)


CPU_OVER = (
    # ours, theirs, gate, aim
    ("CPU over vllm-router, 1 key", HOLD, "vllm-router", 1.1, 0.8),
    ("CPU over vllm-router, 100 keys", f"{HOLD}, 100 keys", "vllm-router", 1.3, 1.0),
    ("CPU over vllm-router, 1,000 keys", f"{HOLD}, 1,000 keys", "vllm-router", 1.8, 1.3),
    ("CPU over vllm-router, 16 texts", f"{HOLD}, 16 texts", "vllm-router, 16 texts", 1.5, 1.0),
)
PER_CPU_S_OVER = (
    # on a core that does nothing else this is requests a second
    ("requests/s a core over nginx", HOLD, "nginx", 0.27, 0.35),
    ("requests/s a core over vllm-router", HOLD, "vllm-router", 0.9, 1.2),
    ("requests/s a core over Portkey", HOLD, "Portkey", 30, 45),
    ("requests/s a core over LiteLLM", HOLD, "LiteLLM", 300, 450),
    ("requests per CPU-second, answers signed over not", "signed", "plain", 0.9, 0.95),
    ("requests per CPU-second, 2 workers over 1, no hold", "count, 2 workers", "count", 0.95, 1.0),
    ("requests per CPU-second, 2 workers over 1, SQLite", f"{HOLD}, 2 workers", HOLD, 0.85, 1.0),
    ("requests per CPU-second, 2 workers over 1, PostgreSQL", f"{POSTGRES}, 2 workers", POSTGRES, 0.9, 1.0),
)
PER_S_OVER = (("requests/s, hold on over off", HOLD, "count", 0.88, 0.95),)
ELSEWHERE = (
    ("SQL a request at 32 a batch, SQLite, us (make bench-store)", 14, 10),
    ("SQL a request at 32 a batch, PostgreSQL, us (make bench-store)", 130, 85),
    ("one short text over the engine in process, ms (python -m bench.latency)", 1.2, 0.8),
)


def found_gates(rounds: Rounds) -> list[Gate]:
    """All, with what was measured of them."""

    def gate(
        what: str, bound: float, at_least: bool, aim: float | None, found: tuple[float, float] | None = None
    ) -> Gate:
        best, middle = found or (None, None)
        return Gate(what, bound, at_least, aim, best, middle)

    gates = [
        gate(what, bound, False, aim, ratio(rounds, ours, theirs, cpu, more_is_better=False))
        for what, ours, theirs, bound, aim in CPU_OVER
    ]
    for value, over in ((per_cpu_s, PER_CPU_S_OVER), (per_s, PER_S_OVER)):
        gates += [
            gate(what, bound, True, aim, ratio(rounds, ours, theirs, value, more_is_better=True))
            for what, ours, theirs, bound, aim in over
        ]
    for number, (p50, p99) in enumerate(((0.9, 4.0), (0.4, 2.5))):
        words = f"added over direct at {RATES[number]:,.0f}/s, ms"
        gates.append(gate(f"p50 {words}", p50, False, 0.5 if p50 > 0.5 else None, added(rounds, number, p50_of)))
        gates.append(gate(f"p99 {words}", p99, False, 2.0, added(rounds, number, p99_of)))
    return gates + [gate(what, bound, False, aim) for what, bound, aim in ELSEWHERE]


def p50_of(at: AtRate) -> float:
    """Milliseconds."""
    return at.p50_ms


def p99_of(at: AtRate) -> float:
    """Milliseconds."""
    return at.p99_ms
