"""The chain over the ledger: a change of what a block covers is noticed.

A block covers a run of transfers. Its hash is BLAKE2b-256 over the hash of the block before and the transfers, each as
a JSON array of its columns on a line of its own; the columns of tabs are there for transfers of tabs only. Behind them
stands the hash of the last act until then, so that a block covers the audit, too. With the last hash noted down
elsewhere, an operator can tell later whether anything before it was changed.
"""

import hashlib
from collections.abc import Sequence

import msgspec

from embedmesh.storage.db import Db, Row
from embedmesh.storage.sql import ACTS_SQL, CHAIN_SQL

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
        act_id, act_hash = db.execute(ACTS_SQL["last_act"]).fetchone() or (None, b"")
        block = {"last_transfer": rows[-1][0], "transfers": len(rows), "acts": act_id, "now_ms": now_ms}
        block["hash"] = link(before, rows, act_hash)
        db.execute(CHAIN_SQL["insert_block"], block)
    return len(rows)


def had_head(db: Db, hash_: bytes) -> bool:
    """Whether the chain ever ended with this hash."""
    return hash_ == START or db.execute(CHAIN_SQL["find_head"], {"hash": hash_}).fetchone() is not None


def link(before: bytes, transfers: Sequence[Row], act_hash: bytes = b"") -> bytes:
    """The hash of a block. `act_hash` is that of the last act, if there was one."""
    digest = hashlib.blake2b(before, digest_size=32, person=b"embedmesh block")
    for row in transfers:
        of_tab = any(row[COLUMNS_WITHOUT_TAB:])
        digest.update(msgspec.json.encode(tuple(row) if of_tab else tuple(row[:COLUMNS_WITHOUT_TAB])) + b"\n")
    digest.update(act_hash)
    return digest.digest()


def follow(db: Db) -> tuple[ChainHead, str | None]:
    """Walk the whole chain: its head, and what is wrong with the first block that does not fit."""
    before, last_transfer, covered, blocks = START, 0, 0, 0
    for until, transfers, found, acts in db.execute(CHAIN_SQL["all_blocks"]).fetchall():
        covering = {"last_transfer": last_transfer, "rows_max": transfers}
        rows = db.execute(CHAIN_SQL["unchained"], covering).fetchall()
        act = None if acts is None else db.execute(ACTS_SQL["hash_of_act"], {"act_id": acts}).fetchone()
        blocks += 1
        if not rows or rows[-1][0] != until or link(before, rows, b"" if act is None else act[0]) != found:
            or_acts = "" if acts is None else f", or acts up to {acts},"
            torn = f"transfers {last_transfer + 1} to {until}{or_acts} were changed"
            return ChainHead(before.hex(), covered, blocks - 1), torn
        before, last_transfer, covered = found, until, covered + transfers
    return ChainHead(before.hex(), covered, blocks), None
