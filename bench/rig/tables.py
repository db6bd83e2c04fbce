"""Figures as tables for a person, derived from their structs: a field's name is its label and has its unit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench.rig.figures import Target, print_targets

LISTED_MAX = 12  # of a list of numbers: a longer one is for programs


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Iterable[object]], title: str = "") -> None:
    """A table whose first column is text, and whose others are figures."""
    table = Table(title=title or None, title_justify="left")
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def print_figures(figures: msgspec.Struct, console: Console, title: str = "") -> None:
    """Single figures in one table; then a table for each list or mapping of structs, and for each struct."""
    single: dict[str, object] = {}
    others: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(figures).items():
        if value in ([], {}):
            continue
        words = name.replace("_", " ")
        (others if isinstance(value, msgspec.Struct) or _rows(value) else single)[words] = value
    if single:
        print_table(console, ("what", "figure"), ((name, in_words(value)) for name, value in single.items()), title)
    for words, value in others.items():
        if isinstance(value, msgspec.Struct):
            print_figures(value, console, words)
        else:
            if isinstance(value, list) and isinstance(value[0], Target):
                print_targets(console, value)
                continue
            rows = _rows(value)
            columns = [name.replace("_", " ") for name in rows[0]]
            print_table(console, columns, ([in_words(cell) for cell in row.values()] for row in rows), words)


def _rows(value: Any) -> list[dict[str, Any]]:
    """Of a list or a mapping of structs or mappings, or of a mapping with more than a few figures; else none."""
    if isinstance(value, Mapping):
        if value and all(_is_row(each) for each in value.values()):
            return [{"": name, **_as_row(each)} for name, each in value.items()]
        if len(value) > 1 and not any(map(_is_row, value.values())):
            return [{"what": name, "figure": each} for name, each in value.items()]
    elif isinstance(value, list) and value and all(map(_is_row, value)):
        return [_as_row(each) for each in value]
    return []


def _is_row(value: Any) -> bool:
    return isinstance(value, msgspec.Struct | Mapping)


def _as_row(value: Any) -> dict[str, Any]:
    return msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else dict(value)


def in_words(value: object) -> str:
    """One figure, or a few of them."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if _is_row(value):
        return ", ".join(f"{name}: {in_words(each)}" for name, each in _as_row(value).items()) or "none"
    if isinstance(value, list | tuple | set):
        return ", ".join(map(in_words, value)) if len(value) <= LISTED_MAX else f"{len(value):,} of them"
    return str(value)
