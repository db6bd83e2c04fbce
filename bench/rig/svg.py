"""Pictures for the docs, as SVG."""

from collections.abc import Iterable
from html import escape

OURS, THEIRS, FAINT, INK = "#2563a8", "#a8a29e", "#e7e5e4", "#1c1917"


def text(x: float, y: float, words: str, *, bold: bool = False, anchor: str = "start", colour: str = INK) -> str:
    """Words whose baseline starts, ends or is centred at a point."""
    weight = "bold" if bold else "normal"
    place = f'x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"


def bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}"/>'


def line(x1: float, x2: float, y1: float, y2: float, colour: str, opacity: float = 1.0) -> str:
    """A thin straight line."""
    ends = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-opacity="{opacity:g}"/>'


def picture(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """The whole file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
        f"{text(8, 22, title, bold=True)}{''.join(parts)}</svg>\n"
    )
