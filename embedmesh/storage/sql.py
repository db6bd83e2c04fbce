"""Statements and migrations, read from their files.

A statements file is a list of `-- name: word`, a comment of one sentence, and one statement, for both kinds of stores:
values are named (`:amount`), several rows come as JSON (`jsonb_each(:rows)`, and `value ->> 'field'` or `value ->> 0`).
Statements for one kind of store only have a file of their own (`check_sqlite.sql`).
"""

import re
from functools import cache
from importlib.resources import files

STORAGE_FILES = files("embedmesh.storage")
STATEMENT_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load(file: str) -> dict[str, str]:
    """The statements of one file by name, in its order."""
    text = (STORAGE_FILES / "statements" / file).read_text(encoding="utf-8")
    _, *pieces = STATEMENT_NAME.split(text)
    names, bodies = pieces[::2], pieces[1::2]
    # Without the comments, which SQLite would parse with every statement that it prepares.
    return {
        name: re.sub(r"^--.*\n", "", body, flags=re.MULTILINE).strip() for name, body in zip(names, bodies, strict=True)
    }


ACCOUNTS_SQL = load("accounts.sql")
ACTS_SQL = load("acts.sql")
BATCHES_SQL = load("batches.sql")
CHAIN_SQL = load("chain.sql")
CLAIMS_SQL = load("claims.sql")
FACTS_SQL = load("facts.sql")
FILES_SQL = load("files.sql")
HOLDS_SQL = load("holds.sql")
JOBS_SQL = load("jobs.sql")
KEYS_SQL = load("keys.sql")
LEASES_SQL = load("leases.sql")
LOCKS_SQL = load("locks.sql")
NODES_SQL = load("nodes.sql")
PRICES_SQL = load("prices.sql")
REPORTS_SQL = load("reports.sql")
RETENTION_SQL = load("retention.sql")
SLOTS_SQL = load("slots.sql")
TABS_SQL = load("tabs.sql")


@cache
def migrations(dialect: str) -> dict[int, str]:
    """Migration scripts by the version that they bring a store to; the first makes it of nothing."""
    scripts = (STORAGE_FILES / "migrations" / dialect).iterdir()
    named = {int(entry.name.partition("_")[0]): entry for entry in scripts if entry.name.endswith(".sql")}
    return {version: named[version].read_text(encoding="utf-8") for version in sorted(named)}
