"""The spine: what is the same for everything that is paid, in order.

    identify → limits → receive → parse → count → bound → money set aside → work → render → deliver → capture

Identity and its rate come before the body is read; validation before money; money before any node; delivery before the
charge. Nothing is remembered of work that was not paid. What differs by operation and dialect is an `Operation`.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from embedmesh.flow.bill import redeem, set_aside
from embedmesh.flow.deliver import Delivering, Done, Outcome, Request, join, replayed, reply_headers, work_under
from embedmesh.flow.idempotency import check_key, check_room, unpack
from embedmesh.flow.identify import identify, may_use
from embedmesh.flow.job import can_pay, check_job, under_job
from embedmesh.flow.means import Means
from embedmesh.flow.operation import CanPay, Invocation, Operation, PayingLock
from embedmesh.flow.world import World
from embedmesh.rules.confidential import UNUSED, claim_key
from embedmesh.rules.errors import CallerFailure, Failure, InsufficientQuota, InvalidValue, NoNodeAvailable, Overloaded
from embedmesh.rules.exchange import (
    Deliver,
    Receive,
    RequestHead,
)
from embedmesh.rules.holds import Claim, Hold, Meter
from embedmesh.rules.limits import KEPT_REPLY_BYTES_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.money import bill_nanousd
from embedmesh.rules.ports import Caller
from embedmesh.rules.request_record import CURRENT

INPUT = Meter.INPUT  # an enum's member is slow to look up
REPLAYED = {"idempotent-replayed": "true"}
SOON_BYTES_MAX = 32 * 1024  # of a body that is parsed on the event loop: a millisecond at most
LARGE_BYTES = 256 * 1024  # a larger body is parsed only for callers who can pay: parsing may take 20 MB
BYTES_A_TOKEN = 16  # of a body: what a refused request takes from the key's limit of tokens


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
        if (record := CURRENT.get()) is not None:
            record.account = caller.account_id
        await world.rate_limits.take_request(caller)
        body = await receive(caller.account_id)
        with _spent_if_refused(world, caller, body):
            if head.job is not None:
                check_job(world, operation, head)
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
    delivering = Delivering(world, request, deliver)
    if request.again and head.idempotency_key is None and (kept := world.unread.find(caller, body)) is not None:
        return await delivering.alone(Done(replayed(world, request, kept)))

    with _spent_if_refused(world, caller, body):
        tokens = await call.count(world, caller, partial(_can_pay_for, world, operation, head, caller, body))
        await world.rate_limits.take_tokens(caller, tokens)
    if head.job is not None:
        try:
            done = await under_job(world, request, tokens)
        except InsufficientQuota:
            _spend_body(world, request, tokens)
            raise
        return await delivering.alone(done)
    claim = None
    if head.idempotency_key is not None:
        check_key(head.idempotency_key)
        check_room(call.kept_bytes, await world.ledger.kept_bytes(caller.account_id))
        claim = world.claim_of(head.idempotency_key, body)
    work = partial(_work, world, request, tokens, claim)
    if head.retries is None or claim is not None or call.lock is not None or call.streams:
        return await delivering.alone(await work())
    return await delivering.shared(join(world, request, work, reply_bytes))


async def _work(world: World, request: Request, tokens: int, claim: Claim | None) -> Done:
    """Set the money aside, have the work done and render the reply; or find a reply that was kept. Raises a Failure."""
    caller, call = request.caller, request.call
    bound = call.bound(world, caller, claimed=claim is not None)
    if bound.free is not None and claim is None:  # no node, no debt, no hold
        return Done(call.render(bound.free, reply_headers(world, request.began, 0)))
    if call.lock is not None:
        return await _under_lock(world, request, call.lock, bound.within_s)
    try:
        bill = await set_aside(
            world.ledger,
            caller,
            bill_nanousd(bound.metered),
            bound.within_s,
            world.clock,
            claim,
            world.waiting,
            slots=world.slots,
            request_id=request.head.request_id,
            alone=call.streams,
        )
    except InsufficientQuota:
        _spend_body(world, request, tokens)
        raise
    if isinstance(bill, bytes):  # delivered and paid before
        return Done(replayed(world, request, unpack(bill, request.operation.result)))
    return await work_under(world, request, bill, claimed=claim is not None)


async def _under_lock(world: World, request: Request, lock: PayingLock, within_s: float) -> Done:
    """The same where a lock has the money; the same request again finds the reply that was kept. Raises a Failure."""
    claim = world.claim_of(claim_key(lock.terms.lock_id), request.body)
    if not lock.here:
        hold = Hold(hold_id="", account_id=request.caller.account_id, amount_nanousd=0, deadline_ms=0)
        prior = await world.ledger.prior_request(hold, claim)
        if prior is not None and prior.body_hash == UNUSED:
            raise NoNodeAvailable(
                "The node that was locked is not one of this gateway's, or not any more. Send the request to the "
                "gateway that has locked it, or lock again."
            )
    bill = await redeem(
        world.ledger,
        lock.redeem,
        lock.terms,
        claim,
        request.caller,
        within_s,
        world.clock,
        world.waiting,
        world.slots,
        streams=request.call.streams,
    )
    if isinstance(bill, bytes):
        return Done(replayed(world, request, unpack(bill, request.operation.result)))
    done = await work_under(world, request, bill, claimed=lock.kept)
    return done._replace(claimed=lock.kept and request.call.kept_bytes <= KEPT_REPLY_BYTES_MAX)


@contextmanager
def _spent_if_refused(world: World, caller: Caller, body: bytes) -> Iterator[None]:
    """A refusal that is the caller's fault, or its leaving, takes a token for every BYTES_A_TOKEN from its limits."""
    try:
        yield
    except (CallerFailure, asyncio.CancelledError):
        world.rate_limits.spend_tokens(caller, len(body) // BYTES_A_TOKEN)
        raise


def _spend_body(world: World, request: Request, tokens: int) -> None:
    """The same where the money does not suffice. `tokens` were taken already."""
    world.rate_limits.spend_tokens(request.caller, len(request.body) // BYTES_A_TOKEN - tokens)


async def _can_pay_for(
    world: World, operation: Operation, head: RequestHead, caller: Caller, body: bytes, model: Model | None
) -> CanPay | None:
    """For the cheapest model if none is named. None for a request that may cost nothing: it is not judged here."""
    if operation.may_be_free(world, caller) or (head.retries and _was_made(world, caller, body)):
        return None
    if head.job is not None:
        return await can_pay(world, operation, head, caller, body, model)
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
