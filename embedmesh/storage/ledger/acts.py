"""The audit: one row for each act, written in the transaction of the act itself, each hashed with the row before.

A row's hash is BLAKE2b-256 over the hash of the row before and its other columns, as a JSON array. Blocks of the chain
cover the audit, too: see `chain`.
"""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from embedmesh.rules.acts import Act, Actor, changes_text
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.writes import Change
from embedmesh.storage.sql import ACTS_SQL

FIRST = bytes(32)  # stands before the first act
ACTS_AT_ONCE = 1_000  # some 500 kB

T = TypeVar("T")


class AuditHead(msgspec.Struct, frozen=True):
    """Where the audit ends: its last hash, and how many acts it has."""

    hash: str
    acts: int


class WriteActs(Protocol):
    """Runs a function of the connection and the time with the next batch, which returns its result and its acts.

    `row` names the one row, a node or an invite, that it locks. Without acts there need be no actor. The result comes
    once all of it is durable. The function must raise nothing but the driver's errors.
    """

    def __call__(
        self, row: str, write: "Callable[[Db, int], tuple[T, Sequence[Act]]]", actor: Actor | None = None
    ) -> Awaitable[T]: ...


class ActedChange(Change[T]):
    """A change of one row that somebody makes, with the rows of its acts; or one of such a row that is nobody's act.

    A batch locks the names of all such rows before it changes anything. These changes come last in it, the acts after
    all of them: a transaction that writes acts locks their number, and nothing after that. So all gateways lock in one
    order, and no two of their transactions wait for each other.
    """

    rank = 4

    def __init__(
        self, row: str, write: Callable[[Db, int], tuple[T, Sequence[Act]]], actor: Actor | None = None
    ) -> None:
        super().__init__(self._changing)
        self.row = row
        self._acting = write
        self._actor = actor
        self._acts: Sequence[Act] = ()

    def _changing(self, db: Db, now_ms: int) -> T:
        result, self._acts = self._acting(db, now_ms)
        return result

    @classmethod
    def prepare_all(cls, db: Db, now_ms: int, writes: "Sequence[Any]") -> set[str]:
        if names := {one.row for one in writes if one.row}:
            db.lock_names(names)
        return set()

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[Any]") -> None:
        super().apply_all(db, now_ms, writes)
        cls.conclude_all(db, now_ms, writes)

    def apply_alone(self, db: Db, now_ms: int) -> None:
        super().apply_all(db, now_ms, [self])

    @classmethod
    def conclude_all(cls, db: Db, now_ms: int, writes: "Sequence[Any]") -> None:
        for one in writes:
            record(db, one._actor, one._acts, now_ms)


def record(db: Db, actor: Actor | None, acts: Sequence[Act], now_ms: int) -> None:
    """Write a row for each act. It has to be the last that a transaction locks."""
    for act in acts:
        if actor is None:
            raise AssertionError("an act has an actor: say by whom it is")
        ((act_id,),) = db.execute(ACTS_SQL["next_act"]).fetchall()
        last = db.execute(ACTS_SQL["last_act"]).fetchone()
        row = {
            "act_id": act_id,
            "now_ms": now_ms,
            "actor": actor.name,
            "verb": act.verb.value,
            "object_id": act.object_id,
            "changes": changes_text(act.changes),
            "origin": actor.origin,
            "request_id": actor.request_id,
        }
        hash_ = link_act(FIRST if last is None else last[1], tuple(row.values()))
        db.execute(ACTS_SQL["insert_act"], row | {"hash": hash_})


def link_act(before: bytes, columns: Row) -> bytes:
    """The hash of an act."""
    return hashlib.blake2b(before + msgspec.json.encode(columns), digest_size=32, person=b"embedmesh act").digest()


def follow_acts(db: Db) -> tuple[AuditHead, str | None]:
    """Walk the whole audit: its head, and the first that is wrong with it."""
    before, last = FIRST, 0
    while rows := db.execute(ACTS_SQL["acts_in_order"], {"after": last, "rows_max": ACTS_AT_ONCE}).fetchall():
        for *columns, found in rows:
            if columns[0] != last + 1:
                return AuditHead(before.hex(), last), f"acts {last + 1} to {columns[0] - 1} are missing"
            if link_act(before, tuple(columns)) != found:
                return AuditHead(before.hex(), last), f"act {columns[0]} was changed, or one before it"
            before, last = found, columns[0]
    counted = db.execute(ACTS_SQL["count_acts"]).fetchone()
    if counted is None or counted[0] != last:
        return AuditHead(before.hex(), last), f"acts after {last} are missing"
    return AuditHead(before.hex(), last), None


def had_audit_head(db: Db, hash_: bytes) -> bool:
    """Whether the audit ever ended with this hash."""
    return hash_ == FIRST or db.execute(ACTS_SQL["find_act_hash"], {"hash": hash_}).fetchone() is not None
