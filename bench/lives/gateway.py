"""One gateway's process: the real store and the real flow, until it stops or dies."""

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from bench.lives.disk import Thread
from bench.lives.exchange import STRAIGHT, Exchange
from bench.lives.journal import Attempt, Errand, Journal
from bench.lives.locking import LOCK, SEALED, SealingNodes
from bench.lives.loop import PROCESS, Clock, Loop
from bench.lives.nodes import Nodes, make_nodes, make_speaking_nodes, probe
from bench.lives.ports import Metered, Slotted
from bench.lives.streaming import Noting
from bench.lives.talking import CHAT, STREAM, TALKS, SpeakingNodes
from embedmesh.catalogue import Catalogue
from embedmesh.dialects.openai.chat import Chat
from embedmesh.fleet.registry import Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.cache import VectorCache
from embedmesh.flow.confidential import ConfidentialEmbeddings
from embedmesh.flow.deliver import Done, Outcome
from embedmesh.flow.expected import ExpectedOutput
from embedmesh.flow.expire import expire
from embedmesh.flow.generate import Generation
from embedmesh.flow.identify import identify
from embedmesh.flow.leases import Leases
from embedmesh.flow.lock import lock_node
from embedmesh.flow.operation import Operation
from embedmesh.flow.paid import serve
from embedmesh.flow.retries import SingleFlight, Unread
from embedmesh.flow.straight import StraightEmbeddings
from embedmesh.flow.world import World
from embedmesh.gateway.api.confidential_api import EnvelopeForm
from embedmesh.http.failures import envelope
from embedmesh.rules.confidential import SDK_SCHEME
from embedmesh.rules.errors import Failure, InternalError, SetupError
from embedmesh.rules.exchange import RequestHead
from embedmesh.rules.ids import new_id
from embedmesh.rules.ports import EMBED_SCOPE
from embedmesh.rules.shares import Room, Shares
from embedmesh.storage.secrets.secret import claim_of, hash_user
from embedmesh.storage.sqlite.commit import FSYNC_FAILED
from embedmesh.storage.store import Store
from tests.flow.world import CATALOGUE, EMBEDDINGS, Bystander, LetterTokenizer
from tests.storage.shop import SECRET, secret

MODELS = [model.id for model in CATALOGUE.models]
WITH_TALKS = Catalogue((*CATALOGUE.models, *TALKS.values()))
CACHE_BYTES = 8_000  # some twenty vectors
DRAIN_S_MAX = 20.0  # a gateway that stops waits so long for its callers
NOTICED_S, NOTICED_LATE_S = 0.005, 3.0  # until a server knows that a caller has gone; its retry may come before
LATE_ODDS = 0.3
STOPPED_S = 0.01  # until what was cancelled has ended
SPLIT_ODDS = 0.1  # of a request that does not come whole: then it cannot go straight


class Traits(msgspec.Struct, frozen=True):
    """Of one world, drawn from its seed."""

    start_ms: int
    gateways: int
    lives: int
    spans_s: float
    disorder: float
    turn_s: float  # of a busy event loop
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
    busy: bool  # most requests are ordinary ones of one key, which has tabs: many go straight
    rich_odds: float  # of an account to have money for tabs
    plain_odds: float  # of a request to be like most others: such keys have tabs
    ordinary_odds: float  # of a body to be of the form that may go straight
    room: int  # for requests that go straight
    reply_bytes: int  # room for replies that are made or read
    sealed_odds: float = 0.0  # of a life to be one of locks and confidential requests
    talk_odds: float = 0.0  # of a life to be one of chats and their streams
    steps_max: int = 2_000  # the most that a gateway has run when it is killed
    down_s_max: float = 4.0  # until another one starts in its place
    away_s: float = 0.0  # for how long the store cannot be written, once


