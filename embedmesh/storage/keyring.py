"""Which bearer keys are good now: remembered for a while, forgotten once a key or an account's cache is changed."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ports import Above, Caller, Clock
from embedmesh.storage.db import Row
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import load
from embedmesh.storage.tokens import hash_token, well_formed
from embedmesh.storage.topics import KEYS, Topics
from embedmesh.storage.writer import Writer
from embedmesh.storage.writes import Change, as_rows

STATEMENTS = load("keys.sql")
KNOWN_MAX = 10_000  # keys remembered; some 5 MB
KNOWN_S = 60.0  # as long as a key is taken for good without a look, should no change be heard of
UNKNOWN_S = 1.0  # a key that was just made must work
NOTE_USE_S = 30.0  # between two times that it is written down when keys were last used


class _Known(NamedTuple):
    caller: Caller | None
    expires_ms: int | None
    until: float  # on the monotonic clock


class KeyRing:
    """Implements the port `Keys`. Run `note_uses` as long as the gateway runs."""

    def __init__(self, reads: Reads, writer: Writer, topics: Topics, clock: Clock, key_secret: bytes) -> None:
        self._reads = reads
        self._writer = writer
        self._clock = clock
        self._key_secret = key_secret
        self._known: dict[str, _Known] = {}  # by the key as it was sent: a request has it in memory anyway
        self._changes = 0  # of keys that were heard of
        self._used: dict[str, int] = {}  # key id -> when, in Unix milliseconds; not written down yet
        topics.on(KEYS, self._forget)

    async def find(self, token: str) -> Caller | None:
        """The caller behind a key, or None whatever is wrong with it. Raises StoreUnavailable."""
        known = self._known.get(token)
        if known is None or known.until < self._clock.monotonic():
            if not well_formed(token):
                return None
            known = await self._look_up(token)
        now_ms = self._clock.unix_ms()
        if known.caller is None or (known.expires_ms is not None and known.expires_ms <= now_ms):
            return None
        self._used[known.caller.key_id] = now_ms
        return known.caller

    async def note_uses(self) -> None:
        """Write down now and then when keys were last used. For ever; cancel it."""
        while True:
            await asyncio.sleep(NOTE_USE_S)
            self.note_uses_now()

    def note_uses_now(self) -> None:
        """With the next batch, if the store takes it."""
        if not self._used or not self._writer.healthy():
            return
        used, self._used = self._used, {}
        rows = as_rows([{"key_id": key_id, "used_ms": used_ms} for key_id, used_ms in sorted(used.items())])
        write: Change[int] = Change(lambda db, now_ms: db.execute(STATEMENTS["note_use"], rows).rowcount)
        write.outcome.add_done_callback(lambda outcome: outcome.exception())  # nobody waits for it
        try:
            self._writer.submit(write)
        except StoreUnavailable:
            self._used = used | self._used

    async def _look_up(self, token: str) -> _Known:
        changes = self._changes
        rows = await self._reads.ask(STATEMENTS["find_key"], {"token_hash": hash_token(token, self._key_secret)})
        now = self._clock.monotonic()
        nobody = _Known(None, None, now + UNKNOWN_S)
        found = _Known(_caller(rows), rows[0][3], now + KNOWN_S) if rows else nobody
        if changes == self._changes:  # else what was read may be old already
            self._known.pop(token, None)
            while len(self._known) >= KNOWN_MAX:
                del self._known[next(iter(self._known))]
            self._known[token] = found
        return found

    def _forget(self) -> None:
        self._changes += 1
        self._known.clear()


def _caller(rows: Sequence[Row]) -> Caller:
    """A row for each key above the caller's; one where there is none."""
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
        above=tuple(Above(row[8], row[10], row[11]) for row in rows if row[10:] != (None, None)),
    )
