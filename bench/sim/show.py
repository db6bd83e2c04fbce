"""The figures as tables, as Markdown for docs/choosing.md, and as a picture."""

import math
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.rig import svg
from bench.rig.figures import print_targets
from bench.sim.figures import Figures, SimCell
from bench.sim.scenarios import ORACLE, SCHEDULER

LEFT, WIDTH, BETWEEN, TOP, STEP, GAP = 130, 250, 20, 84, 14, 26  # pixels
LEAST_S, MOST_S = 0.003, 10_000.0
MARKS = ((0.01, "10 ms"), (0.1, ""), (1.0, "1 s"), (10.0, ""), (100.0, "100 s"), (1_000.0, ""), (10_000.0, "3 h"))
THEIRS = "#78716c"


def show(figures: Figures, console: Console) -> None:
    """The figures for a person."""
    for scenario in dict.fromkeys(cell.scenario for cell in figures.cells):
        console.print(_table(scenario, [cell for cell in figures.cells if cell.scenario == scenario]))
    queue = figures.queue
    console.print(
        f"One queue: waits of {queue.found_s:.2f} s on average, {queue.right_s:.2f} s by the formula "
        f"(standard error {queue.error_s:.2f} s); same seed, same figures: {'yes' if figures.same_twice else 'NO'}."
    )
    print_targets(console, figures.targets)


def _table(scenario: str, cells: Sequence[SimCell]) -> Table:
    title = f"{scenario}: {cells[0].requests:,} requests"
    table = Table("load", "contender", title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for words in ("p50", "p99", "p99.9", "small p50", "small p99", "small p99.9"):
        table.add_column(words, justify="right", no_wrap=True)
    for words in ("fairness", "Jain", "busy", "wasted", "failed", "µs"):
        table.add_column(words, justify="right", no_wrap=True)
    load = cells[0].load
    for cell in cells:
        if cell.load != load:
            table.add_section()
            load = cell.load
        table.add_row(
            f"{cell.load} %",
            cell.contender,
            *(seconds(value) for times in (cell.all, cell.small) for value in (times.p50, times.p99, times.p999)),
            *(f"{cell.fairness:.2f}", f"{cell.jain:.3f}", f"{cell.utilisation:.0%}", f"{cell.wasted:.1%}"),
            f"{cell.failed:,}" if cell.failed else "",
            f"{cell.cpu_us:,.0f}" if cell.contender == SCHEDULER else "",
            style={SCHEDULER: "bold", ORACLE: "dim"}.get(cell.contender),
        )
    return table


def markdown(figures: Figures) -> str:
    """The 99th percentiles of all requests and of small ones, a table for each scenario."""
    lines = []
    for scenario in dict.fromkeys(cell.scenario for cell in figures.cells):
        cells = [cell for cell in figures.cells if cell.scenario == scenario]
        loads = list(dict.fromkeys(cell.load for cell in cells))
        lines += [f"| {scenario} | {' | '.join(f'{load} %: all | small' for load in loads)} |"]
        lines += ["|---|" + "---|" * (2 * len(loads))]
        for contender in dict.fromkeys(cell.contender for cell in cells):
            found = [cell for cell in cells if cell.contender == contender]
            values = " | ".join(f"{seconds(cell.all.p99)} | {seconds(cell.small.p99)}" for cell in found)
            lines += [f"| {f'**{contender}**' if contender == SCHEDULER else contender} | {values} |"]
        lines += [""]
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time with a unit that suits it."""
    if value < 1:
        return f"{1000 * value:.3g} ms" if value < 0.1 else f"{1000 * value:.0f} ms"
    return f"{value:.3g} s" if value < 1_000 else f"{value:,.0f} s"


def plot(figures: Figures, scenarios: Sequence[str], loads: Sequence[int]) -> str:
    """The 99th percentiles: a row for each contender, a column for each load, seconds on a logarithmic scale.

    A filled dot is all requests, a hollow one the small ones.
    """
    parts: list[str] = []
    y = TOP
    columns = {load: LEFT + at * (WIDTH + BETWEEN) for at, load in enumerate(loads)}
    for scenario in scenarios:
        parts.append(svg.text(8, y, scenario, bold=True))
        y += STEP + 2
        for contender in dict.fromkeys(cell.contender for cell in figures.cells if cell.scenario == scenario):
            ours = contender == SCHEDULER
            colour = svg.OURS if ours else svg.THEIRS if contender == ORACLE else THEIRS
            parts.append(svg.text(LEFT - 10, y + 4, contender, bold=ours, anchor="end", colour=colour))
            for load, left in columns.items():
                if (cell := figures.find(scenario, load, contender)) is not None:
                    parts += _dots(left, y, cell, colour)
            y += STEP
        y += GAP
    grid = [part for load, left in columns.items() for part in _grid(left, y - GAP, f"{load} % load")]
    title = "99th percentile of the response time: ● all requests, ○ small ones"
    return svg.picture(LEFT + len(loads) * (WIDTH + BETWEEN), y, title, grid + parts)


def _x(value_s: float) -> float:
    return WIDTH * math.log(min(max(value_s, LEAST_S), MOST_S) / LEAST_S) / math.log(MOST_S / LEAST_S)


def _grid(left: float, bottom: float, words: str) -> Iterator[str]:
    yield svg.text(left, 46, words, bold=True)
    for value_s, label in MARKS:
        yield svg.line(left + _x(value_s), left + _x(value_s), 66, bottom, svg.FAINT)
        yield svg.text(left + _x(value_s), 62, label, anchor="middle", colour=THEIRS)


def _dots(left: float, y: float, cell: SimCell, colour: str) -> Iterator[str]:
    everything, small = left + _x(cell.all.p99), left + _x(cell.small.p99)
    yield svg.line(small, everything, y, y, colour, 0.4)
    yield f'<circle cx="{everything:.1f}" cy="{y}" r="4" fill="{colour}"/>'
    yield f'<circle cx="{small:.1f}" cy="{y}" r="3.5" fill="white" stroke="{colour}" stroke-width="1.5"/>'
