"""Which bearer keys are good now: remembered for a while, looked up anew once a key or an account's cache is changed.

Keys that anybody may have made up are looked up one at a time, few wait for that, and what was found of them is kept
apart. A key that was good before, or bears our stamp, never waits behind them.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import Overloaded, StoreUnavailable
from embedmesh.rules.ports import Above, Caller, Clock
from embedmesh.storage.cached.changes import KEYS, Topics
from embedmesh.storage.db import Row
from embedmesh.storage.ledger.group_commit import Writer
from embedmesh.storage.ledger.writes import Change, as_rows
from embedmesh.storage.reads import Reads
from embedmesh.storage.secrets.tokens import hash_token, stamped, well_formed
from embedmesh.storage.sql import load

STATEMENTS = load("keys.sql")
KNOWN_MAX = 10_000  # keys remembered; some 5 MB
KNOWN_S = 60.0  # as long as a key is taken for good without a look, should no change be heard of
UNKNOWN_S = 1.0  # a key that was just made must work
UNKNOWN_MAX = 1_000  # that there is no such key: for clients with an old one, which try it again and again
GUESSES_MAX = 64  # keys that anybody may have made up, and that wait to be looked up
NOTE_USE_S = 30.0  # between two times that it is written down when keys were last used

T = TypeVar("T")


class _Known(NamedTuple):
    caller: Caller
    expires_ms: int | None
    until: float  # on the monotonic clock
    changes: int  # of keys that had been heard of when it was looked up


class KeyRing:
    """Implements the port `Keys`. Run `note_uses` as long as the gateway runs."""

    def __init__(self, reads: Reads, writer: Writer, topics: Topics, clock: Clock, key_secret: bytes) -> None:
        self._reads = reads
        self._writer = writer
        self._clock = clock
        self._key_secret = key_secret
        self._known: dict[str, _Known] = {}  # by the key as it was sent: a request has it in memory anyway
        self._unknown: dict[str, float] = {}  # until when it is remembered that there is no such key
        self._guesses = 0
        self._guessing = asyncio.Lock()
        self._changes = 0  # of keys that were heard of
        self._used: dict[str, int] = {}  # key id -> when, in Unix milliseconds; not written down yet
        topics.on(KEYS, self._heard)

    async def find(self, token: str) -> Caller | None:
        """The caller behind a key, or None whatever is wrong with it. Raises StoreUnavailable and Overloaded."""
        known = self._known.get(token)
        if known is None or known.changes != self._changes or known.until < self._clock.monotonic():
            known = await self._find(token, known)
        now_ms = self._clock.unix_ms()
        if known is None or (known.expires_ms is not None and known.expires_ms <= now_ms):
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

    async def _find(self, token: str, before: _Known | None) -> _Known | None:
        if before is None and not well_formed(token):
            return None
        if self._unknown.get(token, 0.0) >= self._clock.monotonic():
            return None
        if before is not None or stamped(token, self._key_secret):
            return await self._look_up(token)
        if self._guesses >= GUESSES_MAX:
            raise Overloaded(f"{GUESSES_MAX} keys that are not known here are being looked up. Try again shortly.")
        self._guesses += 1
        try:
            async with self._guessing:
                return await self._look_up(token)
        finally:
            self._guesses -= 1

    async def _look_up(self, token: str) -> _Known | None:
        changes = self._changes  # should there be more meanwhile, what is read may be old already
        rows = await self._reads.ask(STATEMENTS["find_key"], {"token_hash": hash_token(token, self._key_secret)})
        now = self._clock.monotonic()
        self._known.pop(token, None)
        self._unknown.pop(token, None)
        if not rows:
            _remember(self._unknown, token, now + UNKNOWN_S, UNKNOWN_MAX)
            return None
        known = _Known(_caller(rows), rows[0][3], now + KNOWN_S, changes)
        _remember(self._known, token, known, KNOWN_MAX)
        return known

    def _heard(self) -> None:
        self._changes += 1
        self._unknown.clear()


def _remember(memory: dict[str, T], token: str, what: T, entries_max: int) -> None:
    """In place of the oldest, where there are as many as may be."""
    while len(memory) >= entries_max:
        del memory[next(iter(memory))]
    memory[token] = what


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
