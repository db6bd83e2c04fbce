"""The figures as tables and as a picture."""

from collections.abc import Iterator

from rich.console import Console

from bench.gateway.figures import TOKENS, Figures, Row, targets
from bench.gateway.peers import PEERS
from bench.rig import svg
from bench.rig.figures import print_targets
from bench.rig.tables import print_table

BAR, LEFT, WIDTH, RIGHT, TOP = 18, 210, 460, 120, 44  # pixels


def show(figures: Figures, console: Console) -> None:
    """For a person."""
    times = "p50, ms", "p99, ms", "memory, MB", "first answer, s", "not right"
    columns = "gateway", "requests/s", "CPU, us", "CPU s per million tokens", *times
    title = f"32 connections, one core each; {figures.machine}; medians of {figures.rounds} rounds"
    print_table(console, columns, map(_cells, figures.rows), title)
    for name, why in figures.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    print_targets(console, targets(figures))


def _cells(row: Row) -> tuple[object, ...]:
    tokens = TOKENS * (16 if "16 texts" in row.name else 1)
    times = f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.rss_mb:.0f}", f"{row.first_s:.1f}", row.bad
    return row.name, f"{row.requests_per_s:,.0f}", f"{row.cpu_us:,.0f}", f"{row.cpu_us / tokens:,.2f}", *times


def plot(figures: Figures) -> str:
    """Microseconds of CPU a request, as bars; those beyond the picture say by how much."""
    rows = sorted((row for row in figures.rows if "," not in row.name), key=lambda row: row.cpu_us)
    ours = [row.cpu_us for row in rows if row.name not in PEERS]
    scale = WIDTH / (max(ours, default=1.0) * 1.5)
    title = f"CPU a request, microseconds (one text); {figures.machine}"
    height = TOP + len(rows) * (BAR + 6) + 8
    parts = [part for number, row in enumerate(rows) for part in _bar(TOP + number * (BAR + 6), row, scale)]
    return svg.picture(LEFT + WIDTH + RIGHT, height, title, parts)


def _bar(y: float, row: Row, scale: float) -> Iterator[str]:
    width = min(row.cpu_us * scale, WIDTH)
    beyond = " (beyond)" if row.cpu_us * scale > WIDTH else ""
    yield svg.text(LEFT - 8, y + 13, row.name, anchor="end")
    yield svg.bar(LEFT, y, width, BAR, svg.THEIRS if row.name in PEERS else svg.OURS)
    yield svg.text(LEFT + width + 6, y + 13, f"{row.cpu_us:,.0f}{beyond}")
