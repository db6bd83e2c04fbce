"""The end of a paid request: its reply is rendered and delivered, and charged in the same step.

What was delivered only in part, or not at all, is told apart here: see `rules.exchange.Delivery`.
"""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from math import ceil
from typing import NamedTuple, TypeVar

import msgspec

from embedmesh.flow.bill import Bill
from embedmesh.flow.idempotency import Kept, pack
from embedmesh.flow.operation import Invocation, Operation
from embedmesh.flow.retries import Shared
from embedmesh.flow.world import World
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import (
    COST_HEADER,
    PROCESSING_HEADER,
    REQUEST_HEADER,
    Deliver,
    Delivery,
    Reply,
    RequestHead,
    StreamedReply,
)
from embedmesh.rules.forwarding import Share
from embedmesh.rules.holds import Charge, HoldState, Payable
from embedmesh.rules.money import payable_nanousd
from embedmesh.rules.ports import Caller, RateLimit

AnyReply = TypeVar("AnyReply", bound=Reply | StreamedReply)
NOBODYS = (Share("", 0),)
REPLAYED = {"idempotent-replayed": "true"}


class Request(NamedTuple):
    """One valid request."""

    began: float  # on the monotonic clock
    caller: Caller
    head: RequestHead
    body: bytes  # what it has in common with others that are the same request
    call: Invocation
    operation: Operation

    @property
    def again(self) -> bool:
        """Whether an SDK says that it has tried before."""
        return bool(self.head.retries)


class Done(NamedTuple):
    """A reply that can be delivered, and the bill for it: None if it is free or was paid before."""

    reply: Reply | StreamedReply
    bill: Bill | None = None
    kept: Kept | None = None  # for the same request again
    claimed: bool = False  # by an `Idempotency-Key`: then the ledger keeps the reply

    def close(self) -> None:
        """What was not delivered is not charged. Changes nothing after a delivery."""
        if self.bill is not None:
            self.bill.release()


class Outcome(NamedTuple):
    """What was delivered and charged, for the metrics."""

    model: str
    tokens: int
    cost_nanousd: int
    delivery: Delivery


class Delivering:
    """Delivers a reply and charges it, in one step."""

    def __init__(self, world: World, request: Request, deliver: Deliver) -> None:
        self._world = world
        self._request = request
        self._deliver = deliver
        self._delivery = Delivery.WHOLE

    async def alone(self, done: Done) -> Outcome:
        """Raises what the delivery raises; then nothing is charged."""
        try:
            await self._hand_over(done)
        finally:
            done.close()
        return self._outcome(done)

    async def shared(self, work: Shared[Done]) -> Outcome:
        """The same for what others may wait for, too. Raises what the work raises."""
        return self._outcome(await self._world.single_flight.take(work, self._hand_over))

    async def _hand_over(self, done: Done) -> None:
        world, request = self._world, self._request
        reply = with_limits(done.reply, world.rate_limits.left(request.caller))
        if isinstance(reply, StreamedReply):
            async with aclosing(reply.parts):  # what it owes is known once it is closed
                await self._send(done, reply)
        else:
            await self._send(done, reply)
        if done.bill is not None and done.bill.state is HoldState.RELEASED:
            self._delivery = Delivery.FAILED
        _settle(world, request, done, self._delivery)

    async def _send(self, done: Done, reply: Reply | StreamedReply) -> None:
        if done.bill is not None:
            done.bill.check_time(self._world.clock)
        self._delivery = await self._deliver(reply)

    def _outcome(self, done: Done) -> Outcome:
        bill, model = done.bill, self._request.call.model.id
        return Outcome(model, bill.tokens if bill else 0, bill.cost if bill else 0, self._delivery)


def join(world: World, request: Request, work: Callable[[], Awaitable[Done]], reply_bytes: int) -> Shared[Done]:
    """Begin the work, or join it if this is the same request again."""
    return world.single_flight.join(
        request.caller, request.body, reply_bytes=reply_bytes, again=request.again, begin=work
    )


