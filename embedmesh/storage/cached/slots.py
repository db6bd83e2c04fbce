"""How many requests of a key may be under way at one time: exact over all gateways of a store.

A gateway leases slots from the store and takes them in memory: one of its key and one of each key above it for each
request. It gives them back to the store when it has not used them for a while, or when another gateway asks. A lease
lasts longer than any request under it, and ends by itself if its gateway dies. A request that finds no slot is refused
once every other gateway has said that it has none to spare.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from embedmesh.rules.errors import RateLimited, StoreUnavailable
from embedmesh.rules.limits import HOLD_GRACE_S, REQUEST_MIN_S, WRITE_REPLY_S
from embedmesh.rules.ports import Caller, Clock, SlotLimit
from embedmesh.storage.cached.changes import Changes
from embedmesh.storage.cached.rate_limits import KEY_ABOVE, THIS_KEY
from embedmesh.storage.ledger.group_commit import Writer
from embedmesh.storage.ledger.lease_slots import Leased, LeaseSlots
from embedmesh.storage.ledger.writes import Change
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import SLOTS_SQL

RENEWED_S = REQUEST_MIN_S + WRITE_REPLY_S + HOLD_GRACE_S + 5.0  # a lease with less to go is renewed
LEASE_S = RENEWED_S + 10.0  # so a busy key's is written every ten seconds; a dead gateway's ends a minute later
LEASES_A_LIMIT = 16  # a gateway takes that part of a limit at a time: hardly any of it lies idle
ANSWER_S_MAX = 1.0  # other gateways hear within CHANGES_POLL_S, and so do we of their answer
ASK_AGAIN_S = 0.25  # who was just told that there is none is told so again, without asking the store
IDLE_S = 10.0  # slots that nobody used for so long are given back
WANTED_S = 10.0  # after another gateway has asked, slots go back as soon as they are not in use
LOOK_S = 1.0  # between two looks for leases that are due
GATHER_S = 0.01  # a slot that the next request takes at once need not go to the store and back
AGAIN_S = 1.0  # a request of the same key ends in about that time, or later

Write = Callable[[LeaseSlots], Awaitable[Leased]]


class _Ours:
    """What this gateway has leased of one key's slots."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.leased = 0  # slots that we may use
        self.in_use = 0
        self.waiting = 0  # requests that find none free here
        self.until_ms = 0  # of the lease
        self.used = 0.0  # when a slot was last found or given back
        self.wanted_until = 0.0  # by another gateway
        self.refused_until = 0.0  # nobody had one to spare a moment ago
        self.settled = True  # the store knows what we have
        self.asked = False  # by another gateway, which was not answered yet
        self.over = (
            False  # all gateways together may have more than the limit: no slot is taken again without the store
        )
        self.writing = asyncio.Lock()
        self.news = asyncio.Event()  # a slot was given back, here or elsewhere

    def free(self, limit: int, until_ms: int) -> bool:
        """Whether a request that lasts so long finds a slot here."""
        return self.in_use < self.leased and until_ms <= self.until_ms and limit == self.limit and not self.over

    @property
    def unused(self) -> bool:
        """Whether nothing needs to be remembered of it."""
        return self.settled and not (self.leased or self.in_use or self.waiting or self.asked)


