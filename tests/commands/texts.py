"""Lines to embed, and what their rows must be."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import Result

from tests.commands.edge import vector_of

Embed = Callable[..., Result]


def texts_file(tmp_path: Path, texts: list[str]) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return file


def rows_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_rows(rows: list[dict[str, object]], texts: list[str]) -> None:
    """Each row is its line's: index, and the very float32 values that the endpoint sent."""
    assert [row["index"] for row in rows] == list(range(len(texts)))
    for row, text in zip(rows, texts, strict=True):
        assert np.array_equal(np.array(row["embedding"], "<f4"), vector_of(text))


TEXTS = [f"text {i} é漢" for i in range(50)]
