"""The matrix as Markdown, written between the markers of docs/conformance.md."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Protocol

from bench.conformance.row import Cell, Row
from tests.data import CHECKOUT

PAGE = CHECKOUT / "docs" / "conformance.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
NONE = "\N{EN DASH}"
SIGNS = {"kept": "✓", "broken": "✗", "n.a.": NONE}


class Found(Protocol):
    """One gateway's column."""

    @property
    def version(self) -> str: ...

    @property
    def cells(self) -> dict[str, Cell]: ...


def write_page(rows: Sequence[Row], columns: Mapping[str, Found], skipped: Mapping[str, str]) -> None:
    """Replace what is between the markers."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{matrix(rows, columns, skipped)}\n{END}{after}")


def matrix(rows: Sequence[Row], columns: Mapping[str, Found], skipped: Mapping[str, str]) -> str:
    """A table a group, with signs; under it what happened where a promise was broken, row by row."""
    parts = [_counts(columns, skipped)]
    for group, members in groupby(rows, lambda row: row.group):
        parts.append(_group(group, list(members), columns))
    return "\n".join(parts)


def _counts(columns: Mapping[str, Found], skipped: Mapping[str, str]) -> str:
    lines = ["| | version | kept | broken | not applicable |", "|---|---|---|---|---|"]
    for name, column in columns.items():
        states = [cell.state for cell in column.cells.values()]
        numbers = " | ".join(str(states.count(state)) for state in SIGNS)
        lines.append(f"| {name} | {column.version or NONE} | {numbers} |")
    lines += [f"| {name} | not tried: {why} | {NONE} | {NONE} | {NONE} |" for name, why in skipped.items()]
    return "\n".join(lines) + "\n"


def _group(group: str, rows: Sequence[Row], columns: Mapping[str, Found]) -> str:
    lines = [f"### {group}", "", f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row in rows:
        signs = " | ".join(SIGNS[column.cells[row.promise].state] for column in columns.values())
        lines.append(f"| {row.promise} | {signs} |")
    lines.append("")
    for row in rows:
        said = {name: column.cells[row.promise] for name, column in columns.items()}
        words = [f"{name} {_plain(cell.words)}" for name, cell in said.items() if cell.words]
        if words:
            lines.append(f"- **{row.promise}** {'; '.join(words)}")
    return "\n".join(lines) + "\n"


def _plain(words: str) -> str:
    """Nothing that Markdown or HTML would take for its own."""
    return words.replace("|", "/").replace("<", "(").replace(">", ")").replace("\n", " ")
