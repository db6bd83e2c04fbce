"""The spine: what is the same for everything that is paid, in order.

    identify → limits → receive → parse → count → bound → money set aside → work → render → deliver → capture

Identity and its rate come before the body is read; validation before money; money before any node; delivery before the
charge. Nothing is remembered of work that was not paid. What differs by operation and dialect is an `Operation`.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import msgspec

from embedmesh.flow.bill import Bill, set_aside
from embedmesh.flow.idempotency import Kept, check_key, check_room, pack, unpack
from embedmesh.flow.identify import identify, may_use
from embedmesh.flow.means import Means
from embedmesh.flow.operation import CanPay, Invocation, Operation
from embedmesh.flow.retries import Shared
from embedmesh.flow.world import World
from embedmesh.rules.errors import CallerFailure, Failure, InsufficientQuota, InvalidValue, Overloaded
from embedmesh.rules.exchange import (
    COST_HEADER,
    PROCESSING_HEADER,
    REQUEST_HEADER,
    Deliver,
    Delivery,
    Receive,
    Reply,
    RequestHead,
    StreamedReply,
)
from embedmesh.rules.holds import Charge, Claim, Hold, Meter, Payable
from embedmesh.rules.models import Model
from embedmesh.rules.money import bill_nanousd, payable_nanousd
from embedmesh.rules.ports import Caller, RateLimit

INPUT = Meter.INPUT  # an enum's member is slow to look up
REPLAYED = {"idempotent-replayed": "true"}
SOON_BYTES_MAX = 32 * 1024  # of a body that is parsed on the event loop: a millisecond at most
LARGE_BYTES = 256 * 1024  # a larger body is parsed only for callers who can pay: parsing may take 20 MB
BYTES_A_TOKEN = 16  # of a body: what a refused request takes from the key's limit of tokens


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


async def serve(
    world: World,
    operation: Operation,
    head: RequestHead,
    receive: Receive,
    deliver: Deliver,
    on_model: Callable[[str], None] = lambda _model: None,
) -> Outcome:
    """Answer one request. Raises a Failure, with the operation's envelope; then nothing was charged.

    `on_model` is called with the id of the model, once it is known.
    """
    try:
        began = world.clock.monotonic()
        caller = await identify(head.authorization, world.keys, operation.scope, api_key=head.api_key)
        await world.rate_limits.take_request(caller)
        body = await receive(caller.account_id)
        with _spent_if_refused(world, caller, body):
            call = await _parse(world, operation, head, caller, body)
            on_model(call.model.id)
            may_use(caller, call.model)
            call.check_served(world)
            reply_bytes = _take_room(world, caller, call)
        try:
            request = Request(began, caller, head, head.identity(body), call, operation)
            return await _answer(world, request, reply_bytes, deliver)
        finally:
            world.replies.give_back(caller.account_id, reply_bytes)
    except Failure as failure:
        failure.envelope = operation.envelope
        raise


async def _parse(world: World, operation: Operation, head: RequestHead, caller: Caller, body: bytes) -> Invocation:
    """Validate; a large body off the event loop, and only if the caller can pay. Raises CallerFailure, Overloaded."""
    if len(body) <= SOON_BYTES_MAX:
        return operation.parse(world, head, body)
    if len(body) > LARGE_BYTES:
        can_pay = await _can_pay_for(world, operation, head, caller, head.identity(body), None)
        if can_pay is not None:
            can_pay(1)
    return await world.turns.call(caller.account_id, operation.parse, world, head, body)


def _take_room(world: World, caller: Caller, call: Invocation) -> int:
    """Room for the reply, in bytes, until the caller has read it. Raises InvalidValue or Overloaded."""
    size = call.reply_bytes_max
    if size > world.replies.alone:
        raise InvalidValue(
            f"The reply would take up to {size:,} bytes; one of at most {world.replies.alone:,} can be made here. "
            'Split the inputs, or ask for "encoding_format": "base64".',
            param="input",
        )
    if not world.replies.take(caller.account_id, size):
        raise Overloaded(
            "This gateway has as many bytes of replies under way as it may for one account, of "
            f"{world.replies.total:,} for all. Read those that wait, or try again shortly."
        )
    return size


async def _answer(world: World, request: Request, reply_bytes: int, deliver: Deliver) -> Outcome:
    """From a valid request to the delivery of its reply. Raises a Failure, or what `deliver` raises."""
    _, caller, head, body, call, operation = request
    delivering = _Delivering(world, request, deliver)
    if request.again and head.idempotency_key is None and (kept := world.unread.find(caller, body)) is not None:
        return await delivering.alone(Done(_replayed(world, request, kept)))

    with _spent_if_refused(world, caller, body):
        tokens = await call.count(world, caller, partial(_can_pay_for, world, operation, head, caller, body))
        await world.rate_limits.take_tokens(caller, tokens)
    claim = None
    if head.idempotency_key is not None:
        check_key(head.idempotency_key)
        check_room(call.kept_bytes, await world.ledger.kept_bytes(caller.account_id))
        claim = world.claim_of(head.idempotency_key, body)
    work = partial(_work, world, request, tokens, claim)
    if head.retries is None or claim is not None or call.streams:
        return await delivering.alone(await work())
    return await delivering.shared(_join(world, request, work, reply_bytes))


class _Delivering:
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
        if done.bill is not None:
            done.bill.check_time(world.clock)
        self._delivery = await self._deliver(with_limits(done.reply, world.rate_limits.left(request.caller)))
        _settle(world, request, done, self._delivery)

    def _outcome(self, done: Done) -> Outcome:
        bill, model = done.bill, self._request.call.model.id
        return Outcome(model, bill.tokens if bill else 0, bill.cost if bill else 0, self._delivery)


def _join(world: World, request: Request, work: Callable[[], Awaitable[Done]], reply_bytes: int) -> Shared[Done]:
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
        self._shared = _join(world, request, work, request.call.reply_bytes_max) if shared else None

    async def deliver(self, deliver: Deliver) -> Outcome:
        """Answer it, as `serve` does."""
        try:
            delivering = _Delivering(self._world, self._request, deliver)
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


async def _work(world: World, request: Request, tokens: int, claim: Claim | None) -> Done:
    """Set the money aside, have the work done and render the reply; or find a reply that was kept. Raises a Failure."""
    caller, call = request.caller, request.call
    bound = call.bound(world, caller, claimed=claim is not None)
    if bound.free is not None and claim is None:  # no node, no debt, no hold
        return Done(call.render(bound.free, reply_headers(world, request.began, 0)))
    try:
        bill = await set_aside(
            world.ledger,
            caller,
            bill_nanousd(bound.metered),
            bound.within_s,
            world.clock,
            claim,
            world.waiting,
            request_id=request.head.request_id,
        )
    except InsufficientQuota:
        world.rate_limits.spend_tokens(caller, len(request.body) // BYTES_A_TOKEN - tokens)
        raise
    if isinstance(bill, bytes):  # delivered and paid before
        return Done(_replayed(world, request, unpack(bill, request.operation.result)))
    return await work_under(world, request, bill, claimed=claim is not None)


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
    metered = bill.metered or ()
    single = metered[0].price if len(metered) == 1 and metered[0].meter is INPUT else None
    return Charge(
        cost_nanousd=bill.cost,
        tokens=bill.tokens,
        model=call.model.id,
        key_id=caller.key_id,
        node_id=bill.shares[0].node_id,
        payables=_payables(bill, world.ask_max),
        user_hash=world.hash_user(call.user) if call.user is not None else None,
        price=single,
        meters=metered if single is None else (),
    )


def _payables(bill: Bill, ask_max: int | None) -> tuple[Payable, ...]:
    """What each node gets; nothing if it asks for nothing."""
    if not any(share.ask for share in bill.shares):
        return ()
    gets: dict[str, int] = {}  # a node may have changed its ask between two parts
    left = bill.cost
    for share in bill.shares:
        nanousd = payable_nanousd(share.tokens, share.ask, ask_max, left)
        gets[share.node_id] = gets.get(share.node_id, 0) + nanousd
        left -= nanousd
    return tuple(Payable(node_id, nanousd) for node_id, nanousd in gets.items() if nanousd)


def _replayed(world: World, request: Request, kept: Kept) -> Reply | StreamedReply:
    return request.call.render(kept.result, reply_headers(world, request.began, kept.cost) | REPLAYED)


def reply_headers(world: World, began: float, cost: int | None, bill: Bill | None = None) -> dict[str, str]:
    """The headers that every reply has; `cost` in nano-USD, if it is known before the delivery."""
    headers = {PROCESSING_HEADER: str(math.ceil((world.clock.monotonic() - began) * 1000))}
    if cost is not None:
        headers[COST_HEADER] = str(cost)
    if bill is not None:
        headers[REQUEST_HEADER] = bill.hold.hold_id
    return headers


def with_limits(reply: Reply | StreamedReply, left: tuple[RateLimit, ...]) -> Reply | StreamedReply:
    """The reply with what is left of the limits of the caller's key, if it has any."""
    if not left:
        return reply
    headers = dict(reply.headers)
    for limit in left:
        headers[f"x-ratelimit-limit-{limit.what}"] = str(limit.limit)
        headers[f"x-ratelimit-remaining-{limit.what}"] = str(max(0, limit.left))
        headers[f"x-ratelimit-reset-{limit.what}"] = f"{limit.reset_s:.3f}s"
    return msgspec.structs.replace(reply, headers=headers)