class Uncounted:
    """In place of the metrics."""

    def ended(self, code: str, model: str, seconds: float, tokens: int = 0, nanousd: int = 0) -> None:
        """Nobody looks at them here."""


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
            if what == "holds":  # unused locks outlive their gateway
                condition += " AND hold_id NOT IN (SELECT hold_id FROM locks WHERE used_ms IS NULL)"
            open_still = f"SELECT 1 FROM {what} WHERE {condition} AND owner = :owner"
            rows = await self.store._reads.ask(open_still, {"owner": self.store._opened.instance.name})
            if rows:
                self._journal.wrong.append(f"{self.name} left {len(rows)} {what} of its last life open")
        self.say(f"is open, recovered {self.store.stats.recovered} and {self.store.stats.tabs_recovered} tabs")
        self._world = self._make_world(self.store)
        nodes = SealingNodes(self._dice, self._traits.nodes, self._traits.bad_odds, self._traits.slow_odds)
        self._sealing = nodes
        self._confidential = ConfidentialEmbeddings(EnvelopeForm(), self.store.locks, nodes, EMBED_SCOPE)
        self._nodes = SpeakingNodes(
            self._dice, self.name, self._traits.bad_odds, self._traits.slow_odds, self._journal.speeches
        )
        noting: Any = Noting(self.store, self.name, self._loop, self._journal)
        self._leases = Leases(noting, self._clock)
        self._talk = Generation(Chat(), self._nodes, self._leases, ExpectedOutput(), envelope)
        self._operations: dict[str, Operation] = {SEALED: self._confidential, STREAM: self._talk, CHAT: self._talk}
        self._straight = StraightEmbeddings(self._world, EMBEDDINGS, self._room, Uncounted(), self._observe)
        running: list[Awaitable[None]] = [*self.store.background(), expire(self.store, self._clock)]
        if self._traits.talk_odds:
            running.append(self._leases.run())
        self._background = [asyncio.ensure_future(each) for each in [*running, probe(self._registry)]]
        for task in self._background:
            task.add_done_callback(self._ended_by_itself)
        self.serves = True

    def _make_world(self, store: Store) -> World:
        traits, loop = self._traits, self._loop
        self._registry = Registry(self._clock)
        make_nodes(self._registry, traits.nodes, traits.inputs_max, traits.ask, MODELS)
        if traits.talk_odds:
            make_speaking_nodes(self._registry, traits.nodes, traits.ask, list(TALKS))
        self.replies = Shares(traits.reply_bytes)
        self._room = Room(traits.room, "full")
        return World(
            keys=store.keys,
            rate_limits=Metered(store.rate_limits, self._clock, self._journal),
            slots=Slotted(store.slots, self.name, self._loop, self._journal),
            prices=store.prices,
            catalogue=WITH_TALKS if traits.talk_odds else CATALOGUE,
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
        for exchange in list(self._exchanges):
            exchange.stop()
        serving = [each.serving for each in self._exchanges if each.serving is not None]
        if serving:
            await asyncio.wait(serving, timeout=self._dice.random() * DRAIN_S_MAX)
        for exchange in list(self._exchanges):
            exchange.break_off()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*serving, *self._background, return_exceptions=True)
        await self._world.single_flight.stop()
        await asyncio.sleep(STOPPED_S)
        self._look_for_what_is_left(self.store)
        await self.store.close()
        if left := self.store._writer.waiting():  # its disk did not answer, and it must not wait for ever
            self._journal.died[self.name] = self._loop.now
            self._journal.seen["stopped before all was written"] += 1
        self.say(f"is closed, {left} writes were lost")
        self.alive = False
        self._end()

    def _look_for_what_is_left(self, store: Store) -> None:
        """Nothing is under way: so nothing is taken."""
        left = {
            "bytes of replies": self.replies.taken,
            "requests in the room": self._room.taken,
            "requests that go straight": len(self._straight.in_flight),
            "parts at nodes": sum(node.load.parts for node in self._registry),
            "slots": sum(each.in_use for each in store.slots._places.values()),
            "holds of streams": len(self._leases._leases),
            "nodes that speak": self._nodes.speaking,
            "parts of tabs": sum(len(tab.flight) for tab in store.tabs._tabs.values()),
        }
        if any(left.values()):
            self._journal.wrong.append(f"{self.name}: not given back: {left}")

    # -- its callers

    def ask(self, life: int, errand: Errand, asked: RequestHead) -> Exchange:
        """Called by a caller, which waits for the outcome."""
        attempt = Attempt(life, errand, self.name, self._loop.now)
        self._journal.attempts.append(attempt)
        self._journal.seen["requests"] += 1
        own_id = new_id("req", self._clock) if self._dice.random() < 0.5 else None
        odds = self._traits.undeliverable_odds
        exchange = Exchange(self, self._loop, self._dice, odds, self._journal, attempt, asked, own_id)
        self._exchanges[exchange] = None
        self._later(0.01, self._read, exchange)
        return exchange

    def hang_up(self, exchange: Exchange) -> None:
        """The caller has gone; the server notices soon."""
        exchange.gone = True
        self._later(NOTICED_LATE_S if self._dice.random() < LATE_ODDS else NOTICED_S, self._lost, exchange)

    def _lost(self, exchange: Exchange) -> None:
        if exchange in self._exchanges:
            exchange.lost()

    def _later(self, within_s: float, what: Callable[..., None], *args: Any) -> None:
        """A step of this process."""
        self._loop.call_later(self._dice.random() * within_s, what, *args, context=self._context.copy())

    def _read(self, exchange: Exchange) -> None:
        """The request has come, or the head and a part of its body: then it cannot go straight."""
        if exchange.gone or not self.serves:
            self.over(exchange)
            return
        wants = exchange.attempt.errand.wants
        if wants == LOCK:
            self.run(exchange, lambda: self._lock(exchange))
            return
        if wants not in self._operations and self._dice.random() >= SPLIT_ODDS and self._goes_straight(exchange):
            self._journal.seen[STRAIGHT] += 1
            return
        head = exchange.asked._replace(request_id=exchange.own_id and new_id("req", self._clock))

        async def receive(account_id: str) -> bytes:
            await asyncio.sleep(self._dice.random() * 0.02)
            return exchange.body

        operation = self._operations.get(wants, EMBEDDINGS)
        self.run(exchange, lambda: serve(self._world, operation, head, receive, exchange.send))

    async def _lock(self, exchange: Exchange) -> None:
        """As the gateway's API."""
        assert self.store is not None
        errand = exchange.attempt.errand
        caller = await identify(exchange.asked.authorization, self._world.keys, EMBED_SCOPE)
        terms, _ = await lock_node(
            self._world, self.store.locks, self._sealing, caller, "tiny", errand.tokens, errand.span_s, SDK_SCHEME
        )
        await exchange.send_lock(terms)

    def _goes_straight(self, exchange: Exchange) -> bool:
        asked = exchange.asked
        headers = {
            "authorization": asked.authorization,
            "idempotency-key": asked.idempotency_key,
            "x-stainless-retry-count": None if asked.retries is None else str(asked.retries),
        }
        known = self._straight.knows({name: value for name, value in headers.items() if value is not None})
        if known is not None:
            exchange.straight = self._straight.ask(known, exchange.body, exchange)
        return exchange.straight is not None

    def run(self, exchange: Exchange, work: Callable[[], Awaitable[Any]]) -> None:
        exchange.serving = self._start(self._serve(exchange, work))

    async def _serve(self, exchange: Exchange, work: Callable[[], Awaitable[Any]]) -> None:
        life, failure = exchange.attempt.life, None
        exchange.started()
        try:
            await work()
        except Failure as error:
            failure = error
            if isinstance(error, InternalError):
                self._journal.wrong.append(f"life {life}: {error.message}")
            self.say(f"tells {life}: {error.code} ({error.message[:60]})")
        except ConnectionError:
            pass
        except Exception as error:  # noqa: BLE001 - that is what we look for
            self._journal.wrong.append(f"life {life}: {type(error).__name__}: {error}")
        finally:
            if self.alive:
                self.over(exchange, failure)

    def over(self, exchange: Exchange, failure: Failure | None = None) -> None:
        exchange.attempt.ended, exchange.attempt.failure = self._loop.now, failure
        self._exchanges.pop(exchange, None)
        exchange.answer(failure)

    async def _observe(self, began: float, account: str, model: str, outcome: Awaitable[Outcome]) -> None:
        """As the gateway's API: what has gone straight goes on, and gives its room back."""
        try:
            await outcome
        finally:
            self._room.give_back(account)
