"""Fills a store with what years would bring, in minutes: its triggers off, by statements that make rows themselves."""

from embedmesh.storage.db import Db

CHUNK = 500_000  # rows a statement
TABLES = ("accounts", "keys", "holds", "transfers", "entries", "usage", "usage_days")

NUMBERS = "WITH RECURSIVE n (i) AS (SELECT CAST(:start AS BIGINT) UNION ALL SELECT i + 1 FROM n WHERE i < :stop)"
WHOSE = "CASE WHEN i % 5 = 0 THEN :busy ELSE 'acct' || (i * 7919 % :accounts) END"
# Over the last 400 days, evenly.
WHEN = "(:now_ms - (:total - i) * (34560000000 / :total))"
HOLD = "'req_' || substr('0000000000' || i, -10)"

MAKE = {
    "accounts": f"""{NUMBERS} INSERT INTO accounts (account_id, kind, balance, held, created_ms)
        SELECT 'acct' || i, 'customer', 1000000000, 0, :now_ms - i FROM n""",
    "keys": f"""{NUMBERS} INSERT INTO keys (key_id, account_id, name, token_hash, scopes, created_ms)
        SELECT 'key' || i, 'acct' || i, '', HASH, 'embeddings', :now_ms - i FROM n""",
    "holds": f"""{NUMBERS} INSERT INTO holds (hold_id, account_id, key_id, amount, state, ended_by, captured, owner,
            created_ms, deadline_ms, ended_ms)
        SELECT {HOLD}, {WHOSE}, 'key' || i % 50, 100, 'captured', 'capture', 100, 'gw', {WHEN}, {WHEN}, {WHEN}
        FROM n""",
    "transfers": f"""{NUMBERS} INSERT INTO transfers (transfer_id, kind, source_id, target_id, amount, hold_id,
            created_ms)
        SELECT :first + i, 'charge', {WHOSE}, 'revenue', 100, {HOLD}, {WHEN} FROM n""",
    "entries": f"""{NUMBERS} INSERT INTO entries (account_id, transfer_id, amount)
        SELECT {WHOSE}, :first + i, -100 FROM n UNION ALL SELECT 'revenue', :first + i, 100 FROM n""",
    "usage": f"""{NUMBERS} INSERT INTO usage (hold_id, account_id, key_id, model, node_id, tokens, price, cost,
            payable, day)
        SELECT {HOLD}, {WHOSE}, 'key' || i % 50, 'model', 'n1', 28, 100, 100, 0, {WHEN} / 86400000
        FROM n""",
}
SUMS = """INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
    SELECT key_id, day, model, min(account_id), count(*), sum(tokens), sum(cost) FROM usage
    WHERE hold_id LIKE 'req_00%' GROUP BY key_id, day, model
    ON CONFLICT (key_id, day, model) DO NOTHING"""


def fill(db: Db, accounts: int, transfers: int, busy: str, now_ms: int) -> None:
    """`accounts` of customers, each with a key, and `transfers` charges; a fifth of them of the account `busy`."""
    triggers = _defences_down(db)
    db.begin()
    db.execute(
        "INSERT INTO accounts (account_id, kind, created_ms) VALUES (:busy, 'customer', :now_ms)",
        {"busy": busy, "now_ms": now_ms},
    )
    ((first,),) = db.execute("SELECT coalesce(max(transfer_id), 0) FROM transfers").fetchall()
    db.commit()
    values = {"now_ms": now_ms, "busy": busy, "accounts": accounts, "total": transfers, "first": first}
    for table, statement in MAKE.items():
        rows = accounts if table in ("accounts", "keys") else transfers
        made = statement.replace(
            "HASH", "randomblob(32)" if db.dialect == "sqlite" else "sha256(CAST('k' || i AS BYTEA))"
        )
        if db.dialect == "postgres":
            made = made.replace("substr('0000000000' || i, -10)", "lpad(CAST(i AS TEXT), 10, '0')")
        for start in range(1, rows + 1, CHUNK):
            db.begin()
            used = {name: value for name, value in values.items() if f":{name}" in made}
            db.execute(made, used | {"start": start, "stop": min(rows, start + CHUNK - 1)})
            db.commit()
    db.begin()
    db.execute(SUMS)
    db.execute(
        "UPDATE accounts SET balance = (SELECT sum(amount) FROM entries WHERE account_id = 'revenue') "
        "WHERE account_id = 'revenue'"
    )
    db.commit()
    _defences_up(db, triggers)


def _defences_down(db: Db) -> list[str]:
    if db.dialect == "postgres":
        db.execute("SET statement_timeout = 0")
        for name, value in (("enable_seqscan", "on"), ("enable_hashjoin", "on"), ("enable_mergejoin", "on")):
            db.execute(f"SET {name} = {value}")
        for table in TABLES:
            db.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        for (check,) in db.execute(
            "SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid = CAST('accounts' AS regclass)"
        ).fetchall():
            db.execute(f"ALTER TABLE accounts DROP CONSTRAINT {check}")
        return []
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("PRAGMA ignore_check_constraints = ON")
    db.execute("PRAGMA synchronous = OFF")
    found = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    for name, _ in found:
        db.execute(f"DROP TRIGGER {name}")
    return [sql for _, sql in found]


def _defences_up(db: Db, triggers: list[str]) -> None:
    for sql in triggers:
        db.execute(sql)
    if db.dialect == "postgres":
        for table in TABLES:
            db.execute(f"ALTER TABLE {table} ENABLE TRIGGER ALL")
            db.execute(f"ANALYZE {table}")
        db.execute("SELECT setval(pg_get_serial_sequence('transfers', 'transfer_id'), max(transfer_id)) FROM transfers")
