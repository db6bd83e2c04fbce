"""Rows for sinks."""

from typing import Any

import numpy as np

from embedmesh.bulk.sinks import Sink, UnitTable
from embedmesh.bulk.units import JobUnit


def table_of(*ids: str | int | None, width: int = 4, seed: int = 0, **columns: list[Any]) -> UnitTable:
    """Rows with those ids, and other vectors for another seed."""
    vectors = np.random.default_rng(seed).standard_normal((len(ids), width), np.float32)
    texts = [f"text {at}" for at in range(len(ids))]
    return UnitTable(0, list(ids), texts, vectors, [None] * len(ids), columns)


def unit_of(table: UnitTable) -> JobUnit:
    """What a unit with these rows would be; databases look at the rows alone."""
    return JobUnit(key="k", number=0, first=0, texts=table.texts, refused=[], ids=table.ids, columns=table.columns)


def write(sink: Sink, table: UnitTable) -> str:
    """As a worker does."""
    return sink.write(unit_of(table), table)
