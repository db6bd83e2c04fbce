"""The figures as a picture."""

from collections.abc import Iterator

from bench.gateway.figures import Figures, GatewayRow
from bench.gateway.peers import PEERS
from bench.rig import svg

BAR, LEFT, WIDTH, RIGHT, TOP = 18, 210, 460, 120, 44  # pixels


def plot(figures: Figures) -> str:
    """Microseconds of CPU a request, as bars; those beyond the picture say by how much."""
    rows = sorted((row for row in figures.rows if "," not in row.name), key=lambda row: row.cpu_us)
    ours = [row.cpu_us for row in rows if row.name not in PEERS]
    scale = WIDTH / (max(ours, default=1.0) * 1.5)
    title = f"CPU a request, microseconds (one text); {figures.machine}"
    height = TOP + len(rows) * (BAR + 6) + 8
    parts = [part for number, row in enumerate(rows) for part in _bar(TOP + number * (BAR + 6), row, scale)]
    return svg.picture(LEFT + WIDTH + RIGHT, height, title, parts)


def _bar(y: float, row: GatewayRow, scale: float) -> Iterator[str]:
    width = min(row.cpu_us * scale, WIDTH)
    beyond = " (beyond)" if row.cpu_us * scale > WIDTH else ""
    yield svg.text(LEFT - 8, y + 13, row.name, anchor="end")
    yield svg.bar(LEFT, y, width, BAR, svg.THEIRS if row.name in PEERS else svg.OURS)
    yield svg.text(LEFT + width + 6, y + 13, f"{row.cpu_us:,.0f}{beyond}")
