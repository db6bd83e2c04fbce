"""What ships, built, started, watched: `python -m bench.ships [PART …] [--golden] [--json]`.

Tools come from Debian where we are root, from PyPI and npm; what cannot be had is said to be skipped. The base of the
image is made of Debian's packages, since no registry may be reachable; users take a public one.
"""

from collections.abc import Callable

import msgspec
from rich.console import Console

from bench.rig.command import bench, check_names, say
from bench.rig.tables import print_table
from bench.ships.chart import check_chart, write_golden
from bench.ships.cluster import check_cluster
from bench.ships.image import check_image
from bench.ships.proxies import check_proxies
from bench.ships.tools import Checklist, ShipRow, ToolFailed
from bench.ships.units import check_units
from bench.ships.watched import check_watched

PARTS: dict[str, Callable[[Checklist], None]] = {
    "image": check_image,
    "cluster": check_cluster,
    "chart": check_chart,
    "units": check_units,
    "proxies": check_proxies,
    "watched": check_watched,
}


class ShipsFigures(msgspec.Struct, frozen=True):
    """Every promise, and what was found."""

    rows: list[ShipRow]

    @property
    def broken(self) -> list[str]:
        """Promises that are not kept. What was skipped is shown, and breaks none."""
        return [f"{row.part}: {row.promise}" for row in self.rows if row.state == "broken"]


def measure(parts: list[str], golden: bool = False) -> ShipsFigures:
    """The parts that are named, or all."""
    check_names(parts, tuple(PARTS))
    if golden:
        write_golden()
    rows: list[ShipRow] = []
    for name in parts or PARTS:
        say(f"{name} …")
        checklist = Checklist(name)
        try:
            PARTS[name](checklist)
        except ToolFailed as why:
            checklist.check("all of it could be tried", False, why)
        rows += checklist.rows
    return ShipsFigures(rows)


def show(figures: ShipsFigures, console: Console) -> None:
    """One row a promise."""
    print_table(console, ("part", "promise", "found", ""), (msgspec.structs.astuple(row) for row in figures.rows))


if __name__ == "__main__":
    bench(measure, show=show, file="ships.json", width=160, golden="write the chart's golden file anew")
