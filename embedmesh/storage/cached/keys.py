"""Which bearer keys are good now. They are remembered for a while, and looked up again after a change.

A key without this store's stamp was not made here, and is refused without a query: nobody can make one up. A stamped
key that is not found was revoked.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ports import Above, Caller, Clock, SlotLimit
from embedmesh.storage.cached.changes import Changes
from embedmesh.storage.db import Row
from embedmesh.storage.ledger.group_commit import Writer
from embedmesh.storage.ledger.writes import Change, as_rows
from embedmesh.storage.reads import Reads
from embedmesh.storage.secrets.tokens import hash_token, stamped, well_formed
from embedmesh.storage.sql import KEYS_SQL

KNOWN_MAX = 10_000  # keys remembered; some 5 MB
KNOWN_S = 60.0  # a key counts as good for this long without a lookup, should no change be heard of
UNKNOWN_S = 1.0  # a key that was just made must work
UNKNOWN_MAX = 1_000  # revoked keys remembered: clients that have one try it again and again
NOTE_USE_S = 30.0  # between two times that the last use of keys is written

T = TypeVar("T")


class _KnownKey(NamedTuple):
    caller: Caller
    expires_ms: int | None
    until: float  # on the monotonic clock


class KeyRing:
    """Implements the port `Keys`. Run `note_uses` while the gateway runs."""

    def __init__(self, reads: Reads, writer: Writer, changes: Changes, clock: Clock, key_secret: bytes) -> None:
        self._reads = reads
        self._writer = writer
        self._clock = clock
        self._key_secret = key_secret
        self._known: dict[str, _KnownKey] = {}  # by the key as it was sent: a request has it in memory anyway
        self._unknown: dict[str, float] = {}  # key -> until when it counts as revoked
        self._changes = 0  # of keys that were heard of
        self._used: dict[str, float] = {}  # key id -> its last use, on the monotonic clock; not written yet
        changes.on("keys", self._keys_changed)

    async def find(self, token: str) -> Caller | None:
        """The caller behind a key, or None whatever is wrong with it. Raises StoreUnavailable."""
        known = self._known.get(token)
        if known is None or known.until < self._clock.monotonic():
            known = await self._look_up(token)
        return self._good(known)

    def known(self, token: str, now: float) -> Caller | None:
        known = self._known.get(token)
        if known is None or known.until < now:
            return None
        if known.expires_ms is not None:
            return self._good(known)
        caller = known.caller
        self._used[caller.key_id] = now
        return caller

    def _good(self, known: _KnownKey | None) -> Caller | None:
        """The caller of a key that was found, unless the key has expired; its use is noted."""
        if known is None or (known.expires_ms is not None and known.expires_ms <= self._clock.unix_ms()):
            return None
        self._used[known.caller.key_id] = self._clock.monotonic()
        return known.caller

    async def note_uses(self) -> None:
        """Write now and then when keys were last used. For ever; cancel it."""
        while True:
            await asyncio.sleep(NOTE_USE_S)
            self.note_uses_now()

    def note_uses_now(self) -> None:
        """Write it with the next batch, if the store takes it."""
        if not self._used or not self._writer.healthy():
            return
        used, self._used = self._used, {}
        now, now_ms = self._clock.monotonic(), self._clock.unix_ms()
        rows = as_rows(
            [{"key_id": key_id, "used_ms": now_ms - int((now - at) * 1000)} for key_id, at in sorted(used.items())]
        )
        write: Change[int] = Change(lambda db, now_ms: db.execute(KEYS_SQL["note_use"], rows).rowcount)
        write.outcome.add_done_callback(lambda outcome: outcome.exception())  # nobody waits for it
        try:
            self._writer.submit(write)
        except StoreUnavailable:
            self._used = used | self._used

    async def _look_up(self, token: str) -> _KnownKey | None:
        revoked = self._unknown.get(token, 0.0) >= self._clock.monotonic()
        if revoked or not well_formed(token) or not stamped(token, self._key_secret):
            return None
        changes = self._changes
        rows = await self._reads.ask(KEYS_SQL["find_key"], {"token_hash": hash_token(token, self._key_secret)})
        now = self._clock.monotonic()
        self._known.pop(token, None)
        self._unknown.pop(token, None)
        known = _KnownKey(_caller(rows), rows[0][3], now + KNOWN_S) if rows else None
        if changes != self._changes:
            return known  # what was read may be old already: it is not remembered
        if known is not None:
            _remember(self._known, token, known, KNOWN_MAX)
        else:
            _remember(self._unknown, token, now + UNKNOWN_S, UNKNOWN_MAX)
        return known

    def _keys_changed(self) -> None:
        self._changes += 1
        self._known.clear()
        self._unknown.clear()


def _remember(memory: dict[str, T], token: str, what: T, entries_max: int) -> None:
    """A full memory forgets its oldest entry."""
    while len(memory) >= entries_max:
        del memory[next(iter(memory))]
    memory[token] = what


def _caller(rows: Sequence[Row]) -> Caller:
    """One row for each key above the caller's, or a single row."""
    account_id, key_id, scopes, _, models, requests_a_minute, tokens_a_minute, cache, *_ = rows[0]
    all_models = [set(each.split("\n")) for each in (models, *(row[9] for row in rows)) if each]
    return Caller(
        account_id=account_id,
        key_id=key_id,
        scopes=frozenset(scopes.split()),
        models=frozenset(set.intersection(*all_models)) if all_models else None,
        requests_a_minute=requests_a_minute,
        tokens_a_minute=tokens_a_minute,
        cache=CachePolicy(cache),
        above=tuple(Above(row[8], row[10], row[11]) for row in rows if row[10:12] != (None, None)),
        slots=_slots(rows),
    )


def _slots(rows: Sequence[Row]) -> tuple[SlotLimit, ...]:
    """A key that was rotated is below the one that took its place: that one's limit counts for both."""
    *_, own_limit, own_place, _, _ = rows[0]
    limits = {own_place: own_limit} | {place_id: limit for *_, limit, place_id in rows if place_id is not None}
    return tuple(SlotLimit(each, limit, each != own_place) for each, limit in limits.items() if limit is not None)
