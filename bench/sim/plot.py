"""A picture of the 99th percentiles: a row a contender, a column a load, seconds on a logarithmic scale."""

import math
from html import escape

from bench.sim.figures import Cell, Figures
from bench.sim.scenarios import ORACLE, SCHEDULER

LEFT, WIDTH, BETWEEN, TOP, STEP, GAP = 130, 250, 20, 84, 14, 26  # pixels
LEAST_S, MOST_S = 0.003, 10_000.0
OURS, THEIRS, BOUND = "#2563a8", "#78716c", "#a8a29e"


def plot(figures: Figures, scenarios: tuple[str, ...], loads: tuple[int, ...]) -> str:
    """Of these, in this order. A filled dot is all requests, a hollow one the small ones."""
    parts, y = [], TOP
    for scenario in scenarios:
        parts.append(_text(8, y, scenario, "bold"))
        y += STEP + 2
        rows = dict.fromkeys(cell.contender for cell in figures.cells if cell.scenario == scenario)
        for contender in rows:
            colour = {SCHEDULER: OURS, ORACLE: BOUND}.get(contender, THEIRS)
            parts.append(
                _text(LEFT - 10, y + 4, contender, "bold" if contender == SCHEDULER else "normal", "end", colour)
            )
            for column, load in enumerate(loads):
                cell = figures.find(scenario, load, contender)
                if cell is not None:
                    parts.append(_dots(LEFT + column * (WIDTH + BETWEEN), y, cell, colour))
            y += STEP
        y += GAP
    bottom = y - GAP
    width = LEFT + len(loads) * (WIDTH + BETWEEN)
    grid = "".join(_grid(LEFT + at * (WIDTH + BETWEEN), bottom, f"{load} % load") for at, load in enumerate(loads))
    title = "99th percentile of the response time: ● all requests, ○ small ones"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{y}" fill="white"/>'
        f"{_text(8, 22, title, 'bold')}{grid}{''.join(parts)}</svg>\n"
    )


def _x(seconds: float) -> float:
    share = math.log(min(max(seconds, LEAST_S), MOST_S) / LEAST_S) / math.log(MOST_S / LEAST_S)
    return share * WIDTH


def _grid(left: float, bottom: float, words: str) -> str:
    parts = [_text(left, 46, words, "bold")]
    marks = ((0.01, "10 ms"), (0.1, ""), (1.0, "1 s"), (10.0, ""), (100.0, "100 s"), (1_000.0, ""), (10_000.0, "3 h"))
    for seconds, label in marks:
        x = left + _x(seconds)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="66" y2="{bottom}" stroke="#e7e5e4"/>')
        parts.append(_text(x, 62, label, "normal", "middle", THEIRS) if label else "")
    return "".join(parts)


def _dots(left: float, y: float, cell: Cell, colour: str) -> str:
    everything, small = left + _x(cell.all.p99), left + _x(cell.small.p99)
    return (
        f'<line x1="{small:.1f}" x2="{everything:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-opacity="0.4"/>'
        f'<circle cx="{everything:.1f}" cy="{y}" r="4" fill="{colour}"/>'
        f'<circle cx="{small:.1f}" cy="{y}" r="3.5" fill="white" stroke="{colour}" stroke-width="1.5"/>'
    )


def _text(
    x: float, y: float, words: str, weight: str = "normal", anchor: str = "start", colour: str = "#1c1917"
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"
