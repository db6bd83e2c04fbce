"""The figures as tables and as a picture."""

from collections.abc import Sequence

from rich.console import Console

from bench.engine.figures import CORPORA, IN_WORDS, ONE, SPREAD_MAX, ContenderRow, Figures, Ratio, is_settled
from bench.rig import svg
from bench.rig.figures import print_targets
from bench.rig.tables import print_figures, print_table

BAR, GAP, LEFT, WIDTH, RIGHT, TOP = 16, 22, 230, 460, 190, 48  # pixels


def show(figures: Figures, console: Console) -> None:
    """The figures for a person."""
    rows = [
        (
            row.name,
            *(f"{row.tokens_per_s[name].median:,.0f}" if name in row.tokens_per_s else "-" for name in CORPORA),
            f"{row.single_p50_ms:.2f}",
        )
        for row in figures.rows
    ]
    columns = "tokens/s, medians", *(IN_WORDS[name] for name in CORPORA), f"{IN_WORDS[ONE]}, ms"
    print_table(console, columns, rows)
    columns = "", "version", "p99 of one text, ms", "start s", "memory MB", "cosine: least", "mean"
    print_table(console, columns, map(_contender, figures.rows))
    columns = "times as fast", "rounds", "median", "95 % interval", "spread", ""
    print_table(console, columns, map(_ratio, figures.ratios))
    if figures.large is not None:
        print_figures(figures.large, console, "a large model")
    if figures.node is not None:
        print_figures(figures.node, console, "a node")
    print_targets(console, figures.targets)
    for row in figures.rows:
        if row.share_of_peak:
            shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row.share_of_peak.items())
            console.print(f"{row.name}, share of the peak: {shares}.")
    for name, peak in figures.peaks.items():
        console.print(
            f"Peak of {figures.threads} threads, {name}: {peak.gflops:,.0f} GFLOP/s (one: {peak.one_gflops:,.0f}; "
            f"{peak.per_cycle:.2f} multiply-adds a cycle at {peak.clock_ghz:.2f} GHz)."
        )
    if figures.disturbed_rounds:
        console.print(f"{figures.disturbed_rounds} rounds of a row were not taken: other processes worked meanwhile.")
    console.print(f"{figures.machine}; kind: {figures.kind}.")
    for name, why in figures.left_out.items():
        console.print(f"Left out: {name}: {why}.", markup=False)


def _contender(row: ContenderRow) -> Sequence[str]:
    times = f"{row.single_p99_ms:.2f}", f"{row.start_s:.2f}"
    return row.name, row.version, *times, f"{row.resident_mb:,.0f}", *(f"{each:.5f}" for each in row.cosine)


def _ratio(ratio: Ratio) -> Sequence[str]:
    if ratio.interval is None or ratio.spread is None:
        return ratio.what, str(ratio.rounds), f"{ratio.median:.3f}", "-", "-", "too few rounds"
    low, high = ratio.interval
    words = "" if is_settled(ratio) else f"not below {100 * SPREAD_MAX:.0f} %"
    return (
        ratio.what,
        str(ratio.rounds),
        f"{ratio.median:.3f}",
        f"{low:.3f} - {high:.3f}",
        f"{100 * ratio.spread:.1f} %",
        words,
    )


def plot(figures: Figures, ours: Sequence[str]) -> str:
    """Tokens a second by corpus and contender, as bars; `ours` have another colour.

    A thin line spans the smallest and largest of the rounds.
    """
    parts, y = [], TOP
    longest = max((spread.high for row in figures.rows for spread in row.tokens_per_s.values()), default=1.0)
    for corpus in CORPORA:
        parts.append(svg.text(8, y + 12, IN_WORDS[corpus], bold=True))
        y += BAR + 4
        took_part = [each for each in figures.rows if corpus in each.tokens_per_s]
        for row in sorted(took_part, key=lambda each: each.tokens_per_s[corpus].median):
            parts += _bar(y, row, corpus, svg.OURS if row.name in ours else svg.THEIRS, WIDTH / longest)
            y += BAR + 2
        y += GAP
    title = f"Tokens a second, {figures.threads} threads of {figures.machine}; medians of interleaved rounds"
    return svg.picture(LEFT + WIDTH + RIGHT, y, title, parts)


def _bar(y: float, row: ContenderRow, corpus: str, colour: str, scale: float) -> list[str]:
    spread, middle = row.tokens_per_s[corpus], y + BAR / 2
    low, high = LEFT + spread.low * scale, LEFT + spread.high * scale
    label = f"{spread.median:,.0f}"
    return [
        svg.text(LEFT - 8, y + 12, row.name, anchor="end"),
        svg.bar(LEFT, y, spread.median * scale, BAR, colour),
        svg.line(low, high, middle, middle, svg.INK),
        svg.text(high + 6, y + 12, label),
    ]
