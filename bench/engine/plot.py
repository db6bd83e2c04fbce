"""A bar chart as SVG: tokens a second by corpus and contender."""

from collections.abc import Mapping, Sequence
from html import escape

from bench.engine.figures import Figures, Row

BAR, GAP, LEFT, WIDTH, RIGHT, TOP = 16, 22, 230, 460, 190, 48  # pixels
OURS, THEIRS = "#2563a8", "#a8a29e"


def plot(figures: Figures, ours: Sequence[str]) -> str:
    """The picture; `ours` are drawn in another colour. A thin line spans the smallest and largest of the rounds."""
    parts, y = [], TOP
    longest = max(spread.high for row in figures.rows for spread in row.tokens_per_s.values())
    for corpus in figures.texts:
        parts.append(_text(8, y + 12, _corpus_words(figures, corpus), "bold"))
        y += BAR + 4
        for row in sorted(figures.rows, key=lambda each: each.tokens_per_s[corpus].median):
            parts.append(_bar(y, row, corpus, OURS if row.name in ours else THEIRS, WIDTH / longest))
            y += BAR + 2
        y += GAP
    width = LEFT + WIDTH + RIGHT
    title = f"Tokens a second, {figures.threads} threads of {figures.machine}; median of {figures.rounds} rounds"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{y}" fill="white"/>'
        f"{_text(8, 22, title, 'bold')}{''.join(parts)}</svg>\n"
    )


def _corpus_words(figures: Figures, corpus: str) -> str:
    texts, tokens = figures.texts[corpus], figures.tokens[corpus]
    return f"{corpus}: {texts} texts of {tokens / texts:.0f} tokens on average"


def _bar(y: int, row: Row, corpus: str, colour: str, scale: float) -> str:
    spread: Mapping[str, float] = {
        "low": LEFT + row.tokens_per_s[corpus].low * scale,
        "high": LEFT + row.tokens_per_s[corpus].high * scale,
    }
    width, middle = row.tokens_per_s[corpus].median * scale, y + BAR / 2
    label = f"{row.tokens_per_s[corpus].median:,.0f} ({row.texts_per_s[corpus].median:,.0f} texts/s)"
    return (
        f"{_text(LEFT - 8, y + 12, row.name, 'normal', 'end')}"
        f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>'
        f'<line x1="{spread["low"]:.1f}" x2="{spread["high"]:.1f}" y1="{middle}" y2="{middle}" stroke="black"/>'
        f"{_text(round(spread['high']) + 6, y + 12, label)}"
    )


def _text(x: int, y: int, words: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}" text-anchor="{anchor}">{escape(words)}</text>'
