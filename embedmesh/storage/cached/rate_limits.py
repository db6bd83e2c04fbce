"""How often a key may ask, and for how many tokens, in a minute: exact over all gateways of a store.

Minutes are those of the clock, UTC. What a key uses counts against the keys above it, too. The store counts what of a
key's minute was granted to gateways; a gateway takes a share of it at a time (a lease: a SHARE-th of the limit) and
spends that without asking. So the limit is never exceeded; and a caller is refused too early by at most what the other
gateways have taken and not spent: a lease each.
Nothing is given back, whatever becomes of a request: else computing would be free for those who hang up. What a request
used that was refused after work for it is owed: this gateway takes it from the store with what it asks for next.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from embedmesh.rules.errors import RateLimited
from embedmesh.rules.ports import Above, Caller, Clock, RateLimit
from embedmesh.storage.db import Db
from embedmesh.storage.sql import load

LIMITS = load("limits.sql")
SHARE = 16  # of a limit: with few gateways hardly any of it lies idle; the store is asked 16 times a minute or so
MINUTE_MS = 60_000
OF_ANOTHER = "The API key that this one draws from"


class Granted(NamedTuple):
    """What the store has granted of a key's minute: to us now, and to all until now."""

    ours: int
    total: int


class Written(Protocol):
    def __call__(self, write: Callable[[Db, int], Granted]) -> Awaitable[Granted]: ...


class _Purse:
    """What we have of one key's minute, of requests or of tokens."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = 0  # granted to us, and not spent
        self.total = 0  # granted to all, as far as we know
        self.owed = 0  # spent beyond what was left to us: taken with what is asked for next
        self.asking = asyncio.Lock()

    def room(self) -> int:
        """The most that may still be had."""
        return max(0, self.left + self.limit - self.total - self.owed)


class RateLimits:
    """Implements the port `RateLimits`. `written` does something with the next batch."""

    def __init__(self, written: Written, clock: Clock) -> None:
        self._written = written
        self._clock = clock
        self._minute = 0
        self._purses: dict[tuple[str, str], _Purse] = {}  # by key id and column; bounded by the keys of one minute

    async def take_request(self, caller: Caller) -> None:
        if caller.requests_a_minute is not None:
            await self._take(caller.key_id, "requests", 1, caller.requests_a_minute)
        for above in caller.above:
            if above.requests_a_minute is not None:
                await self._take(above.key_id, "requests", 1, above.requests_a_minute, OF_ANOTHER)
        for key in _keys(caller):
            if key.tokens_a_minute is not None:
                await self._check_tokens(key.key_id, key.tokens_a_minute)

    async def take_tokens(self, caller: Caller, tokens: int) -> None:
        if caller.tokens_a_minute is not None:
            await self._take(caller.key_id, "tokens", tokens, caller.tokens_a_minute)
        for above in caller.above:
            if above.tokens_a_minute is not None:
                await self._take(above.key_id, "tokens", tokens, above.tokens_a_minute, OF_ANOTHER)

    def spend_tokens(self, caller: Caller, tokens: int) -> None:
        for key in _keys(caller):
            if key.tokens_a_minute is not None and tokens > 0:
                purse = self._purse(key.key_id, "tokens", key.tokens_a_minute)
                spent = min(tokens, purse.left)
                purse.left -= spent
                purse.owed += tokens - spent

    def left(self, caller: Caller) -> tuple[RateLimit, ...]:
        if caller.requests_a_minute is None and caller.tokens_a_minute is None and not caller.above:
            return ()
        minute, reset_s = self._now()
        least: dict[str, RateLimit] = {}
        for key in _keys(caller):
            for what, limit in (("requests", key.requests_a_minute), ("tokens", key.tokens_a_minute)):
                if limit is not None:
                    purse = self._purses.get((key.key_id, what)) if minute == self._minute else None
                    left = limit if purse is None else purse.room()
                    if what not in least or left < least[what].left:
                        least[what] = RateLimit(what, limit, left, reset_s)
        return tuple(least.values())

    async def _take(self, key_id: str, what: str, amount: int, limit: int, whose: str = "This API key") -> None:
        purse = self._purse(key_id, what, limit)
        minute, reset_s = self._now()
        if purse.owed or purse.left < amount <= purse.room():
            async with purse.asking:
                if purse.owed or purse.left < amount <= purse.room():  # another request may have brought some
                    await self._ask(key_id, what, amount, minute, purse)
        if purse.owed or purse.left < amount:
            raise RateLimited(
                f"{whose} may use {limit:,} {what} a minute; {max(0, purse.room()):,} of this minute's are left."
                + (f" This request alone has {amount:,}: split it." if amount > limit else " Wait for the next."),
                retry_after_s=reset_s if amount <= limit else None,
            )
        purse.left -= amount

    async def _ask(self, key_id: str, what: str, amount: int, minute: int, purse: _Purse) -> None:
        """Have the store grant us a lease, at least what is needed; nothing where that is not to be had."""
        needed = amount + purse.owed - purse.left
        wanted = max(needed, purse.limit // SHARE)
        limit = purse.limit

        def grant(db: Db, now_ms: int) -> Granted:
            row = {"key_id": key_id, "minute": minute}
            db.execute(LIMITS["open_minute"], row)
            found = db.execute(LIMITS["read_minute"], row).fetchall()
            granted = dict(zip(("requests", "tokens"), found[0], strict=True))
            ours = min(wanted, limit - granted[what])
            if ours < needed:
                return Granted(0, granted[what])
            granted[what] += ours
            db.execute(LIMITS["grant"], row | granted)
            return Granted(ours, granted[what])

        ours, total = await self._written(grant)
        purse.left += ours
        paid = min(purse.left, purse.owed)
        purse.left, purse.owed = purse.left - paid, purse.owed - paid
        purse.total = max(purse.total, total)

    def _purse(self, key_id: str, what: str, limit: int) -> _Purse:
        minute, _ = self._now()
        if minute != self._minute:
            self._minute = minute
            self._purses.clear()
        purse = self._purses.get((key_id, what))
        if purse is None or purse.limit != limit:  # a new minute, or the operator has changed it
            before, purse = purse, _Purse(limit)
            if before is not None:
                purse.total, purse.owed = before.total, before.owed
            self._purses[key_id, what] = purse
        return purse

    async def _check_tokens(self, key_id: str, limit: int) -> None:
        """Raise RateLimited where none is left: then nothing is looked at that would take some."""
        purse = self._purse(key_id, "tokens", limit)
        if purse.owed or not purse.room():
            await self._take(key_id, "tokens", 1, limit)
            purse.left += 1

    def _now(self) -> tuple[int, float]:
        """The minute, and seconds until it is over."""
        now_ms = self._clock.unix_ms()
        return now_ms // MINUTE_MS, (MINUTE_MS - now_ms % MINUTE_MS) / 1000


def _keys(caller: Caller) -> tuple[Caller | Above, ...]:
    """The caller's own, and those above it."""
    return caller, *caller.above
