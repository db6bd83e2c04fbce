"""Medians, percentiles, ratios and targets, as every bench computes and prints them."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

CONFIDENCE = 0.95  # of an interval
Verdict = Literal["reached", "nearly reached", "missed", "not measured"]
COLOURS: dict[Verdict, str] = {
    "reached": "green",
    "nearly reached": "yellow",
    "missed": "red",
    "not measured": "dim",
}


class Spread(msgspec.Struct, frozen=True):
    """A figure over several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        def words(value: float) -> str:
            return f"{value:,.0f}" if abs(value) >= 50 else f"{value:.3g}"

        if self.low == self.high:
            return words(self.median)
        return f"{words(self.median)} ({words(self.low)} - {words(self.high)})"


class Target(msgspec.Struct, frozen=True):
    """A promise and what was found; `found` is None where it could not be measured."""

    what: str
    bound: float
    at_least: bool
    found: Spread | None
    unit: str = ""
    slack: float = 0.0  # the share of the bound by which a shared machine may miss it
    aim: float | None = None

    @property
    def verdict(self) -> Verdict:
        """How the median compares with the bound."""
        if self.found is None:
            return "not measured"
        found, bound = (self.found.median, self.bound) if self.at_least else (-self.found.median, -self.bound)
        if found >= bound:
            return "reached"
        return "nearly reached" if found >= bound - self.slack * abs(bound) else "missed"


def missed(targets: Iterable[Target]) -> list[str]:
    """The targets that were missed, each with what was found."""
    return [f"{each.what}: {each.found}{each.unit}" for each in targets if each.verdict == "missed"]


def print_targets(console: Console, targets: Sequence[Target]) -> None:
    """A table of targets."""
    table = Table("target", "at least / most", "aim", "found: median (smallest - largest)", "verdict")
    for target in targets:
        bound = f"{'≥' if target.at_least else '≤'} {target.bound:.3g}{target.unit}"
        aim = "" if target.aim is None else f"{target.aim:g}"
        verdict = f"[{COLOURS[target.verdict]}]{target.verdict}[/]"
        table.add_row(target.what, bound, aim, str(target.found or "-"), verdict)
    console.print(table)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` in a hundred do not exceed; 0 of no values."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Between which the true median is, with a probability of at least 95 %; None of fewer than six values.

    By order statistics, whatever the values' distribution is: each value is above the median with probability 1/2, so
    that the k-th smallest and k-th largest enclose it unless fewer than k are on one side (Conover, Practical
    Nonparametric Statistics, section 3.2).
    """
    count, beyond, outside = len(values), 0, 0.5 ** len(values)  # how many on either side lie outside, how probably
    while 2 * outside <= 1 - CONFIDENCE:
        beyond += 1
        outside += math.comb(count, beyond) * 0.5**count
    if not beyond:
        return None
    ordered = sorted(values)
    return ordered[beyond - 1], ordered[-beyond]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through points; 0 where all have one x."""
    xs, ys = np.array(points, dtype=float).reshape(-1, 2).T
    return float(np.polyfit(xs, ys, 1)[0]) if len(np.unique(xs)) > 1 else 0.0
