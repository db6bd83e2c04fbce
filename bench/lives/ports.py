"""The real limits of keys, with a witness: what they grant, and when, is written down for the judge."""

from bench.lives.journal import Journal, SlotNote, Taken
from bench.lives.loop import Clock, Loop
from embedmesh.rules.ports import Caller, RateLimit
from embedmesh.storage.cached.rate_limits import LeasedRateLimits
from embedmesh.storage.cached.slots import LeasedSlots
from embedmesh.storage.times import MS_PER_MINUTE


class Metered:
    """The real rate limits; what they grant is written down. Implements the port `RateLimits`."""

    def __init__(self, real: LeasedRateLimits, clock: Clock, journal: Journal) -> None:
        self._real = real
        self._clock = clock
        self._journal = journal

    async def take_request(self, caller: Caller) -> None:
        minute = self._clock.unix_ms() // MS_PER_MINUTE
        await self._real.take_request(caller)
        if (limit := caller.requests_a_minute) is not None:
            self._journal.taken.append(Taken(caller.key_id, minute, "requests", 1, limit))

    async def take_tokens(self, caller: Caller, tokens: int) -> None:
        minute = self._clock.unix_ms() // MS_PER_MINUTE
        await self._real.take_tokens(caller, tokens)
        if (limit := caller.tokens_a_minute) is not None:
            self._journal.taken.append(Taken(caller.key_id, minute, "tokens", tokens, limit))

    def take_now(self, caller: Caller, tokens: int, *, look: bool = False) -> bool:
        taken = self._real.take_now(caller, tokens, look=look)
        if taken and not look:
            minute = self._clock.unix_ms() // MS_PER_MINUTE
            for what, amount in (("requests", 1), ("tokens", tokens)):
                limit = caller.requests_a_minute if what == "requests" else caller.tokens_a_minute
                if limit is not None:
                    self._journal.taken.append(Taken(caller.key_id, minute, what, amount, limit))
        return taken

    def spend_tokens(self, caller: Caller, tokens: int) -> None:
        self._real.spend_tokens(caller, tokens)

    def left(self, caller: Caller) -> tuple[RateLimit, ...]:
        return self._real.left(caller)


class Slotted:
    """The real slots; who has them when is written down. Implements the port `Slots`."""

    def __init__(self, real: LeasedSlots, gateway: str, loop: Loop, journal: Journal) -> None:
        self._real = real
        self._gateway = gateway
        self._loop = loop
        self._journal = journal

    def take_now(self, caller: Caller, until_ms: int) -> bool:
        took = self._real.take_now(caller, until_ms)
        if took:
            self._note(caller, 1)
            self._journal.seen["slots found at once"] += 1
        return took

    async def take(self, caller: Caller, until_ms: int) -> None:
        await self._real.take(caller, until_ms)
        self._note(caller, 1)

    def give_back(self, caller: Caller) -> None:
        self._real.give_back(caller)
        self._note(caller, -1)

    def _note(self, caller: Caller, change: int) -> None:
        for each in caller.slots:
            self._journal.slots.append(SlotNote(self._loop.now, each.place_id, self._gateway, change, each.limit))
