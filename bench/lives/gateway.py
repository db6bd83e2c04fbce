"""One gateway's process: the real store and the real flow, until it stops or dies."""

import asyncio
import contextvars
import random
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from bench.lives.disk import Thread
from bench.lives.journal import Attempt, DeliveryNote, Errand, Journal, SlotNote, Taken
from bench.lives.loop import PROCESS, Clock, Loop
from bench.lives.nodes import Nodes, make_nodes, probe
from embedmesh.fleet.registry import Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.cache import VectorCache
from embedmesh.flow.deliver import Done
from embedmesh.flow.expire import expire
from embedmesh.flow.paid import serve
from embedmesh.flow.retries import SingleFlight, Unread
from embedmesh.flow.world import World
from embedmesh.rules.errors import Failure, InternalError, SetupError
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.ports import Caller, RateLimit
from embedmesh.rules.shares import Shares
from embedmesh.storage.cached.rate_limits import LeasedRateLimits
from embedmesh.storage.cached.slots import LeasedSlots
from embedmesh.storage.secrets.secret import claim_of, hash_user
from embedmesh.storage.sqlite.commit import FSYNC_FAILED
from embedmesh.storage.store import Store
from embedmesh.storage.times import MS_PER_MINUTE
from tests.flow.world import CATALOGUE, EMBEDDINGS, Bystander, LetterTokenizer
from tests.storage.shop import SECRET, secret

MODELS = [model.id for model in CATALOGUE.models]
CACHE_BYTES = 8_000  # some twenty vectors
REPLY_BYTES = 4_000_000  # of a thousand replies
DRAIN_S_MAX = 20.0  # a gateway that stops waits so long for its callers
WRITE_S_MAX = 8.0  # a slow caller takes so long to take its reply


class Traits(msgspec.Struct, frozen=True):
    """Of one world, drawn from its seed."""

    start_ms: int
    gateways: int
    lives: int
    spans_s: float
    disorder: float
    nodes: int
    inputs_max: int | None
    hedge: bool
    ask: int
    bad_odds: float
    slow_odds: float
    broken_odds: float  # of a COMMIT
    kill_odds: float  # of a gateway, each time that it starts
    leave_odds: float  # of a caller, at each request
    undeliverable_odds: float
    rich_odds: float  # of an account to have money for tabs
    plain_odds: float  # of a request to be like most others: such keys have tabs


class Exchange:
    """One request and its reply, between a caller and a gateway."""

    def __init__(self, loop: Loop, attempt: Attempt, asked: RequestHead, body: bytes) -> None:
        self.attempt = attempt
        self.asked = asked
        self.body = body
        self.gone = False  # the caller has hung up
        self.begun = False  # a byte of the reply has left
        self.outcome: asyncio.Future[Reply | Failure | None] = loop.create_future()  # None: the connection broke
        self.serving: asyncio.Task[Any] | None = None

    def answer(self, what: Reply | Failure | None) -> None:
        """What the caller gets, if it still listens."""
        if not self.outcome.done():
            self.outcome.set_result(what)


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


