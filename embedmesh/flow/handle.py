"""The story of one `POST /v1/embeddings`, top to bottom.

Identity and its rate before the body is read; validation before money; money before any node; delivery before the
charge.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import msgspec

from embedmesh.flow.again import Asked, Kept, Twins, check_key, check_room, pack, unpack
from embedmesh.flow.cache import Remembered, VectorCache
from embedmesh.flow.count import CanPay, count
from embedmesh.flow.forward import forward, time_allowed_s
from embedmesh.flow.hold import Held, hold_money
from embedmesh.flow.identify import identify, may_use
from embedmesh.flow.means import Means, may_be_free
from embedmesh.flow.respond import limit_headers, respond
from embedmesh.flow.turns import Turns
from embedmesh.flow.validate import validate
from embedmesh.flow.verify import verify
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.deadlines import REQUEST_MIN_S
from embedmesh.rules.embeddings import Call, Counted
from embedmesh.rules.errors import CallerFailure, InsufficientQuota
from embedmesh.rules.holds import Charge, Claim, Hold, Payable
from embedmesh.rules.models import Model
from embedmesh.rules.money import cost_nanousd, payable_nanousd
from embedmesh.rules.ports import (
    Allowances,
    Answer,
    Caller,
    Catalogue,
    Clock,
    Decoder,
    Deliver,
    Fleet,
    Keys,
    Ledger,
    NodeClient,
    Prices,
    Reply,
    Tokenizer,
    Witness,
)

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
    allowances: Allowances
    prices: Prices
    catalogue: Catalogue
    tokenizers: Mapping[str, Tokenizer]  # by model id
    cl100k: Decoder | None
    ledger: Ledger
    fleet: Fleet
    client: NodeClient
    witness: Witness
    clock: Clock
    twins: "Twins[Done]"
    cache: VectorCache
    hash_user: Callable[[str], str]
    claim_of: Callable[[str, bytes], Claim]
    turns: Turns = msgspec.field(default_factory=Turns)
    ask_max: int | None = None  # the most that a node is paid, in nano-USD per million tokens


class Done(NamedTuple):
    """A reply that can be delivered. The money is held for it still, unless it was paid before."""

    reply: Reply
    held: Held | None
    charge: Charge | None
    kept: bytes | None  # for those who ask again


class Outcome(NamedTuple):
    """What was delivered and charged, for the metrics."""

    model: str
    tokens: int
    cost_nanousd: int


class _Request(NamedTuple):
    """One request, with all that was found out of it before any money is held."""

    began: float
    caller: Caller
    call: Call
    model: Model
    counted: Counted
    claim: Claim | None
    body_bytes: int


async def handle(world: World, asked: Asked, receive: Receive, deliver: Deliver) -> Outcome:
    """Answer one request. Raises a Failure that the edge turns into the envelope; then nothing was charged."""
    began = world.clock.monotonic()
    caller = await identify(asked.authorization, world.keys, EMBED_SCOPE)
    await world.allowances.take_request(caller)
    body = await receive(caller.account_id)
    call, model, counted = await _read(world, asked, caller, body)
    claim = None
    if asked.idempotency_key is not None:
        check_key(asked.idempotency_key)
        check_room(model, counted, await world.ledger.kept_bytes(caller.account_id))
        claim = world.claim_of(asked.idempotency_key, body)
    request = _Request(began, caller, call, model, counted, claim, len(body))

    async def hand_over(done: Done) -> None:
        reply = done.reply
        if left := world.allowances.left(caller):
            reply = Reply({**reply.headers, **limit_headers(left)}, reply.body)
        await deliver(reply)
        if done.held is not None and done.charge is not None:
            done.held.capture(done.charge, done.kept)

    if asked.retries is None or claim is not None:
        done = await _work(world, request)
        try:
            await hand_over(done)
        finally:
            give_up(done)
    else:
        done = await world.twins.work(
            caller.key_id, body, again=asked.retries > 0, begin=lambda: _work(world, request), deliver=hand_over
        )
    charge = done.charge
    return Outcome(model.id, charge.tokens if charge else 0, charge.cost_nanousd if charge else 0)


async def _read(world: World, asked: Asked, caller: Caller, body: bytes) -> tuple[Call, Model, Counted]:
    """What is asked for, and how much that is. What is refused takes from the key's limits, too. Raises a Failure."""

    async def can_pay_for(model: Model | None) -> CanPay | None:
        """For the cheapest model where none is named."""
        if may_be_free(asked, caller, body, world.cache, world.twins):
            return None
        if asked.idempotency_key is not None and await _is_kept(world, asked.idempotency_key, caller, body):
            return None
        price = min(world.prices.of(each, caller.account_id) for each in ([model] if model else world.catalogue.models))
        return Means(await world.ledger.available_nanousd(caller.account_id, caller.key_id), price).check

    try:
        if len(body) <= SOON_BYTES_MAX:
            call, model = validate(body, world.catalogue)
        else:
            if len(body) > LARGE_BYTES and (can_pay := await can_pay_for(None)) is not None:
                can_pay(1)
            call, model = await world.turns.call(caller.account_id, validate, body, world.catalogue)
        may_use(caller, model)
        tokenizer = world.tokenizers.get(model.id)
        counted = await count(call, model, tokenizer, world.cl100k, world.turns, caller.account_id, can_pay_for)
        await world.allowances.take_tokens(caller, counted.tokens)
    except (CallerFailure, asyncio.CancelledError):
        world.allowances.spend_tokens(caller, len(body) // BYTES_A_TOKEN)
        raise
    return call, model, counted


async def _is_kept(world: World, key: str, caller: Caller, body: bytes) -> bool:
    """Whether the request was made before with this Idempotency-Key: then its reply may have been paid."""
    claim = await world.turns.call(caller.account_id, world.claim_of, key, body)
    hold = Hold(hold_id="", account_id=caller.account_id, amount_nanousd=0, deadline_ms=0)
    twin = await world.ledger.twin(hold, claim)
    return twin is not None and twin.body_hash == claim.body_hash


def give_up(done: Done) -> None:
    """What was not delivered is not charged. Changes nothing after a delivery."""
    if done.held is not None:
        done.held.release()


async def _work(world: World, request: _Request) -> Done:
    """Hold the money, have the inputs embedded and write the reply; or find one that was kept. Raises a Failure."""
    _, caller, call, model, counted, claim, body_bytes = request
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
        return Done(_reply(world, request, gratis, {CACHED_HEADER: str(found.inputs)}), None, None, None)
    until = world.clock.monotonic() + within_s
    bound = cost_nanousd(counted.tokens - free, price)
    try:
        held = await hold_money(world.ledger, caller, bound, within_s, world.clock, claim)
    except InsufficientQuota:
        world.allowances.spend_tokens(caller, body_bytes // BYTES_A_TOKEN - counted.tokens)
        raise
    if isinstance(held, bytes):
        kept = unpack(held)  # made of what the ledger kept: delivered and paid before
        return Done(_reply(world, request, kept, REPLAYED), None, None, None)
    try:
        answer = await _answer(world, request, missing, found, held.hold, until)
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
        ours = {"x-embedmesh-request": held.hold.hold_id}
        if found is not None:
            ours[CACHED_HEADER] = str(found.inputs)
        return Done(_reply(world, request, kept, ours), held, charge, pack(kept) if claim is not None else None)
    except BaseException:
        held.release()
        raise


async def _answer(
    world: World, request: _Request, missing: Counted, found: Remembered | None, hold: Hold, until: float
) -> Answer:
    """The vectors of all inputs, of which those that are `missing` have to be embedded. Raises a Failure."""
    account_id, model = request.caller.account_id, request.model
    answer = None
    if missing.lengths:
        left_s = until - world.clock.monotonic()
        answer = await forward(model, missing, hold, left_s, world.fleet, world.client, verify, world.witness)
        if found is None:
            return answer
        world.cache.keep(account_id, model, missing, answer)
    assert found is not None
    return found.join(answer, model.width)


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
