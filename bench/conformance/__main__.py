"""Never another model, never another width: `python -m bench.conformance [NAME ...] [--only WORDS] [--write] [--json]`.

Each row is a promise that a caller of embeddings needs. Each is tried over HTTP on us and on other gateways, in front
of two nodes of which one or both can be wrong on command. The verdict is about us.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console

from bench.conformance import rows_answers, rows_failures, rows_requests
from bench.conformance.node import Truth
from bench.conformance.page import write_page
from bench.conformance.peers import NOTHING, OURS, PEERS, gateway
from bench.conformance.row import Cell, Row, tried
from bench.rig.command import CannotRun, bench, check_names, model_folder, progress, say
from bench.rig.install import NotInstalled
from bench.rig.tables import print_table
from embedmesh import __version__

ROWS: tuple[Row, ...] = (*rows_answers.ROWS, *rows_requests.ROWS, *rows_failures.ROWS)
NAMES = (OURS, NOTHING, *PEERS)


class Column(msgspec.Struct, frozen=True):
    """What was found of one gateway, by promise."""

    version: str
    cells: dict[str, Cell]

    def count(self, state: str) -> int:
        """How many cells are so."""
        return sum(cell.state == state for cell in self.cells.values())


class ConformanceFigures(msgspec.Struct, frozen=True):
    """The matrix."""

    columns: dict[str, Column]
    skipped: dict[str, str]
    load_average: float

    @property
    def broken(self) -> list[str]:
        """The rows that we do not keep."""
        if OURS not in self.columns:
            return []
        cells = self.columns[OURS].cells
        return [f"{promise}: {cell.words}" for promise, cell in cells.items() if cell.state != "kept"]


def measure(names: list[str], only: str = "", write: bool = False) -> ConformanceFigures:
    """The gateways that are named, or all."""
    check_names(names, NAMES)
    rows = [row for row in ROWS if only.lower() in f"{row.group}: {row.promise}".lower()]
    if not rows:
        raise CannotRun("no row has these words")
    if write and (names or only):
        raise CannotRun("the page has all rows of all gateways: --write goes without names and --only")
    truth = Truth(model_folder())
    columns: dict[str, Column] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="embedmesh-conformance-") as folder, progress() as bar:
        wanted = names or list(NAMES)
        task = bar.add_task("starting", total=len(wanted) * len(rows))
        for name in wanted:
            try:
                columns[name] = Column(version_of(name), {})
                with gateway(name, Path(folder) / name.replace(" ", "-"), truth) as (bed, settled):
                    for row in rows:
                        bar.update(task, description=f"{name}: {row.promise[:60]}")
                        if not settled():
                            say(f"{name}: both nodes do not get work before “{row.promise}”")
                        columns[name].cells[row.promise] = tried(row, bed)
                        bar.advance(task)
                if write:
                    write_page(ROWS, columns, skipped)
            except NotInstalled as why:
                if name == OURS:
                    raise
                del columns[name]
                skipped[name] = str(why)
                say(f"{name} is left out: {why}")
    return ConformanceFigures(columns, skipped, os.getloadavg()[1])


def version_of(name: str) -> str:
    """As it is written above a column."""
    if name == "nginx":
        said = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr
        return said.strip().rpartition("/")[2]
    return PEERS[name].version if name in PEERS else __version__ if name == OURS else ""


def show(figures: ConformanceFigures, console: Console) -> None:
    """One row a promise."""
    names = list(figures.columns)
    promises = list(next(iter(figures.columns.values())).cells)
    lines = [[promise, *(_words(figures.columns[name].cells.get(promise)) for name in names)] for promise in promises]
    counts = [
        f"{column.count('kept')} of {len(column.cells) - column.count('n.a.')}" for column in figures.columns.values()
    ]
    print_table(console, ("", *names), [*lines, ["kept", *counts]])


def _words(cell: Cell | None) -> str:
    if cell is None or cell.state == "n.a.":
        return "n.a."
    return f"{cell.state}: {cell.words}" if cell.words else cell.state


if __name__ == "__main__":
    bench(
        measure,
        show=show,
        file="conformance.json",
        width=220,
        only="rows with these words",
        write="write the table into docs/conformance.md",
    )
