"""Statements and migrations, read from their files.

A statements file is a list of `-- name: word`, a comment of one sentence, and one statement.
"""

import re
from functools import cache
from importlib.resources import files

HERE = files("embedmesh.storage")
NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@cache
def load(file: str) -> dict[str, str]:
    """The statements of one file by name, in its order."""
    text = (HERE / "statements" / file).read_text(encoding="utf-8")
    _, *pieces = NAME.split(text)
    names, bodies = pieces[::2], pieces[1::2]
    # Comments stay in the files: SQLite would read them anew with every statement that it prepares.
    return {
        name: re.sub(r"^--.*\n", "", body, flags=re.MULTILINE).strip() for name, body in zip(names, bodies, strict=True)
    }


@cache
def migrations() -> list[str]:
    """Migration scripts; the first brings an empty file to version 1, and so on."""
    scripts = sorted(
        (entry for entry in (HERE / "migrations").iterdir() if entry.name.endswith(".sql")), key=lambda e: e.name
    )
    return [script.read_text(encoding="utf-8") for script in scripts]
