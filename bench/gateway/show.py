"""The figures as tables; the gates last."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.gateway.figures import Figures, Gate, GatewayRow
from bench.rig.tables import print_table

COLOURS = {"pass": "green", "not yet": "red", "not measured": "dim"}


def show(figures: Figures, console: Console) -> None:
    """All of them."""
    words = f"{figures.machine}; {figures.rounds} rounds of {figures.seconds:g} s, in turns; medians but for the least"
    names = ("", "CPU us", "least", "requests/s", "p50 ms", "p99 ms", "MB", "first s", "bad")
    print_table(console, names, map(_row, figures.rows), words)
    if rates := [row for row in figures.rows if row.at]:
        columns = ("", *(f"{what} at {at.per_s:,.0f}/s" for at in rates[0].at for what in ("p50 ms", "p99 ms")))
        rows = ((row.name, *(f"{x:.2f}" for at in row.at for x in (at.p50_ms, at.p99_ms))) for row in rates)
        print_table(console, columns, rows)
    if figures.left_out:
        print_table(console, ("left out", "why"), figures.left_out.items())
    _gates(console, figures.gates)


def _row(row: GatewayRow) -> Sequence[str]:
    cpu = (f"{row.cpu_us:,.0f}", f"{row.cpu_us_min:,.0f}", f"{row.requests_per_s:,.0f}")
    return (
        row.name,
        *cpu,
        f"{row.p50_ms:.2f}",
        f"{row.p99_ms:.2f}",
        f"{row.rss_mb:.0f}",
        f"{row.first_s:.2f}",
        str(row.bad),
    )


def _gates(console: Console, gates: Sequence[Gate]) -> None:
    table = Table("gate", "bound", "aim", "by the best rounds", "median", "verdict")
    for gate in gates:
        bound = f"{'≥' if gate.at_least else '≤'} {gate.gate:g}"
        found = ("-" if each is None else f"{each:.3g}" for each in (gate.best, gate.middle))
        verdict = f"[{COLOURS[gate.verdict]}]{gate.verdict}[/]"
        table.add_row(gate.what, bound, "" if gate.aim is None else f"{gate.aim:g}", *found, verdict)
    console.print(table)