@contextmanager
def _spent_if_refused(world: World, caller: Caller, body: bytes) -> Iterator[None]:
    """A refusal that is the caller's fault, or its leaving, takes a token for every BYTES_A_TOKEN from its limits."""
    try:
        yield
    except (CallerFailure, asyncio.CancelledError):
        world.rate_limits.spend_tokens(caller, len(body) // BYTES_A_TOKEN)
        raise


async def _can_pay_for(
    world: World, operation: Operation, head: RequestHead, caller: Caller, body: bytes, model: Model | None
) -> CanPay | None:
    """For the cheapest model if none is named. None for a request that may cost nothing: it is not judged here."""
    if operation.may_be_free(world, caller) or (head.retries and _was_made(world, caller, body)):
        return None
    if head.idempotency_key is not None and await _is_kept(world, head.idempotency_key, caller, body):
        return None
    price = operation.price_min(world, caller.account_id, model)
    return Means(await world.ledger.available_nanousd(caller.account_id, caller.key_id), price).check


def _was_made(world: World, caller: Caller, body: bytes) -> bool:
    """Whether the same request is under way in this gateway, or its reply was paid and not read."""
    return world.single_flight.under_way(caller, body) or world.unread.find(caller, body) is not None


async def _is_kept(world: World, key: str, caller: Caller, body: bytes) -> bool:
    """Whether the request was made before with this Idempotency-Key: then its reply may have been paid."""
    claim = await world.turns.call(caller.account_id, world.claim_of, key, body)
    hold = Hold(hold_id="", account_id=caller.account_id, amount_nanousd=0, deadline_ms=0)
    prior = await world.ledger.prior_request(hold, claim)
    return prior is not None and prior.body_hash == claim.body_hash
