"""The chain over the ledger: a change of what a block covers is noticed.

A block covers a run of transfers. Its hash is BLAKE2b-256 over the hash of the block before and the transfers, each as
a JSON array of its columns on a line of its own; the columns of tabs are there for transfers of tabs only. With the
last hash noted down elsewhere, an operator can tell later whether anything before it was changed.
"""

import hashlib
from collections.abc import Sequence

import msgspec

from embedmesh.storage.db import Db, Row
from embedmesh.storage.sql import CHAIN_SQL

TRANSFERS_A_BLOCK = 512  # about two milliseconds of the gateway that covers them
START = bytes(32)  # stands before the first block
COLUMNS_WITHOUT_TAB = 8  # those of tabs follow, and are NULL elsewhere
LOCKED = frozenset({"revenue", "credit_source", "payouts"})  # every transfer touches one of them


class ChainHead(msgspec.Struct, frozen=True):
    """Where the chain ends: its last hash, and how many transfers it covers."""

    hash: str
    transfers: int
    blocks: int


def extend(db: Db, now_ms: int) -> int:
    """Cover the next transfers, up to TRANSFERS_A_BLOCK; how many that were.

    Call it in a transaction that has locked the accounts LOCKED, so that no transfer comes in between.
    """
    last = db.execute(CHAIN_SQL["last_block"]).fetchone()
    last_transfer, before = last if last is not None else (0, START)
    rows = db.execute(
        CHAIN_SQL["unchained"], {"last_transfer": last_transfer, "rows_max": TRANSFERS_A_BLOCK}
    ).fetchall()
    if rows:
        block = {"last_transfer": rows[-1][0], "transfers": len(rows), "hash": link(before, rows), "now_ms": now_ms}
        db.execute(CHAIN_SQL["insert_block"], block)
    return len(rows)


def had_head(db: Db, hash_: bytes) -> bool:
    """Whether the chain ever ended with this hash."""
    return hash_ == START or db.execute(CHAIN_SQL["find_head"], {"hash": hash_}).fetchone() is not None


def link(before: bytes, transfers: Sequence[Row]) -> bytes:
    """The hash of a block."""
    digest = hashlib.blake2b(before, digest_size=32, person=b"embedmesh block")
    for row in transfers:
        of_tab = any(row[COLUMNS_WITHOUT_TAB:])
        digest.update(msgspec.json.encode(tuple(row) if of_tab else tuple(row[:COLUMNS_WITHOUT_TAB])) + b"\n")
    return digest.digest()


def follow(db: Db) -> tuple[ChainHead, str | None]:
    """Walk the whole chain: its head, and what is wrong with the first block that does not fit."""
    before, last_transfer, covered, blocks = START, 0, 0, 0
    for until, transfers, found in db.execute(CHAIN_SQL["all_blocks"]).fetchall():
        covering = {"last_transfer": last_transfer, "rows_max": transfers}
        rows = db.execute(CHAIN_SQL["unchained"], covering).fetchall()
        blocks += 1
        if not rows or rows[-1][0] != until or link(before, rows) != found:
            return ChainHead(
                before.hex(), covered, blocks - 1
            ), f"transfers {last_transfer + 1} to {until} were changed"
        before, last_transfer, covered = found, until, covered + transfers
    return ChainHead(before.hex(), covered, blocks), None