class Gateway:
    """From start to end; the next one on its folder is another. Implements the protocol `SimProcess`."""

    def __init__(
        self, name: str, place: Path, folder: Path, loop: Loop, clock: Clock, dice: random.Random, traits: Traits,
        journal: Journal, dies_at: int | None,
    ) -> None:  # fmt: skip
        self.name = name
        self.alive = True
        self.serves = False
        self.store: Store | None = None
        self.ended: asyncio.Future[None] = loop.create_future()
        self.dies_at = dies_at
        self._place, self._folder = place, folder
        self._loop, self._clock, self._dice = loop, clock, dice
        self._traits, self._journal = traits, journal
        self._steps = 0
        self._exchanges: dict[Exchange, None] = {}
        self._background: list[asyncio.Future[Any]] = []
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self)
        self._opening = self._start(self._open())

    # -- its process

    def stepped(self) -> None:
        self._steps += 1
        if self.dies_at is not None and self._steps >= self.dies_at and self.alive:
            self.die("is killed")

    def die(self, why: str) -> None:
        """At once: what is not durable is lost, and the kernel releases its locks."""
        self.say(why)
        self.alive = self.serves = False
        self._journal.died[self.name] = self._loop.now
        self._journal.seen["deaths"] += 1
        if self.store is not None:
            self.store._opened.close(clean=False)
        else:
            with suppress(Exception):
                coroutine: Any = self._opening.get_coro()
                coroutine.close()
        self._end()

    def _fatal(self, reason: str) -> None:
        if not reason.startswith(FSYNC_FAILED):
            self._journal.wrong.append(f"{self.name} gave up: {reason}")
        if self.alive:
            self.die(f"ends: {reason}")

    def _end(self) -> None:
        stats = self.store.stats if self.store is not None else None
        if stats is not None and (stats.broken_writes or stats.late_captures):
            self._journal.wrong.append(f"{self.name}: {stats}")
        if stats is not None:
            self._journal.seen["tabs recalled"] += stats.tabs_recalled
        for exchange in self._exchanges:
            exchange.answer(None)
        if not self.ended.done():
            self.ended.set_result(None)

    def _ended_by_itself(self, task: "asyncio.Future[Any]") -> None:
        if not task.cancelled():
            self._journal.wrong.append(f"{self.name}: a task in the background ended by {task.exception()!r}")

    def _start(self, coroutine: Any) -> "asyncio.Task[Any]":
        return self._loop.create_task(coroutine, context=self._context.copy())

    def say(self, what: str) -> None:
        self._journal.say(self._loop.now, self.name, what)

    # -- its life

    async def _open(self) -> None:
        try:
            self.store = await Store.open(
                self._place, folder=self._folder, clock=self._clock, secret=secret, on_fatal=self._fatal
            )
        except SetupError as error:
            self.say(f"cannot start: {error}")
            if "add up" in str(error):
                self._journal.wrong.append(f"{self.name}: {error}")
            self.alive = False
            self._end()
            return
        medium: Any = self.store._writer._medium
        medium._thread.shutdown()
        medium._thread = Thread()
        for what, condition in (("holds", "state = 'open'"), ("tabs", "ended_ms IS NULL")):
            open_still = f"SELECT 1 FROM {what} WHERE {condition} AND owner = :owner"
            rows = await self.store._reads.ask(open_still, {"owner": self.store._opened.instance.name})
            if rows:
                self._journal.wrong.append(f"{self.name} left {len(rows)} {what} of its last life open")
        self.say(f"is open, recovered {self.store.stats.recovered} and {self.store.stats.tabs_recovered} tabs")
        self._world = self._make_world(self.store)
        running: list[Awaitable[None]] = [*self.store.background(), expire(self.store, self._clock)]
        self._background = [asyncio.ensure_future(each) for each in [*running, probe(self._registry, MODELS)]]
        for task in self._background:
            task.add_done_callback(self._ended_by_itself)
        self.serves = True

    def _make_world(self, store: Store) -> World:
        traits, loop = self._traits, self._loop
        self._registry = Registry(self._clock)
        make_nodes(self._registry, traits.nodes, traits.inputs_max, traits.ask, MODELS)
        self.replies = Shares(REPLY_BYTES)
        return World(
            keys=store.keys,
            rate_limits=Metered(store.rate_limits, self._clock, self._journal),
            slots=Slotted(store.slots, self.name, self._loop, self._journal),
            prices=store.prices,
            catalogue=CATALOGUE,
            tokenizers={model: LetterTokenizer() for model in MODELS},
            cl100k=None,
            ledger=store,
            fleet=Scheduler(self._registry, self._clock, self._dice, loop.call_later, hedge=traits.hedge),
            client=Nodes(self._dice, traits.bad_odds, traits.slow_odds),
            observer=Bystander(),
            clock=self._clock,
            single_flight=SingleFlight(Done.close, self.replies),
            unread=Unread(loop.call_later),
            replies=self.replies,
            cache=VectorCache(CACHE_BYTES, self._registry.generation),
            hash_user=lambda user: hash_user(SECRET, user),
            claim_of=lambda key, body: claim_of(SECRET, key, body),
        )

    def stop(self) -> None:
        """An orderly stop: callers are waited for, everything is written down."""
        if self.serves:
            self.serves = False
            self._start(self._stop())

    async def _stop(self) -> None:
        assert self.store is not None
        self.say("drains")
        serving = [each.serving for each in self._exchanges if each.serving is not None]
        if serving:
            await asyncio.wait(serving, timeout=self._dice.random() * DRAIN_S_MAX)
        for task in [*serving, *self._background]:
            task.cancel()
        await asyncio.gather(*serving, *self._background, return_exceptions=True)
        await self._world.single_flight.stop()
        if self.replies.taken:
            self._journal.wrong.append(f"{self.name}: {self.replies.taken} bytes of replies were not given back")
        await self.store.close()
        if left := self.store._writer.waiting():  # its disk did not answer, and it must not wait for ever
            self._journal.died[self.name] = self._loop.now
            self._journal.seen["stopped before all was written"] += 1
        self.say(f"is closed, {left} writes were lost")
        self.alive = False
        self._end()

    # -- its callers

    def ask(self, life: int, errand: Errand, asked: RequestHead) -> Exchange:
        """Called by a caller, which waits for the outcome."""
        attempt = Attempt(life, errand, self.name, self._loop.now)
        self._journal.attempts.append(attempt)
        exchange = Exchange(self._loop, attempt, asked, errand.body)
        self._exchanges[exchange] = None
        exchange.serving = self._start(self._serve(exchange))
        return exchange

    def hang_up(self, exchange: Exchange) -> None:
        """The caller has gone; the server notices. A reply that is being sent ends by itself."""
        exchange.gone = True
        if self.alive and exchange.serving is not None and not exchange.begun:
            exchange.serving.cancel()

    async def _serve(self, exchange: Exchange) -> None:
        attempt, failure = exchange.attempt, None

        async def receive(account_id: str) -> bytes:
            await asyncio.sleep(self._dice.random() * 0.02)
            return exchange.body

        async def deliver(reply: Reply | StreamedReply) -> Delivery:
            assert isinstance(reply, Reply)
            return await self._deliver(exchange, reply)

        try:
            await serve(self._world, EMBEDDINGS, exchange.asked, receive, deliver)
        except Failure as error:
            failure = error
            if isinstance(error, InternalError):
                self._journal.wrong.append(f"life {attempt.life}: {error.message}")
            self.say(f"tells {attempt.life}: {error.code} ({error.message[:60]})")
        except ConnectionError:
            pass
        except Exception as error:  # noqa: BLE001 - that is what we look for
            self._journal.wrong.append(f"life {attempt.life}: {type(error).__name__}: {error}")
        finally:
            if self.alive:
                attempt.ended, attempt.failure = self._loop.now, failure
                self._exchanges.pop(exchange, None)
                exchange.answer(failure)

    async def _deliver(self, exchange: Exchange, reply: Reply) -> Delivery:
        dice, odds = self._dice, self._traits.undeliverable_odds
        await asyncio.sleep(dice.random() * 0.01)  # a socket that is full
        if exchange.gone or dice.random() < odds:
            raise ConnectionResetError("the caller is gone")
        exchange.begun = True
        try:
            await asyncio.sleep(dice.random() * (WRITE_S_MAX if dice.random() < 0.05 else 0.01))
        except asyncio.CancelledError:
            self._journal.seen["deliveries that we broke off"] += 1
            raise
        attempt, headers = exchange.attempt, reply.headers
        whole = not exchange.gone and dice.random() >= odds
        hold_id = headers.get("x-embedmesh-request")
        cost = int(headers["x-embedmesh-cost-nanousd"])
        known = headers.get("x-embedmesh-cached") not in (None, "0") and cost == 0
        if (hold_id is None) != (headers.get("idempotent-replayed") == "true") and not known:
            self._journal.wrong.append(f"life {attempt.life}: a reply that is neither new nor kept: {headers}")
        again = bool(exchange.asked.retries)
        self._journal.deliveries.append(
            DeliveryNote(
                self._loop.now, attempt.life, attempt.errand, self.name, hold_id, cost, reply.body, whole, again,
                attempt.began,
            )
        )  # fmt: skip
        words = f"{hold_id or 'what was kept'}, {cost}"
        if not whole:
            self._journal.seen["deliveries that were broken off"] += 1
            self.say(f"is broken off delivering to {attempt.life}: {words}")
            return Delivery.BROKEN_OFF
        self.say(f"delivers to {attempt.life}: {words}")
        exchange.answer(reply)
        return Delivery.WHOLE