class Continued:
    """A request that was begun in one step, and is a matter of coroutines from now on. A retry finds it at once."""

    def __init__(self, world: World, request: Request, work: Callable[[], Awaitable[Done]]) -> None:
        self._world = world
        self._request = request
        self._work = work
        shared = request.head.retries is not None
        self._shared = join(world, request, work, request.call.reply_bytes_max) if shared else None

    async def deliver(self, deliver: Deliver) -> Outcome:
        """Answer it, as `serve` does."""
        try:
            delivering = Delivering(self._world, self._request, deliver)
            if self._shared is not None:
                return await delivering.shared(self._shared)
            return await delivering.alone(await self._work())
        except Failure as failure:
            failure.envelope = self._request.operation.envelope
            raise

    def leave(self) -> None:
        """The caller has gone: a retry may find it. Only for a request of an SDK that tries again."""
        assert self._shared is not None
        self._world.single_flight.leave(self._shared)


async def work_under(world: World, request: Request, bill: Bill, *, claimed: bool = False) -> Done:
    """Have the work done and render the reply. Raises a Failure; then the bill is released."""
    call = request.call
    with bill:
        result = await call.work(world, bill)
        headers = reply_headers(world, request.began, None if call.streams else bill.cost, bill)
        kept = None if call.streams else Kept(result, bill.cost)
        return Done(call.render(result, headers), bill, kept, claimed)


def _settle(world: World, request: Request, done: Done, delivery: Delivery) -> None:
    """Some of the reply was handed to the caller: charge it, once, and remember what the work has taught."""
    caller, bill, kept = request.caller, done.bill, done.kept
    if bill is None:
        if request.again and delivery is Delivery.WHOLE:
            world.unread.forget(caller, request.body)
        return
    claimed = pack(kept) if kept is not None and done.claimed else None
    if bill.capture(charge_of(world, caller, request.call, bill), claimed):
        request.call.paid(world, caller)
    if done.claimed or kept is None:
        return  # the ledger keeps it; or it was a stream
    if delivery is Delivery.BROKEN_OFF and bill.captured:
        world.unread.keep(caller, request.body, kept, request.call.kept_bytes)
    else:
        world.unread.forget(caller, request.body)


def charge_of(world: World, caller: Caller, call: Invocation, bill: Bill) -> Charge:
    """The ledger's record of a captured bill."""
    shares = bill.shares or NOBODYS  # a stream may be noted before its first event
    return Charge(
        cost_nanousd=bill.cost,
        tokens=bill.tokens,
        model=call.model.id,
        key_id=bill.hold.key_id or caller.key_id,  # of a lock: its key, whose budget was held; that of no other
        node_id=shares[0].node_id,
        payables=_payables(bill, world.ask_max) if shares[0].ask or len(shares) > 1 else (),
        user_hash=None if call.user is None else world.hash_user(call.user),
        price=bill.price,
        meters=bill.metered or () if bill.price is None else (),
    )


def _payables(bill: Bill, ask_max: int | None) -> tuple[Payable, ...]:
    """What each node gets; nothing if it asks for nothing."""
    gets: dict[str, int] = {}  # a node may have changed its ask between two parts
    left = bill.cost
    for share in bill.shares:
        nanousd = payable_nanousd(share.tokens, share.ask, ask_max, left)
        gets[share.node_id] = gets.get(share.node_id, 0) + nanousd
        left -= nanousd
    return tuple(Payable(node_id, nanousd) for node_id, nanousd in gets.items() if nanousd)


def replayed(world: World, request: Request, kept: Kept) -> Reply | StreamedReply:
    return request.call.render(kept.result, reply_headers(world, request.began, kept.cost) | REPLAYED)


def reply_headers(world: World, began: float, cost: int | None, bill: Bill | None = None) -> dict[str, str]:
    """The headers that every reply has; `cost` in nano-USD, if it is known before the delivery."""
    headers = {PROCESSING_HEADER: f"{ceil((world.clock.monotonic() - began) * 1000)}"}
    if cost is not None:
        headers[COST_HEADER] = f"{cost}"
    if bill is not None:
        headers[REQUEST_HEADER] = bill.hold.hold_id
    return headers


def with_limits(reply: AnyReply, left: tuple[RateLimit, ...]) -> AnyReply:
    """The reply with what is left of the limits of the caller's key, if it has any."""
    if not left:
        return reply
    headers = dict(reply.headers)
    for limit in left:
        headers[f"x-ratelimit-limit-{limit.what}"] = str(limit.limit)
        headers[f"x-ratelimit-remaining-{limit.what}"] = str(max(0, limit.left))
        headers[f"x-ratelimit-reset-{limit.what}"] = f"{limit.reset_s:.3f}s"
    return msgspec.structs.replace(reply, headers=headers)
