"""The ordinary embedding request: asked for in one step, answered in another, with nothing that waits between them.

`StraightEmbeddings.ask` looks at everything before it takes anything, so that what is not ordinary can begin anew on
the spine (`paid.serve`). A request that stops being ordinary while a node works on it goes on from the state reached:
with its hold, its count, and the attempt under way (`deliver.Continued`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, cast

import msgspec

from embedmesh.flow.bill import Bill, new_hold
from embedmesh.flow.deliver import Continued, Done, Outcome, Request, charge_of, reply_headers, with_limits, work_under
from embedmesh.flow.embed import Embedded, Embeddings, EmbeddingsCall
from embedmesh.flow.forward import Begun
from embedmesh.flow.idempotency import Kept
from embedmesh.flow.identify import token_of
from embedmesh.flow.verify import verify
from embedmesh.flow.world import World
from embedmesh.rules.deadlines import attempt_s
from embedmesh.rules.embeddings import EmbedVectors
from embedmesh.rules.errors import InvalidValue, NodeFailure
from embedmesh.rules.exchange import Deliver, RequestHead
from embedmesh.rules.forwarding import Answer, Attempt, Part, Share
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.money import cost_nanousd
from embedmesh.rules.ports import Caller
from embedmesh.rules.request_record import RequestRecord
from embedmesh.rules.shares import Room
from embedmesh.rules.straight import GoOn, ToCaller

LOOK_EVERY_S = 0.05  # at the attempts under way: the shortest deadline is a second
NO_PART = Part("", (), 0, 0.0)  # of a request that no node was asked for yet


class Counts(Protocol):
    """What is counted of requests."""

    def ended(self, code: str, model: str, seconds: float, tokens: int = 0, nanousd: int = 0) -> None:
        """`ok`, or why not; and what was charged."""
        ...


Observe = Callable[[float, str, str, Awaitable[Outcome]], Awaitable[None]]
"""When a request began, its account, its model, and what it does from now on: counts how that ends."""


class KnownHead(NamedTuple):
    """A head with which a request may be ordinary."""

    token: str
    head: RequestHead


class StraightEmbeddings:
    """Asks for ordinary requests. Implements `rules.straight.Straight`."""

    def __init__(self, world: World, operation: Embeddings, room: Room, counts: Counts, observe: Observe) -> None:
        """`room` bounds the requests under way. `observe` gives their room back for those that go on."""
        self.world = world
        self.operation = operation
        self.observe = observe
        self.counts = counts
        self.room = room.shares
        self.in_flight = cast("dict[StraightRequest, None]", world.single_flight.straight)  # bounded by `room`
        self._looking = False

    def knows(self, headers: Mapping[str, str]) -> KnownHead | None:
        head = RequestHead.read(headers.get, None, None)
        try:
            token = token_of(head.authorization, head.api_key)
        except InvalidValue:
            return None
        return KnownHead(token, head) if token and not head.retries and head.idempotency_key is None else None

    def ask(self, known: KnownHead, body: bytes, to_caller: ToCaller) -> "StraightRequest | None":
        world = self.world
        now = world.clock.monotonic()
        caller = world.keys.known(known.token, now)
        if caller is None or not caller.embeds:
            return None
        if not world.ledger.has_tab(caller.key_id):
            return None  # or a request that cannot be paid would be parsed twice
        limited = caller.limited
        if limited and not world.rate_limits.take_now(caller, 1, look=True):
            return None
        read = self.operation.read_now(world, caller, body)
        if read is None:
            return None
        call, metered = read
        if limited and not world.rate_limits.take_now(caller, metered.quantity, look=True):
            return None
        cost = cost_nanousd(metered.quantity, metered.price)
        hold = world.ledger.spend(new_hold(None, caller, cost, REQUEST_MIN_S, world.clock))
        if hold is None:
            return None
        bill = Bill(
            world.ledger, hold, now + REQUEST_MIN_S,
            metered=(metered,), cost=cost, tokens=metered.quantity, price=metered.price,
        )  # fmt: skip
        request = StraightRequest(self, known.head, caller, call, body, bill, to_caller, now)
        room, part, attempt = False, None, None
        try:
            if not caller.slots or self._takes_slots(caller, bill):
                room = self.room.take(caller.account_id)
            if room and (call.call.single or request.takes_room_for_reply(call.reply_bytes_max)):
                part = world.fleet.try_now(call.model, call.counted, now)
            if part is not None and (link := world.client.link_to(part.node_id)) is not None:
                request.part = part
                attempt = link.ask(part, call.model, call.counted, hold.hold_id, request)
        finally:
            if attempt is None:  # no node can be asked at once, or there is a bug of ours
                self._give_back(request, room, part)
        if attempt is None:
            return None
        request.attempt = attempt
        self.in_flight[request] = None
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)
        if limited:
            world.rate_limits.take_now(caller, metered.quantity)
        return request

    def _takes_slots(self, caller: Caller, bill: Bill) -> bool:
        """Take them until the bill ends. Returns whether they were free."""
        if not self.world.slots.take_now(caller, bill.hold.deadline_ms):
            return False
        bill.has_slots(self.world.slots, caller)
        return True

    def _give_back(self, request: "StraightRequest", room: bool, part: Part | None) -> None:
        """All that was taken for a request that does not begin."""
        request.bill.release()
        if room:
            self.room.give_back(request.caller.account_id)
        request.give_back_reply()
        if part is not None:
            self.world.fleet.abandoned(part)

    def _look(self) -> None:
        """Attempts that are late become a matter of coroutines: they may ask another node."""
        self._looking = bool(self.in_flight)
        if self._looking:  # first, so that a bug of ours below does not end it
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)
        now = self.world.clock.monotonic()
        for request in [each for each in self.in_flight if each.began + attempt_s(each.part.expected_s) < now]:
            request.share()


class StraightRequest(msgspec.Struct, eq=False):
    """One of them, under way. Implements `rules.straight.Asked`, `AttemptOwner` and `Unshared`."""

    straight: StraightEmbeddings
    head: RequestHead
    caller: Caller
    call: EmbeddingsCall
    body: bytes
    bill: Bill
    to_caller: ToCaller
    began: float
    part: Part = NO_PART
    attempt: Attempt | None = None
    reply_bytes: int = 0  # of the room for replies; one vector's is small beside what else a request takes
    begun: Begun | None = None  # once it goes on
    continued: Continued | None = None

    @property
    def request_id(self) -> str:
        """Our own id of it, as the ledger has it."""
        return self.bill.hold.hold_id

    def record(self) -> RequestRecord:
        bill, paid = self.bill, self.bill.captured
        return RequestRecord(
            self.request_id,
            account=self.caller.account_id,
            node=self.part.node_id,
            model=self.call.model.id,
            seconds=self.straight.world.clock.monotonic() - self.began,
            bytes_in=len(self.body),
            tokens=bill.tokens if paid else 0,
            nanousd=bill.cost if paid else 0,
        )

    def takes_room_for_reply(self, size: int) -> bool:
        """Take that many bytes, until the caller has the reply. Returns whether there was room."""
        if not self.straight.world.replies.take(self.caller.account_id, size):
            return False
        self.reply_bytes = size
        return True

    def give_back_reply(self) -> None:
        """The reply was read, or there will be none."""
        if self.reply_bytes:
            self.straight.world.replies.give_back(self.caller.account_id, self.reply_bytes)
            self.reply_bytes = 0

    # -- for the node's client

    def answered(self, vectors: EmbedVectors) -> None:
        if self.begun is not None:
            self.begun.answered(vectors)
            return
        straight, call = self.straight, self.call
        part, bill, world = self.part, self.bill, straight.world
        try:
            verify(vectors, call.model, part, call.counted.exact)
        except NodeFailure as failure:
            self.failed(failure)
            return
        del straight.in_flight[self]
        self.attempt = None  # it knows us: or each request would have to be found by a collection of garbage
        now = world.clock.monotonic()
        try:
            if world.fleet.answered_now(part, now):
                world.observer.answered(call.model, call.counted, part, vectors)
            bill.shares = shares = (Share(part.node_id, vectors.tokens, part.ask),)
            result = Embedded(Answer(vectors.data, call.model.width, vectors.tokens, shares), 0)
            reply = call.render(result, reply_headers(world, self.began, bill.cost, bill))
            if self.caller.limited:
                reply = with_limits(reply, world.rate_limits.left(self.caller))
            rest = self.to_caller.deliver(reply)
        except Exception as error:  # noqa: BLE001 - a bug of ours, which the coroutine explains and counts
            bill.release()
            self._go_on(partial(_broken, error))
            return
        if rest is not None:
            self._go_on(partial(_ready, Done(reply, bill, Kept(result, bill.cost))), rest)
            return
        bill.capture(charge_of(world, self.caller, call, bill))
        if world.unread.accounts:
            world.unread.forget(self.caller, self.body)
        self._end("ok", now, bill.tokens, bill.cost)
        self.to_caller.end()

    def failed(self, failure: NodeFailure) -> None:
        if self.begun is None:
            self.share()
            assert self.begun is not None
        self.begun.failed(failure)

    # -- what is not ordinary

    def share(self) -> None:
        """A retry waits for it, too, or the attempt is late or has failed."""
        self.to_caller.go_on(self.go_on())

    def go_on(self) -> GoOn:
        straight = self.straight
        del straight.in_flight[self]
        assert self.attempt is not None
        spent_s = straight.world.clock.monotonic() - self.began
        self.begun = self.call.begun = Begun(self.part, self.attempt, spent_s)
        self.bill.metered = None  # what it owes is for its work to say
        return self._continue(partial(work_under, straight.world, self._request(), self.bill))

    def caller_left(self) -> None:
        if self.head.retries is None:
            del self.straight.in_flight[self]
            assert self.attempt is not None
            self.attempt.cancel()
            self.straight.world.fleet.abandoned(self.part)
            self.bill.release()
        else:
            self.go_on()
            assert self.continued is not None
            self.continued.leave()
        self._end("dropped", self.straight.world.clock.monotonic())

    def _end(self, code: str, now: float, tokens: int = 0, cost: int = 0) -> None:
        """It is over, without a coroutine. `tokens` and `cost` were charged."""
        straight = self.straight
        straight.room.give_back(self.caller.account_id)
        if self.reply_bytes:
            self.give_back_reply()
        straight.counts.ended(code, self.call.model.id, now - self.began, tokens, cost)

    def _go_on(self, work: Callable[[], Awaitable[Done]], rest: object | None = None) -> None:
        """Its part has ended; the coroutine does the remaining work."""
        self.to_caller.go_on(self._continue(work), rest)

    def _continue(self, work: Callable[[], Awaitable[Done]]) -> GoOn:
        straight = self.straight
        self.continued = continued = Continued(straight.world, self._request(), work)
        account_id, model_id, began = self.caller.account_id, self.call.model.id, self.began
        return lambda deliver: straight.observe(began, account_id, model_id, self._deliver(continued, deliver))

    async def _deliver(self, continued: Continued, deliver: Deliver) -> Outcome:
        try:
            return await continued.deliver(deliver)
        finally:
            self.give_back_reply()

    def _request(self) -> Request:
        return Request(self.began, self.caller, self.head, self.body, self.call, self.straight.operation)


async def _ready(done: Done) -> Done:
    return done


async def _broken(error: Exception) -> Done:
    raise error
