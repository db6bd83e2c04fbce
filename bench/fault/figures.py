"""What was found, and what it should have been."""

import statistics
from collections.abc import Sequence

import msgspec
from rich.console import Console

from bench.fault.load import Record
from bench.fault.pair import TierComparison
from bench.faultnode.modes import MODES
from bench.rig.command import wrong
from bench.rig.figures import percentile
from bench.rig.tables import print_figures, print_table

LIAR_ANSWERS_MAX = 300  # until it is quarantined
DEAD_S_MAX = 15.0  # until a node that hangs is out
P99_RATIO_MAX = 1.2  # with the bad node out, over the good ones alone
FULL_RATIO_MAX = 2.0  # beside a node that refuses all: each second one request may find out that it still does
RATIO_MIN = 0.9  # of a dialled node's throughput
NEIGHBOURS = 3  # cells on either side whose seconds before count as one's own: the machine is not always equally fast


class Times(msgspec.Struct, frozen=True):
    """Of the requests that were served, in milliseconds."""

    count: int
    p50: float
    p99: float

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Times":
        took = [1000 * record.took_s for record in records if record.served]
        return cls(len(took), percentile(took, 50), percentile(took, 99))


def median_p99(seconds: Sequence[Times]) -> float:
    """One slow second is the machine; half of them are us."""
    return statistics.median(each.p99 for each in seconds)


class CellRow(msgspec.Struct):
    """One cell. `before` are the good nodes alone, `after` the same with the bad one out."""

    name: str
    mode: str
    share: float
    via: str
    third: bool
    at_once: bool
    spares_probes: bool
    requests: int
    served: int
    refused: dict[str, int]
    wrong_vectors: int
    wrong_when_out: int
    became: str
    out_s: float | None
    out_answers: int | None
    answers: int
    came_back: bool
    before: list[Times]
    during: Times
    after: list[Times]
    failures: dict[str, int]
    state: str
    last_failure: str | None
    honest_out: int
    honest_failed: int
    users: list[str] = []  # of its requests; dropped once they are joined with the ledger
    charged: int = 0
    charged_wrongly: int = 0  # served without exactly one charge of the cost in its reply, or charged and not served
    base_p99: float = 0.0  # before, of it and its neighbours

    @property
    def after_p99(self) -> float | None:
        """Median of its seconds."""
        return median_p99(self.after) if self.after else None

    @property
    def turned(self) -> bool:
        """Whether it began to lie when it had long been trusted with work: no check can see that, only a canary."""
        return MODES[self.mode].family == "lies" and not self.at_once

    def missed(self) -> list[str]:
        """Which targets, in words."""
        mode = MODES[self.mode]
        out_s = self.out_s if self.out_s is not None else float("inf")
        answers = self.out_answers if self.out_answers is not None else self.answers
        lies, ratio = mode.family == "lies", (self.after_p99 or 0.0) / (self.base_p99 or 1.0)
        full = self.during.p99 / (self.base_p99 or 1.0) if mode.family == "busy" else 0.0
        late = lies and (self.became != "quarantined" or answers > LIAR_ANSWERS_MAX)
        always = self.share == 1.0 and not self.spares_probes  # its probes say that it works
        conditions: dict[str, object] = {
            f"{self.requests - self.served} of {self.requests} callers not served": self.served < self.requests,
            f"{self.wrong_vectors} wrong vectors": bool(self.wrong_vectors) and not self.turned,
            f"{self.wrong_when_out} wrong vectors once it was out": bool(self.wrong_when_out),
            f"{self.charged_wrongly} charges are wrong": bool(self.charged_wrongly),
            f"not quarantined after {answers} answers": late,
            f"out only after {out_s:.1f} s": mode.family == "dead" and always and out_s > DEAD_S_MAX,
            f"p99 is {ratio:.2f} times what it was, with the node out": ratio > P99_RATIO_MAX,
            f"p99 is {full:.2f} times what it was, beside a node that is full": full > FULL_RATIO_MAX,
            f"{self.honest_out} honest nodes were put out": bool(self.honest_out or self.honest_failed),
            "an honest node was put out": mode.family == "well" and self.out_s is not None,
        }
        return wrong(conditions)


