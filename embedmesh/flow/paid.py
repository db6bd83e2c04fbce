"""The story of one `POST /v1/embeddings`, top to bottom.

Identity and its rate before the body is read; validation before money; money before any node; delivery before the
charge. Nothing is remembered of what was not paid.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import msgspec

from embedmesh.dialects.openai.parse import ORDINARY, Terms, no_such_model, validate
from embedmesh.dialects.openai.render import limit_headers, reply_bytes_max, respond
from embedmesh.flow.cache import Learnt, Remembered, VectorCache
from embedmesh.flow.count import CanPay, count
from embedmesh.flow.forward import forward, time_allowed_s
from embedmesh.flow.hold import Held, hold_money, waiters
from embedmesh.flow.identify import identify, may_use
from embedmesh.flow.means import Means, may_be_free
from embedmesh.flow.retries import Asked, Kept, SingleFlight, Unread, check_key, check_room, pack, unpack
from embedmesh.flow.turns import Turns
from embedmesh.flow.verify import verify
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.embeddings import Call, Counted
from embedmesh.rules.errors import CallerFailure, InsufficientQuota, InvalidValue, Overloaded
from embedmesh.rules.holds import Charge, Claim, Hold, HoldState, Payable
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.models import Model
from embedmesh.rules.money import cost_nanousd, payable_nanousd
from embedmesh.rules.ports import (
    REQUEST_HEADER,
    Answer,
    Caller,
    Catalogue,
    Clock,
    Decoder,
    Deliver,
    Delivery,
    Fleet,
    Keys,
    Ledger,
    NodeClient,
    Observer,
    Prices,
    RateLimits,
    Reply,
    Tokenizer,
)
from embedmesh.rules.shares import Room, Shares

EMBED_SCOPE = "embeddings"
CACHED_HEADER = "x-embedmesh-cached"
REPLAYED = {"idempotent-replayed": "true"}
SOON_BYTES_MAX = 32 * 1024  # of a body that is parsed on the event loop: a millisecond at most
LARGE_BYTES = 256 * 1024  # a body above it is not parsed for who can pay nothing: that may take 20 MB
BYTES_A_TOKEN = 16  # of a body: what one that is refused takes from the key's limit of tokens

Receive = Callable[[str], Awaitable[bytes]]
"""The body of a request of this account. Raises Overloaded where there is no room for it."""


class World(msgspec.Struct, frozen=True):
    """Everything outside that the story touches. `hash_user` keys and hashes the member `user`, `claim_of` an
    `Idempotency-Key` with its body.
    """

    keys: Keys
    rate_limits: RateLimits
    prices: Prices
    catalogue: Catalogue
    tokenizers: Mapping[str, Tokenizer]  # by model id
    cl100k: Decoder | None
    ledger: Ledger
    fleet: Fleet
    client: NodeClient
    observer: Observer
    clock: Clock
    single_flight: "SingleFlight[Done]"
    unread: Unread
    replies: Shares  # bytes of replies that may wait to be made, and to be read
    cache: VectorCache
    hash_user: Callable[[str], str]
    claim_of: Callable[[str, bytes], Claim]
    terms: Terms = ORDINARY
    turns: Turns = msgspec.field(default_factory=Turns)
    ask_max: int | None = None  # the most that a node is paid, in nano-USD per million tokens
    waiting: Room = msgspec.field(default_factory=waiters)  # for the reply of another request


class Owed(NamedTuple):
    """What a reply costs, held still, and what is remembered once it is paid."""

    held: Held
    charge: Charge
    kept: Kept  # for those who ask again
    claimed: bool  # by an `Idempotency-Key`: then it is kept in the ledger
    learnt: Learnt | None  # for the cache


class Done(NamedTuple):
    """A reply that can be delivered, and what is owed for it: nothing, where it is free or was paid before."""

    reply: Reply
    owed: Owed | None = None


class Outcome(NamedTuple):
    """What was delivered and charged, for the metrics."""

    model: str
    tokens: int
    cost_nanousd: int
    delivery: Delivery = Delivery.WHOLE


class _Request(NamedTuple):
    """One request that is valid."""

    began: float
    caller: Caller
    body: bytes
    call: Call
    model: Model
    request_id: str | None


async def handle(
    world: World,
    asked: Asked,
    receive: Receive,
    deliver: Deliver,
    on_model: Callable[[str], None] = lambda _model: None,
) -> Outcome:
    """Answer one request. Raises a Failure that the edge turns into the envelope; then nothing was charged.

    `on_model` is told the id of the model that is asked for, once that is known.
    """
    began = world.clock.monotonic()
    caller = await identify(asked.authorization, world.keys, EMBED_SCOPE, api_key=asked.api_key)
    await world.rate_limits.take_request(caller)
    body = await receive(caller.account_id)
    with _spent_if_refused(world, caller, body):
        call, model = await _read(world, asked, caller, body)
        on_model(model.id)
        may_use(caller, model)
        if not world.fleet.may_come(model):
            raise no_such_model(call.model, world.catalogue, world.terms.serves)
        reply_bytes = _take_room(world, caller, call, model)
    try:
        request = _Request(began, caller, asked.whole(body), call, model, asked.request_id)
        return await _answer_all(world, asked, request, reply_bytes, deliver)
    finally:
        world.replies.give_back(caller.account_id, reply_bytes)


def _take_room(world: World, caller: Caller, call: Call, model: Model) -> int:
    """Room for the reply, in bytes, until the caller has read it. Raises InvalidValue or Overloaded."""
    size = reply_bytes_max(call, model.width)
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


async def _answer_all(world: World, asked: Asked, request: _Request, reply_bytes: int, deliver: Deliver) -> Outcome:
    """From a valid request to the delivery of its reply. Raises a Failure, or what `deliver` raises."""
    _, caller, body, call, model, _ = request
    again = asked.retries is not None and asked.retries > 0
    delivery = Delivery.WHOLE

    async def hand_over(done: Done) -> None:
        nonlocal delivery
        reply = done.reply
        if done.owed is not None:
            done.owed.held.check_time(world.clock)
        if left := world.rate_limits.left(caller):
            reply = Reply({**reply.headers, **limit_headers(left)}, reply.body)
        delivery = await deliver(reply)
        if done.owed is not None:
            _pay(world, request, done.owed, delivery)
        elif again and delivery is Delivery.WHOLE:
            world.unread.forget(caller, body)

    if again and asked.idempotency_key is None and (kept := world.unread.find(caller, body)) is not None:
        await hand_over(Done(_reply(world, request, kept, REPLAYED)))
        return Outcome(model.id, 0, 0, delivery)

    with _spent_if_refused(world, caller, body):
        can_pay_for = partial(_can_pay_for, world, asked, caller, body)
        tokenizer = world.tokenizers.get(model.id)
        counted = await count(call, model, tokenizer, world.cl100k, world.turns, caller.account_id, can_pay_for)
        await world.rate_limits.take_tokens(caller, counted.tokens)
    claim = None
    if asked.idempotency_key is not None:
        check_key(asked.idempotency_key)
        check_room(model, counted, await world.ledger.kept_bytes(caller.account_id))
        claim = world.claim_of(asked.idempotency_key, body)
    if asked.retries is None or claim is not None:
        done = await _work(world, request, counted, claim)
        try:
            await hand_over(done)
        finally:
            give_up(done)
    else:
        done = await world.single_flight.work(
            caller,
            body,
            reply_bytes=reply_bytes,
            again=again,
            begin=lambda: _work(world, request, counted, None),
            deliver=hand_over,
        )
    charge = done.owed.charge if done.owed is not None else None
    return Outcome(model.id, charge.tokens if charge else 0, charge.cost_nanousd if charge else 0, delivery)


def _pay(world: World, request: _Request, owed: Owed, delivery: Delivery) -> None:
    """Something of a reply was handed to its caller: it is charged, once, and what it has taught us is remembered."""
    if owed.held.state is HoldState.OPEN:
        owed.held.capture(owed.charge, pack(owed.kept) if owed.claimed else None)
        if owed.learnt is not None:
            world.cache.keep(request.caller.account_id, request.model, owed.learnt)
    if owed.claimed:
        return  # the ledger keeps it
    if delivery is Delivery.BROKEN_OFF and owed.held.state is HoldState.CAPTURED:
        world.unread.keep(request.caller, request.body, owed.kept)
    else:
        world.unread.forget(request.caller, request.body)


@contextmanager
def _spent_if_refused(world: World, caller: Caller, body: bytes) -> Iterator[None]:
    """What its caller is at fault for, or leaves, takes from the key's tokens: one for every BYTES_A_TOKEN bytes."""
    try:
        yield
    except (CallerFailure, asyncio.CancelledError):
        world.rate_limits.spend_tokens(caller, len(body) // BYTES_A_TOKEN)
        raise


async def _read(world: World, asked: Asked, caller: Caller, body: bytes) -> tuple[Call, Model]:
    """What is asked for. Raises a CallerFailure, or Overloaded."""
    if len(body) <= SOON_BYTES_MAX:
        return validate(body, world.catalogue, world.terms, named=asked.model)
    if len(body) > LARGE_BYTES:
        can_pay = await _can_pay_for(world, asked, caller, asked.whole(body), None)
        if can_pay is not None:
            can_pay(1)
    reading = partial(validate, body, world.catalogue, world.terms, named=asked.model)
    return await world.turns.call(caller.account_id, reading)


async def _can_pay_for(world: World, asked: Asked, caller: Caller, body: bytes, model: Model | None) -> CanPay | None:
    """For the cheapest model where none is named; None for a request that may cost nothing."""
    if may_be_free(asked, caller, body, world.cache, world.single_flight, world.unread):
        return None
    if asked.idempotency_key is not None and await _is_kept(world, asked.idempotency_key, caller, body):
        return None
    price = min(world.prices.of(each, caller.account_id) for each in ([model] if model else world.catalogue.models))
    return Means(await world.ledger.available_nanousd(caller.account_id, caller.key_id), price).check


async def _is_kept(world: World, key: str, caller: Caller, body: bytes) -> bool:
    """Whether the request was made before with this Idempotency-Key: then its reply may have been paid."""
    claim = await world.turns.call(caller.account_id, world.claim_of, key, body)
    hold = Hold(hold_id="", account_id=caller.account_id, amount_nanousd=0, deadline_ms=0)
    prior = await world.ledger.prior_request(hold, claim)
    return prior is not None and prior.body_hash == claim.body_hash


def give_up(done: Done) -> None:
    """What was not delivered is not charged. Changes nothing after a delivery."""
    if done.owed is not None:
        done.owed.held.release()


async def _work(world: World, request: _Request, counted: Counted, claim: Claim | None) -> Done:
    """Hold the money, have the inputs embedded and write the reply; or find one that was kept. Raises a Failure."""
    _, caller, _, call, model, request_id = request
    price = world.prices.of(model, caller.account_id)
    found = None
    if caller.cache is not CachePolicy.OFF:
        found = world.cache.look(caller.account_id, model, counted)
    missing = found.missing if found is not None and found.inputs else counted
    within_s = REQUEST_MIN_S
    if missing.lengths:
        within_s = time_allowed_s(model, missing.tokens, world.fleet)
        if claim is None:  # else its reply may have been kept, or is under way
            world.fleet.may_wait(model, missing.tokens, caller.account_id)
    free = found.tokens if found is not None and caller.cache is CachePolicy.FREE else 0
    if found is not None and free == counted.tokens and claim is None:  # no node, no debt, no hold
        gratis = Kept(found.join(None, model.width), 0, counted.truncated)
        return Done(_reply(world, request, gratis, {CACHED_HEADER: str(found.inputs)}))
    until = world.clock.monotonic() + within_s
    bound = cost_nanousd(counted.tokens - free, price)
    try:
        held = await hold_money(
            world.ledger, caller, bound, within_s, world.clock, claim, world.waiting, request_id=request_id
        )
    except InsufficientQuota:
        world.rate_limits.spend_tokens(caller, len(request.body) // BYTES_A_TOKEN - counted.tokens)
        raise
    if isinstance(held, bytes):
        kept = unpack(held)  # made of what the ledger kept: delivered and paid before
        return Done(_reply(world, request, kept, REPLAYED))
    try:
        answer, learnt = await _answer(world, request, missing, found, held.hold, until)
        cost = cost_nanousd(answer.tokens - free, price)  # the bound itself, where tokens were counted exactly
        kept = Kept(answer, cost, counted.truncated)
        charge = Charge(
            cost_nanousd=cost,
            tokens=answer.tokens - free,
            model=model.id,
            key_id=caller.key_id,
            node_id=answer.shares[0].node_id,
            payables=_payables(answer, cost, world.ask_max),
            user_hash=world.hash_user(call.user) if call.user is not None else None,
            price=price,
        )
        ours = {REQUEST_HEADER: held.hold.hold_id}
        if found is not None:
            ours[CACHED_HEADER] = str(found.inputs)
        reply = _reply(world, request, kept, ours)
        return Done(reply, Owed(held, charge, kept, claim is not None, learnt))
    except BaseException:
        held.release()
        raise


async def _answer(
    world: World, request: _Request, missing: Counted, found: Remembered | None, hold: Hold, until: float
) -> tuple[Answer, Learnt | None]:
    """The vectors of all inputs, of which those that are `missing` have to be embedded, and what is new of them.

    Raises a Failure.
    """
    model = request.model
    answer = learnt = None
    if missing.lengths:
        left_s = until - world.clock.monotonic()
        answer = await forward(model, missing, hold, left_s, world.fleet, world.client, verify, world.observer)
        if found is None:
            return answer, None
        learnt = world.cache.learn(missing, answer)
    assert found is not None
    return found.join(answer, model.width), learnt


def _reply(world: World, request: _Request, kept: Kept, more: Mapping[str, str] | None = None) -> Reply:
    seconds = world.clock.monotonic() - request.began
    return respond(request.call, kept.truncated, kept.answer, seconds, cost=kept.cost, more=more)


def _payables(answer: Answer, cost: int, ask_max: int | None) -> tuple[Payable, ...]:
    """What each node gets; nothing where it asks for nothing."""
    if not any(share.ask for share in answer.shares):
        return ()
    gets: dict[str, int] = {}  # a node may have changed its ask between two parts
    left = cost
    for share in answer.shares:
        nanousd = payable_nanousd(share.tokens, share.ask, ask_max, left)
        gets[share.node_id] = gets.get(share.node_id, 0) + nanousd
        left -= nanousd
    return tuple(Payable(node_id, nanousd) for node_id, nanousd in gets.items() if nanousd)
