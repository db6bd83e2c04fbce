"""Tables and a picture."""

from html import escape

from rich.console import Console
from rich.table import Table

from bench.gateway.figures import TOKENS, Figures, Target, targets
from bench.gateway.peers import PEERS

BAR, LEFT, WIDTH, RIGHT, TOP = 18, 210, 460, 120, 44  # pixels
OURS, THEIRS = "#2563a8", "#a8a29e"


def show(figures: Figures, console: Console) -> None:
    """For a person."""
    table = Table(
        "gateway",
        "requests/s",
        "CPU, us",
        "CPU s per million tokens",
        "p50, ms",
        "p99, ms",
        "memory, MB",
        "first answer, s",
        "not right",
        title=f"32 connections, one core each; {figures.machine}; medians of {figures.rounds} rounds",
    )
    for row in figures.rows:
        tokens = TOKENS * (16 if "16 texts" in row.name else 1)
        times = (f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.rss_mb:.0f}", f"{row.first_s:.1f}", f"{row.bad}")
        table.add_row(
            row.name, f"{row.requests_per_s:,.0f}", f"{row.cpu_us:,.0f}", f"{row.cpu_us / tokens:,.2f}", *times
        )
    console.print(table)
    for name, why in figures.left_out.items():
        console.print(f"left out: {name}: {why}")
    table = Table("target", "found", "gate", "aim", "")
    for target in targets(figures):
        aim = "" if target.aim is None else f"{target.aim:g}"
        table.add_row(target.name, f"{target.value:.3g}", _gate(target), aim, "met" if target.met else "MISSED")
    console.print(table)


def _gate(target: Target) -> str:
    return f">= {target.at_least:.3g}" if target.at_least is not None else f"<= {target.at_most:.3g}"


def plot(figures: Figures) -> str:
    """Microseconds of CPU a request, as bars in SVG; those beyond the picture say by how much."""
    rows = sorted((row for row in figures.rows if "," not in row.name), key=lambda row: row.cpu_us)
    ours = [row.cpu_us for row in rows if row.name not in PEERS]
    scale = WIDTH / (max(ours, default=1.0) * 1.5)
    title = f"CPU a request, microseconds (one text); {figures.machine}"
    parts = [f'<text x="8" y="24" font-weight="bold">{escape(title)}</text>']
    for number, row in enumerate(rows):
        y = TOP + number * (BAR + 6)
        width = min(row.cpu_us * scale, WIDTH)
        colour = THEIRS if row.name in PEERS else OURS
        parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(row.name)}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.0f}" height="{BAR}" fill="{colour}"/>')
        beyond = " (beyond)" if row.cpu_us * scale > WIDTH else ""
        parts.append(f'<text x="{LEFT + width + 6:.0f}" y="{y + 13}">{row.cpu_us:,.0f}{beyond}</text>')
    height, total = TOP + len(rows) * (BAR + 6) + 8, LEFT + WIDTH + RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="{total}" height="{height}" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )
