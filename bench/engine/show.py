"""The figures as tables and as a picture."""

from collections.abc import Sequence

from rich.console import Console

from bench.engine.figures import ContenderRow, Figures
from bench.rig import svg
from bench.rig.figures import print_targets
from bench.rig.tables import print_table

BAR, GAP, LEFT, WIDTH, RIGHT, TOP = 16, 22, 230, 460, 190, 48  # pixels


def show(figures: Figures, console: Console) -> None:
    """The figures for a person."""
    corpora = [
        f"{corpus}: {texts} texts, mean {figures.tokens[corpus] / texts:.0f} tokens"
        for corpus, texts in figures.texts.items()
    ]
    rows: list[tuple[object, ...]] = []
    rows += [(row.name, *(row.texts_per_s[corpus] for corpus in figures.texts)) for row in figures.rows]
    rows += [
        (f"{row.name}: tokens/s", *(f"{row.tokens_per_s[corpus].median:,.0f}" for corpus in figures.texts))
        for row in figures.rows
    ]
    columns = "texts/s: median (smallest - largest)", *corpora
    print_table(console, columns, rows, f"{figures.rounds} interleaved rounds")
    columns = "", "version", "one short text: p50 ms", "p99 ms", "start s", "memory MB", "cosine: least", "mean"
    print_table(console, columns, map(_contender, figures.rows))
    print_targets(console, figures.targets)
    peaks = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in figures.peaks_gflops.items())
    console.print(f"Peak of {figures.threads} threads of {figures.machine}: {peaks}.")
    for name, why in figures.left_out.items():
        console.print(f"Left out: {name}: {why}.", markup=False)


def _contender(row: ContenderRow) -> Sequence[str]:
    times = f"{row.single_p50_ms:.2f}", f"{row.single_p99_ms:.2f}", f"{row.start_s:.2f}"
    return row.name, row.version, *times, f"{row.resident_mb:,.0f}", *(f"{each:.5f}" for each in row.cosine)


def plot(figures: Figures, ours: Sequence[str]) -> str:
    """Tokens a second by corpus and contender, as bars; `ours` have another colour.

    A thin line spans the smallest and largest of the rounds.
    """
    parts, y = [], TOP
    longest = max(spread.high for row in figures.rows for spread in row.tokens_per_s.values())
    for corpus, texts in figures.texts.items():
        words = f"{corpus}: {texts} texts of {figures.tokens[corpus] / texts:.0f} tokens on average"
        parts.append(svg.text(8, y + 12, words, bold=True))
        y += BAR + 4
        for row in sorted(figures.rows, key=lambda each: each.tokens_per_s[corpus].median):
            parts += _bar(y, row, corpus, svg.OURS if row.name in ours else svg.THEIRS, WIDTH / longest)
            y += BAR + 2
        y += GAP
    title = f"Tokens a second, {figures.threads} threads of {figures.machine}; median of {figures.rounds} rounds"
    return svg.picture(LEFT + WIDTH + RIGHT, y, title, parts)


def _bar(y: float, row: ContenderRow, corpus: str, colour: str, scale: float) -> list[str]:
    spread, middle = row.tokens_per_s[corpus], y + BAR / 2
    low, high = LEFT + spread.low * scale, LEFT + spread.high * scale
    label = f"{spread.median:,.0f} ({row.texts_per_s[corpus].median:,.0f} texts/s)"
    return [
        svg.text(LEFT - 8, y + 12, row.name, anchor="end"),
        svg.bar(LEFT, y, spread.median * scale, BAR, colour),
        svg.line(low, high, middle, middle, svg.INK),
        svg.text(high + 6, y + 12, label),
    ]
