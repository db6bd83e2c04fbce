"""One request and its reply, between a caller and a gateway, as a server would carry them.

A reply is handed over in one step, or slowly; its caller may be gone, or go in the middle. What goes straight has no
task until it goes on; then it is served as any other.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from bench.lives.journal import Attempt, DeliveryNote, Journal
from bench.lives.loop import Loop
from bench.lives.streaming import Streaming
from embedmesh.http.sending import Rest
from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.straight import Asked, GoOn

Outcome = Reply | StreamedReply | LockTerms | Failure | None
"""What a caller gets: a reply, or a lock, which is one; a stream that has ended; None: the connection broke."""

STRAIGHT = "straight: requests"
TO_THE_END = "straight: to the end"
WRITE_S_MAX = 8.0  # a slow caller takes so long to take its reply
SLOW_ODDS = 0.05  # of a caller that is slow
FULL_ODDS = 0.15  # of a socket that does not take a reply at once


class Server(Protocol):
    """The gateway, as an exchange needs it."""

    name: str

    def run(self, exchange: "Exchange", work: Callable[[], Awaitable[Any]]) -> None:
        """Have a coroutine handle the exchange."""
        ...

    def over(self, exchange: "Exchange", failure: Failure | None = None) -> None:
        """The exchange has ended; the caller has its reply, or gets the failure."""
        ...

    def say(self, what: str) -> None: ...


class Exchange:
    """Implements `rules.straight.ToCaller`."""

    def __init__(
        self, server: Server, loop: Loop, dice: random.Random, odds: float, journal: Journal, attempt: Attempt,
        asked: RequestHead, own_id: str | None,
    ) -> None:  # fmt: skip
        """`odds` are those of a reply that cannot be delivered. `own_id` is the request's, if we gave it one."""
        self.attempt = attempt
        self.asked = asked
        self.body = attempt.errand.body
        self.own_id = own_id
        self.gone = False  # the caller has hung up
        self.sending = False  # its reply: a caller that goes does not end that
        self.straight: Asked | None = None  # while it goes straight
        self.left: Callable[[], None] | None = None  # of a stream: to be called once its caller has gone
        self.lost_it: asyncio.Future[None] = loop.create_future()  # the server knows that the caller has gone
        self.leaves_after = 0  # events of a stream; 0: its caller stays
        self.enough: asyncio.Future[None] = loop.create_future()  # the caller has all events that it wants
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self.serving: asyncio.Task[Any] | None = None
        self._server = server
        self._loop = loop
        self._dice = dice
        self._odds = odds
        self._journal = journal
        self._started = self._broken = False

    def answer(self, what: Outcome) -> None:
        """What the caller gets, if it still listens."""
        if not self.outcome.done():
            self.outcome.set_result(what)

    def had(self, events: int) -> None:
        """The caller has that many events of its stream."""
        if events == self.leaves_after and not self.enough.done():
            self.enough.set_result(None)

    # -- for the server

    def lost(self) -> None:
        """The caller has gone, and the server has noticed. A reply that is being sent ends by itself."""
        if self.straight is not None:
            asked, self.straight = self.straight, None
            self._journal.seen["straight: their callers left"] += 1
            asked.caller_left()
            self._server.over(self)
            return
        if not self.lost_it.done():
            self.lost_it.set_result(None)
        if self.left is not None:
            self._loop.call_soon(self.left)
        if not self.sending:
            self.break_off()

    def stop(self) -> None:
        """The gateway is about to end: what goes straight goes on."""
        if self.straight is not None:
            self.go_on(self.straight.go_on())

    def started(self) -> None:
        """Its coroutine runs. A server's loop never cancels one that has not begun."""
        self._started = True
        if self._broken:
            self.break_off()

    def break_off(self) -> None:
        """Cancel its coroutine, once that has begun."""
        self._broken = True
        if self._started and self.serving is not None:
            self._loop.call_soon(self.serving.cancel)

    # -- for what goes straight

    def deliver(self, reply: Reply) -> Rest | None:
        """As `http.sending.send_now`."""
        dice = self._dice
        if self.gone or dice.random() < self._odds:
            return Rest(begun=False, gone=True)
        if dice.random() < FULL_ODDS:
            return Rest(begun=dice.random() < 0.5, gone=dice.random() < self._odds)
        self._delivered(reply, whole=True)
        return None

    def end(self) -> None:
        self.straight = None
        self._journal.seen[TO_THE_END] += 1
        self._server.over(self)

    def go_on(self, handle: GoOn, rest: object | None = None) -> None:
        self.straight = None
        self._journal.seen["straight: went on"] += 1
        if not isinstance(rest, Rest):
            self._server.run(self, lambda: handle(self.send))
            return
        self.sending = True
        self._server.run(self, lambda: handle(lambda reply: self._finish(reply, rest)))

    # -- for coroutines

    async def send(self, reply: Reply | StreamedReply) -> Delivery:
        """Implements `Deliver`."""
        if isinstance(reply, StreamedReply):
            return await Streaming(self, reply, self._loop, self._dice, self._odds, self._journal).send()
        await asyncio.sleep(self._dice.random() * 0.01)  # a socket that is full
        if self.gone or self._dice.random() < self._odds:
            raise ConnectionResetError("the caller is gone")
        self.sending = True
        return await self._finish(reply, Rest(begun=True))

    async def send_lock(self, terms: LockTerms) -> None:
        """Small, and of no worth: whether it is delivered decides nothing."""
        await asyncio.sleep(self._dice.random() * 0.01)
        if self.gone or self._dice.random() < self._odds:
            raise ConnectionResetError("the caller is gone")
        self._server.say(f"locks for {self.attempt.life}: {terms.hold_id}, {terms.units} at {terms.price}")
        self.answer(terms)

    async def _finish(self, reply: Reply | StreamedReply, rest: Rest) -> Delivery:
        assert isinstance(reply, Reply)
        dice = self._dice
        try:
            if not rest.gone:
                await asyncio.sleep(dice.random() * (WRITE_S_MAX if dice.random() < SLOW_ODDS else 0.01))
        except asyncio.CancelledError:
            self._journal.seen["deliveries that we broke off"] += 1
            raise
        whole = not rest.gone and not self.gone and dice.random() >= self._odds
        if not whole and not rest.begun:
            raise ConnectionResetError("the caller is gone")
        self._delivered(reply, whole=whole)
        return Delivery.WHOLE if whole else Delivery.BROKEN_OFF

    def _delivered(self, reply: Reply, *, whole: bool) -> None:
        """Some of it is in the kernel."""
        attempt, headers, journal, name = self.attempt, reply.headers, self._journal, self._server.name
        hold_id = headers.get("x-embedmesh-request")
        cost = int(headers["x-embedmesh-cost-nanousd"])
        known = headers.get("x-embedmesh-cached") not in (None, "0") and cost == 0
        if (hold_id is None) != (headers.get("idempotent-replayed") == "true") and not known:
            journal.wrong.append(f"life {attempt.life}: a reply that is neither new nor kept: {headers}")
        again = bool(self.asked.retries)
        journal.deliveries.append(
            DeliveryNote(
                self._loop.now, attempt.life, attempt.errand, name, hold_id, cost, reply.body, whole, again,
                attempt.began,
            )
        )  # fmt: skip
        words = f"{hold_id or 'what was kept'}, {cost}"
        if whole:
            self._server.say(f"delivers to {attempt.life}: {words}")
            self.answer(reply)
        else:
            journal.seen["deliveries that were broken off"] += 1
            self._server.say(f"is broken off delivering to {attempt.life}: {words}")