class LeasedSlots:
    """Implements the port `Slots`. Run `watch` while the gateway runs."""

    def __init__(self, write: Write, owner: str, reads: Reads, changes: Changes, clock: Clock) -> None:
        self._write = write
        self._owner = owner
        self._reads = reads
        self._clock = clock
        self._places: dict[str, _Ours] = {}  # bounded by the keys of the last IDLE_S
        self._wanted: set[str] = set()  # places of which we may have something that others want
        self._asked = False  # somebody may have asked since we looked
        self._work = asyncio.Event()
        changes.on("slots", self._hear)

    def take_now(self, caller: Caller, until_ms: int) -> bool:
        for each in caller.slots:
            mine = self._places.get(each.place_id)
            if mine is None or not mine.free(each.limit, until_ms):
                return False
        for each in caller.slots:
            self._places[each.place_id].in_use += 1
        return True

    async def take(self, caller: Caller, until_ms: int) -> None:
        taken: list[SlotLimit] = []
        try:
            for each in caller.slots:
                await self._take(each, until_ms)
                taken.append(each)
        except BaseException:
            for each in taken:
                self._give_back(each.place_id)
            raise

    def give_back(self, caller: Caller) -> None:
        for each in caller.slots:
            self._give_back(each.place_id)

    async def watch(self) -> None:
        """Renew leases, give back what is idle, and answer other gateways. For ever; cancel it."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._work.wait()
                    await asyncio.sleep(GATHER_S)
            self._work.clear()
            try:
                await self._look()
            except StoreUnavailable:
                await asyncio.sleep(LOOK_S)

    def give_all_back(self, writer: Writer) -> None:
        """The gateway ends: write it with the next batch, if the store takes it. Else its leases end by themselves."""
        owner = {"owner": self._owner}
        write: Change[int] = Change(lambda db, now_ms: db.execute(SLOTS_SQL["drop_slots_of"], owner).rowcount)
        write.outcome.add_done_callback(lambda outcome: outcome.exception())  # nobody waits for it
        with suppress(StoreUnavailable):
            writer.submit(write)

    async def _take(self, wanted: SlotLimit, until_ms: int) -> None:
        mine = self._places.setdefault(wanted.place_id, _Ours(wanted.limit))
        if not mine.free(wanted.limit, until_ms):
            if mine.in_use + mine.waiting >= wanted.limit:
                raise _refusal(wanted)
            mine.waiting += 1
            try:
                async with mine.writing:
                    await self._find(mine, wanted, until_ms)
            finally:
                mine.waiting -= 1
            mine.used = self._clock.monotonic()
        mine.in_use += 1

    async def _find(self, mine: _Ours, wanted: SlotLimit, until_ms: int) -> None:
        """Wait until there is a free slot here. Raises RateLimited, StoreUnavailable."""
        until = self._clock.monotonic() + ANSWER_S_MAX
        ask = True
        while not mine.free(wanted.limit, until_ms):
            if mine.in_use >= wanted.limit or self._clock.monotonic() < mine.refused_until:
                raise _refusal(wanted)
            mine.news.clear()
            leased = await self._lease(mine, wanted, until_ms, ask=ask)
            if mine.free(wanted.limit, until_ms):
                return
            ask = False
            try:
                if not leased.answers_due:
                    raise TimeoutError
                async with asyncio.timeout(until - self._clock.monotonic()):
                    await mine.news.wait()
            except TimeoutError:
                mine.refused_until = self._clock.monotonic() + ASK_AGAIN_S
                raise _refusal(wanted) from None

    async def _lease(self, mine: _Ours, wanted: SlotLimit, until_ms: int, *, ask: bool) -> Leased:
        """Lease what is lacking, and some to spare where no other gateway wants them."""
        self._check(mine, wanted.limit)
        lacking = mine.in_use + mine.waiting - mine.leased
        others_want = self._clock.monotonic() < mine.wanted_until
        more = max(lacking, 0 if others_want or lacking <= 0 else mine.limit // LEASES_A_LIMIT)
        leased = await self._say(wanted.place_id, mine, more=more, until_ms=until_ms, ask=ask)
        mine.over = mine.over and leased.slots + leased.others > mine.limit
        if self._clock.unix_ms() - leased.asked_ms < WANTED_S * 1000:
            mine.wanted_until = self._clock.monotonic() + WANTED_S
        return leased

    async def _say(self, place_id: str, mine: _Ours, *, more: int, until_ms: int = 0, ask: bool = False) -> Leased:
        """Tell the store what we have from now on. What is lost on the way is told again."""
        kept, mine.settled = mine.leased, False
        answer = kept <= mine.in_use
        until_ms = max(until_ms, mine.until_ms, self._clock.unix_ms() + int(LEASE_S * 1000))
        leased = await self._write(
            LeaseSlots(
                place_id,
                self._owner,
                limit=mine.limit,
                kept=kept,
                more=max(0, more),
                until_ms=until_ms,
                ask=ask,
                answer=answer,
            )
        )
        mine.leased += leased.slots - kept
        mine.until_ms = until_ms
        mine.settled = mine.leased == leased.slots
        mine.asked = mine.asked and not answer
        return leased

    def _check(self, mine: _Ours, limit: int) -> None:
        """After another limit, or a lease that has ended, only what is in use is ours: others may have the rest."""
        if limit != mine.limit or mine.until_ms < self._clock.unix_ms() + int(HOLD_GRACE_S * 1000):
            mine.limit = limit
            mine.leased = mine.in_use
            mine.over = True

    def _give_back(self, place_id: str) -> None:
        mine = self._places[place_id]
        mine.in_use -= 1
        mine.used = self._clock.monotonic()
        if mine.over:
            mine.leased, mine.settled = mine.in_use, False
        if mine.waiting:
            mine.news.set()
        elif mine.used < mine.wanted_until:
            self._wanted.add(place_id)
            self._work.set()

    def _hear(self) -> None:
        """A gateway of the store has asked for slots, or has answered."""
        self._asked = True
        self._work.set()
        for mine in self._places.values():
            if mine.waiting:
                mine.news.set()

    async def _look(self) -> None:
        now = self._clock.monotonic()
        due, self._wanted = self._wanted, set()
        if self._asked:
            self._asked = False
            for (place_id,) in await self._reads.ask(SLOTS_SQL["asked_of"], {"owner": self._owner}):
                mine = self._places.setdefault(place_id, _Ours(0))
                mine.wanted_until, mine.asked = now + WANTED_S, True
        for place_id, mine in self._places.items():
            if mine.asked or not mine.settled or self._is_due(mine, now):
                due.add(place_id)
        await asyncio.gather(*(self._settle(place_id) for place_id in due))

    def _is_due(self, mine: _Ours, now: float) -> bool:
        """Whether a lease has to be renewed, or its slots have been idle for long."""
        if mine.in_use:
            return mine.until_ms < self._clock.unix_ms() + int(RENEWED_S * 1000)
        return now - mine.used > IDLE_S

    async def _settle(self, place_id: str) -> None:
        """Give back what is idle, or renew the rest."""
        mine = self._places.get(place_id)
        if mine is None or mine.writing.locked():
            return  # a request waits for slots: it has none to spare
        async with mine.writing:
            now = self._clock.monotonic()
            self._check(mine, mine.limit)
            if mine.leased > mine.in_use and (now < mine.wanted_until or now - mine.used > IDLE_S):
                mine.leased, mine.settled = mine.in_use, False
            if mine.asked or not mine.settled or (mine.leased and self._is_due(mine, now)):
                await self._say(place_id, mine, more=0)
        if mine.unused:
            del self._places[place_id]


def _refusal(wanted: SlotLimit) -> RateLimited:
    whose = KEY_ABOVE if wanted.above else THIS_KEY
    return RateLimited(
        f"{whose} has {wanted.limit} requests under way, which is all it may. Wait for one of them.",
        retry_after_s=AGAIN_S,
    )