class Whole(msgspec.Struct):
    """One thing done to a whole node under load."""

    name: str
    requests: int
    failed: int
    refused: dict[str, int]
    worst_ms: float
    wrong_vectors: int
    users: list[str] = []
    charged: int = 0
    charged_wrongly: int = 0

    def missed(self) -> list[str]:
        """Which targets, in words."""
        conditions: dict[str, object] = {
            f"{self.failed} of {self.requests} callers saw an error": self.failed,
            f"{self.wrong_vectors} wrong vectors": self.wrong_vectors,
            f"{self.charged_wrongly} charges are wrong": self.charged_wrongly,
        }
        return wrong(conditions)


class Saturated(msgspec.Struct):
    """Requests a second of as many callers as a node can take: one with an address, one that dials out."""

    name: str
    address_per_s: float
    dialled_per_s: float
    ratios: list[float]
    failed: int = 0

    @property
    def ratio(self) -> float:
        """The median of the rounds'."""
        return statistics.median(self.ratios)

    def missed(self) -> list[str]:
        """Which targets, in words."""
        conditions: dict[str, object] = {
            f"a node that dials out has {self.ratio:.2f} of the throughput": self.ratio < RATIO_MIN,
            f"{self.failed} callers saw an error": self.failed > 0,
        }
        return wrong(conditions)


class Figures(msgspec.Struct):
    """All of it."""

    seconds: float
    load_average: float
    rows: list[CellRow]
    wholes: list[Whole]
    saturated: list[Saturated]
    ledger_ok: bool
    open_holds: int
    internal_errors: int
    pair: TierComparison | None = None

    @property
    def broken(self) -> list[str]:
        """Every target that was missed, with where; nothing when all is well."""
        missed = [f"{row.name} {row.share:g}: {words}" for row in self.rows for words in row.missed()]
        missed += [f"{whole.name}: {words}" for whole in self.wholes for words in whole.missed()]
        missed += [f"{each.name}: {words}" for each in self.saturated for words in each.missed()]
        ends: dict[str, object] = {
            "`ledger check` found something": not self.ledger_ok,
            f"{self.open_holds} holds are still open": self.open_holds,
            f"{self.internal_errors} internal errors were logged": self.internal_errors,
            "an honest node in another tier would have been quarantined": self.pair is not None and self.pair.below,
        }
        return missed + wrong(ends)


def set_bases(rows: Sequence[CellRow]) -> None:
    """What p99 is to be compared with: the median of the seconds before, a row's own and its neighbours'."""
    for at, row in enumerate(rows):
        near = [other for other in rows[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1] if other.third == row.third]
        row.base_p99 = median_p99([each for other in near for each in other.before])


def show(figures: Figures, console: Console) -> None:
    """Tables for a person."""
    columns = (
        "mode",
        "share",
        "served %",
        "wrong",
        "charges",
        "out s",
        "answers",
        "p50/p99 ms before",
        "during",
        "after",
    )
    print_table(console, (*columns, "failed attempts", "at the end"), map(_cells, figures.rows))
    print_figures(msgspec.structs.replace(figures, rows=[]), console)
    turned = [
        f"{row.name} {row.share:g}: {row.wrong_vectors}" for row in figures.rows if row.turned and row.wrong_vectors
    ]
    console.print(f"Wrong vectors of nodes that turned, until a canary found them: {', '.join(turned) or 'none'}.")


def in_a_line(row: CellRow) -> str:
    """A row, as it is found."""
    served = 100 * row.served / max(1, row.requests)
    out = f"{row.became} after {row.out_s:.1f} s, {row.out_answers} answers" if row.out_s is not None else "stays"
    return f"{row.name:26} {row.share:<4g} {served:6.2f} % served, {row.wrong_vectors:4} wrong, {out}"


def _cells(row: CellRow) -> list[str]:
    before = f"{statistics.median(each.p50 for each in row.before):.0f}/{row.base_p99:.0f}"
    after = "-"
    if row.after:
        after = f"{statistics.median(each.p50 for each in row.after):.0f}/{row.after_p99:.0f}"
    state = row.state + (" (was out, came back)" if row.came_back else "")
    return [
        row.name,
        f"{row.share:g}" + (" dialled" if row.via == "dials out" else ""),
        f"{100 * row.served / max(1, row.requests):.2f}",
        str(row.wrong_vectors),
        f"{row.charged:,}" + (f", {row.charged_wrongly} wrong" if row.charged_wrongly else ""),
        "-" if row.out_s is None else f"{row.out_s:.1f}",
        str(row.answers) if row.out_answers is None else str(row.out_answers),
        before,
        f"{row.during.p50:.0f}/{row.during.p99:.0f}",
        after,
        ", ".join(f"{name} {count}" for name, count in row.failures.items()) or "-",
        state,
    ]
