"""The chain over the ledger: what was written once and covered by a block cannot be changed without being noticed.

A block covers some transfers that follow each other. Its hash is BLAKE2b-256 over the hash of the block before and the
transfers, each as a JSON array of its columns on a line of its own. Whoever notes the last hash down elsewhere can tell
later whether anything before it was changed, by whomever.
"""

import hashlib
from collections.abc import Sequence

import msgspec

from embedmesh.storage.db import Db, Row
from embedmesh.storage.sql import load

CHAIN = load("chain.sql")
TRANSFERS_A_BLOCK = 512  # about two milliseconds of the one who covers them
START = bytes(32)  # stands before the first block
LOCKED = frozenset({"revenue", "credit_source", "payouts"})  # every transfer touches one of them


class Head(msgspec.Struct, frozen=True):
    """Where the chain ends: its last hash, and how many transfers it covers."""

    hash: str
    transfers: int
    blocks: int


def extend(db: Db, now_ms: int) -> int:
    """Cover what is not covered yet, up to TRANSFERS_A_BLOCK transfers; how many that were.

    Call it in a transaction that has LOCKED to itself: then none is being written that would come in between.
    """
    last = db.execute(CHAIN["last_block"]).fetchone()
    last_transfer, before = last if last is not None else (0, START)
    rows = db.execute(CHAIN["unchained"], {"last_transfer": last_transfer, "rows_max": TRANSFERS_A_BLOCK}).fetchall()
    if rows:
        block = {"last_transfer": rows[-1][0], "transfers": len(rows), "hash": link(before, rows), "now_ms": now_ms}
        db.execute(CHAIN["insert_block"], block)
    return len(rows)


def had_head(db: Db, hash_: bytes) -> bool:
    """Whether the chain ever ended with this hash."""
    return hash_ == START or db.execute(CHAIN["find_head"], {"hash": hash_}).fetchone() is not None


def link(before: bytes, transfers: Sequence[Row]) -> bytes:
    """The hash of a block."""
    digest = hashlib.blake2b(before, digest_size=32, person=b"embedmesh block")
    for row in transfers:
        digest.update(msgspec.json.encode(tuple(row)) + b"\n")
    return digest.digest()


def follow(db: Db) -> tuple[Head, str | None]:
    """Walk the whole chain: its head, and what is wrong with the first block that does not fit, if one does not."""
    before, last_transfer, covered, blocks = START, 0, 0, 0
    for until, transfers, found in db.execute(CHAIN["all_blocks"]).fetchall():
        asked = {"last_transfer": last_transfer, "rows_max": transfers}
        rows = db.execute(CHAIN["unchained"], asked).fetchall()
        blocks += 1
        if not rows or rows[-1][0] != until or link(before, rows) != found:
            return Head(before.hex(), covered, blocks - 1), f"transfers {last_transfer + 1} to {until} were changed"
        before, last_transfer, covered = found, until, covered + transfers
    return Head(before.hex(), covered, blocks), None
