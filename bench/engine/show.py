"""The figures as tables for a person, the verdict last."""

from rich.console import Console
from rich.table import Table

from bench.engine.figures import GATE, Figures, Spread, Target

COLOURS = {"reached": "green", "within 10 %": "yellow", "missed": "red", "not measured": "dim"}


def show(figures: Figures, console: Console) -> None:
    """All of it."""
    console.print(_speeds(figures), _contenders(figures), _targets(figures))
    peaks = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in figures.peaks_gflops.items())
    console.print(f"Peak of {figures.threads} threads of {figures.machine}: {peaks}.")
    for name, why in figures.left_out.items():
        console.print(f"Left out: {name}: {why}.", markup=False)
    console.print(verdict(figures), markup=False)


def verdict(figures: Figures) -> str:
    """One line."""
    counts = {word: sum(target.verdict == word for target in figures.targets) for word in COLOURS}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    if not figures.missed:
        return f"Passed: {said}."
    return f"MISSED by more than {GATE:.0%}: {'; '.join(target.what for target in figures.missed)} ({said})."


def _speeds(figures: Figures) -> Table:
    table = Table("texts/s: median (smallest - largest)", title=f"{figures.rounds} interleaved rounds")
    for corpus, texts in figures.texts.items():
        table.add_column(f"{corpus}: {texts} texts, mean {figures.tokens[corpus] / texts:.0f} tokens", justify="right")
    for row in figures.rows:
        table.add_row(row.name, *(_spread(row.texts_per_s[corpus]) for corpus in figures.texts))
    table.add_section()
    for row in figures.rows:
        table.add_row(f"{row.name}: tokens/s", *(f"{row.tokens_per_s[name].median:,.0f}" for name in figures.texts))
    return table


def _contenders(figures: Figures) -> Table:
    table = Table("", "version", "one short text: p50 ms", "p99 ms", "start s", "memory MB", "cosine: least", "mean")
    for row in figures.rows:
        times = f"{row.single_p50_ms:.2f}", f"{row.single_p99_ms:.2f}", f"{row.start_s:.2f}"
        table.add_row(row.name, row.version, *times, f"{row.resident_mb:,.0f}", *(f"{each:.5f}" for each in row.cosine))
    return table


def _targets(figures: Figures) -> Table:
    table = Table("target", "at least / most", "found: median (smallest - largest)", "verdict")
    for target in figures.targets:
        colour = COLOURS[target.verdict]
        bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}{target.unit}"
        table.add_row(target.what, bound, _found(target), f"[{colour}]{target.verdict}[/]")
    return table


def _found(target: Target) -> str:
    return "-" if target.found is None else _spread(target.found)


def _spread(spread: Spread) -> str:
    def words(value: float) -> str:
        return f"{value:,.0f}" if value >= 50 else f"{value:.2f}"

    if spread.low == spread.high:
        return words(spread.median)
    return f"{words(spread.median)} ({words(spread.low)} - {words(spread.high)})"
