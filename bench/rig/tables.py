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
    fields = {name.replace("_", " "): value for name, value in _as_row(figures).items() if value not in ([], {})}
    tables = {words: value for words, value in fields.items() if _needs_table(value)}
    if single := {words: in_words(value) for words, value in fields.items() if words not in tables}:
        print_table(console, ("what", "figure"), single.items(), title)
    for words, value in tables.items():
        _print_one(value, console, words)


def _print_one(value: Any, console: Console, title: str) -> None:
    if isinstance(value, msgspec.Struct):
        print_figures(value, console, title)
    elif isinstance(value, list) and isinstance(value[0], Target):
        print_targets(console, value)
    elif isinstance(value, Mapping) and any(map(_rows, value.values())):
        for name, each in value.items():
            _print_one(each, console, f"{title}: {name}")
    else:
        rows = _rows(value)
        columns = [name.replace("_", " ") for name in rows[0]]
        print_table(console, columns, ([in_words(cell) for cell in row.values()] for row in rows), title)


def _needs_table(value: Any) -> bool:
    nested = isinstance(value, Mapping) and any(map(_rows, value.values()))
    return isinstance(value, msgspec.Struct) or nested or bool(_rows(value))


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
        if 0.99 < value < 1:  # such as a cosine
            return f"{value:.7f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if _is_row(value):
        return ", ".join(f"{name}: {in_words(each)}" for name, each in _as_row(value).items()) or "none"
    if isinstance(value, list | tuple | set):
        return ", ".join(map(in_words, value)) if len(value) <= LISTED_MAX else f"{len(value):,} of them"
    return str(value)
