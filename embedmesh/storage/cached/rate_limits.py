"""How many requests and tokens a key may use in a minute: exact over all gateways of a store.

Minutes are those of the clock, UTC. What a key uses counts against the keys above it, too. The store counts how much of
a key's minute gateways have leased. A gateway leases a part at a time (a LEASES_A_LIMIT-th of the limit) and spends it
without the store. So the limit is never exceeded, and a caller is refused too early by at most what the other gateways
have leased and not spent.
Nothing is given back, whatever becomes of a request: else computing would be free for callers who hang up. Tokens of a
request that was refused after work for it are a debt: this gateway takes them from its next lease.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from embedmesh.rules.errors import RateLimited
from embedmesh.rules.ports import Above, Caller, Clock, RateLimit
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.writes import WriteDurably
from embedmesh.storage.sql import LEASES_SQL
from embedmesh.storage.times import MS_PER_MINUTE

LEASES_A_LIMIT = 16  # with few gateways hardly any of a limit lies idle; a minute takes about 16 leases from the store
THIS_KEY, KEY_ABOVE = "This API key", "The API key that this one draws from"


class Lease(NamedTuple):
    """What of a key's minute we have leased now, and what all gateways have leased until now."""

    ours: int
    total: int


class _Minute:
    """What we have of one key's minute, of requests or of tokens."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = 0  # leased and not spent
        self.total = 0  # leased by all gateways, as far as we know
        self.owed = 0  # spent beyond what was left: taken from the next lease
        self.leasing = asyncio.Lock()

    def room(self) -> int:
        """The most that may still be had."""
        return max(0, self.left + self.limit - self.total - self.owed)


class _Counting(NamedTuple):
    """What counts for one caller: the minutes of its own key, and of the keys above it."""

    caller: Caller
    requests: list[_Minute]
    tokens: list[_Minute]


class LeasedRateLimits:
    """Implements the port `RateLimits`."""

    def __init__(self, write: WriteDurably, clock: Clock) -> None:
        self._write = write
        self._clock = clock
        self._minute = 0
        self._minutes: dict[tuple[str, str], _Minute] = {}  # by key id and column; bounded by the keys of one minute
        self._counting: dict[str, _Counting] = {}  # by the caller's key id; bounded likewise

    async def take_request(self, caller: Caller) -> None:
        for key in _keys(caller):
            await self._take(key, "requests", 1)
        for key in _keys(caller):
            await self._check_tokens(key)

    async def take_tokens(self, caller: Caller, tokens: int) -> None:
        for key in _keys(caller):
            await self._take(key, "tokens", tokens)

    def take_now(self, caller: Caller, tokens: int, *, look: bool = False) -> bool:
        counting = self._counting_of(caller)
        for each in counting.requests:
            if each.owed or not each.left:
                return False  # to be leased, or refused
        for each in counting.tokens:
            if each.owed or each.left < tokens:
                return False
        if not look:
            for each in counting.requests:
                each.left -= 1
            for each in counting.tokens:
                each.left -= tokens
        return True

    def spend_tokens(self, caller: Caller, tokens: int) -> None:
        for key in _keys(caller):
            if key.tokens_a_minute is not None and tokens > 0:
                mine = self._of(key, "tokens", key.tokens_a_minute)
                spent = min(tokens, mine.left)
                mine.left -= spent
                mine.owed += tokens - spent

    def left(self, caller: Caller) -> tuple[RateLimit, ...]:
        if not caller.limited:
            return ()
        counting = self._counting_of(caller)
        _, reset_s = self._now()
        least = []
        for what, minutes in (("requests", counting.requests), ("tokens", counting.tokens)):
            if minutes:
                mine = minutes[0] if len(minutes) == 1 else min(minutes, key=_Minute.room)
                least.append(RateLimit(what, mine.limit, mine.room(), reset_s))
        return tuple(least)

    async def _take(self, key: Caller | Above, what: str, amount: int) -> None:
        if (limit := _limit(key, what)) is None:
            return
        mine = self._of(key, what, limit)
        minute, reset_s = self._now()
        if mine.owed or mine.left < amount <= mine.room():
            async with mine.leasing:
                if mine.owed or mine.left < amount <= mine.room():  # another request may have leased some
                    await self._lease(key.key_id, what, amount, minute, mine)
        if mine.owed or mine.left < amount:
            whose = THIS_KEY if isinstance(key, Caller) else KEY_ABOVE
            raise RateLimited(
                f"{whose} may use {limit:,} {what} a minute; {mine.room():,} of this minute's are left."
                + (f" This request alone has {amount:,}: split it." if amount > limit else " Wait for the next."),
                retry_after_s=reset_s if amount <= limit else None,
            )
        mine.left -= amount

    async def _lease(self, key_id: str, what: str, amount: int, minute: int, mine: _Minute) -> None:
        """Lease at least what is needed, or nothing where that much is not left."""
        needed = amount + mine.owed - mine.left
        wanted = max(needed, mine.limit // LEASES_A_LIMIT)
        limit = mine.limit

        def lease(db: Db, now_ms: int) -> Lease:
            row = {"key_id": key_id, "minute": minute}
            db.execute(LEASES_SQL["open_minute"], row)
            found = db.execute(LEASES_SQL["read_minute"], row).fetchall()
            leased = dict(zip(("requests", "tokens"), found[0], strict=True))
            ours = min(wanted, limit - leased[what])
            if ours < needed:
                return Lease(0, leased[what])
            leased[what] += ours
            db.execute(LEASES_SQL["lease"], row | leased)
            return Lease(ours, leased[what])

        ours, total = await self._write(lease)
        mine.left += ours
        paid = min(mine.left, mine.owed)
        mine.left, mine.owed = mine.left - paid, mine.owed - paid
        mine.total = max(mine.total, total)

    def _counting_of(self, caller: Caller) -> _Counting:
        """What counts for the caller in this minute."""
        minute = self._clock.unix_ms() // MS_PER_MINUTE
        if minute != self._minute:
            self._turn(minute)
        counting = self._counting.get(caller.key_id)
        if counting is None or counting.caller is not caller:  # or it was looked up again: limits may have changed
            of_requests, of_tokens = (
                [self._of(key, what, limit) for key in _keys(caller) if (limit := _limit(key, what)) is not None]
                for what in ("requests", "tokens")
            )
            counting = self._counting[caller.key_id] = _Counting(caller, of_requests, of_tokens)
        return counting

    def _turn(self, minute: int) -> None:
        self._minute = minute
        self._minutes.clear()
        self._counting.clear()

    def _of(self, key: Caller | Above, what: str, limit: int) -> _Minute:
        minute, _ = self._now()
        if minute != self._minute:
            self._turn(minute)
        mine = self._minutes.get((key.key_id, what))
        if mine is None or mine.limit != limit:  # a new minute, or the operator has changed the limit
            before, mine = mine, _Minute(limit)
            if before is not None:
                mine.total, mine.owed = before.total, before.owed
                self._counting.clear()
            self._minutes[key.key_id, what] = mine
        return mine

    async def _check_tokens(self, key: Caller | Above) -> None:
        """Raise RateLimited where no token is left: then nothing is looked at that would take some."""
        if key.tokens_a_minute is not None:
            mine = self._of(key, "tokens", key.tokens_a_minute)
            if mine.owed or not mine.room():
                await self._take(key, "tokens", 1)
                mine.left += 1

    def _now(self) -> tuple[int, float]:
        """The minute, and seconds until it is over."""
        now_ms = self._clock.unix_ms()
        return now_ms // MS_PER_MINUTE, (MS_PER_MINUTE - now_ms % MS_PER_MINUTE) / 1000


def _keys(caller: Caller) -> Sequence[Caller | Above]:
    """The caller's own key, and the limited ones above it."""
    return caller, *caller.above


def _limit(key: Caller | Above, what: str) -> int | None:
    return key.requests_a_minute if what == "requests" else key.tokens_a_minute
