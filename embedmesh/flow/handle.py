"""The story of one `POST /v1/embeddings`, top to bottom.

Identity before the body is read; validation before money; money before any node; delivery before the charge.
"""

from collections.abc import Awaitable, Callable, Mapping

import msgspec

from embedmesh.flow.count import count
from embedmesh.flow.forward import forward, time_allowed_s
from embedmesh.flow.hold import held, place_hold
from embedmesh.flow.identify import identify
from embedmesh.flow.respond import respond
from embedmesh.flow.validate import validate
from embedmesh.flow.verify import verify
from embedmesh.rules.holds import Charge, Payable
from embedmesh.rules.money import cost_nanousd, payable_nanousd
from embedmesh.rules.ports import (
    Answer,
    Catalogue,
    Clock,
    Decoder,
    Deliver,
    Fleet,
    Keys,
    Ledger,
    NodeClient,
    Tokenizer,
    Witness,
)

EMBED_SCOPE = "embeddings"


class World(msgspec.Struct, frozen=True):
    """Everything outside that the story touches. `hash_user` keys and hashes the member `user`."""

    keys: Keys
    catalogue: Catalogue
    tokenizers: Mapping[str, Tokenizer]  # by model id
    cl100k: Decoder | None
    ledger: Ledger
    fleet: Fleet
    client: NodeClient
    witness: Witness
    clock: Clock
    hash_user: Callable[[str], str]
    ask_max: int | None = None  # the most that a node is paid, in nano-USD per million tokens


class Outcome(msgspec.Struct, frozen=True):
    """What was delivered and charged, for the metrics."""

    model: str
    tokens: int
    cost_nanousd: int


async def handle(
    world: World, authorization: str | None, receive: Callable[[], Awaitable[bytes]], deliver: Deliver
) -> Outcome:
    """Answer one request. Raises a Failure that the edge turns into the envelope; then nothing was charged."""
    began = world.clock.monotonic()
    caller = identify(authorization, world.keys, EMBED_SCOPE)
    call, model = validate(await receive(), world.catalogue)
    counted = await count(call, model, world.tokenizers.get(model.id), world.cl100k)
    bound = cost_nanousd(counted.tokens, model.price)
    within_s = time_allowed_s(model, counted.tokens, world.fleet)
    until = world.clock.monotonic() + within_s
    hold = place_hold(caller, bound, within_s, world.clock)
    async with held(world.ledger, hold) as bill:
        left_s = until - world.clock.monotonic()
        answer = await forward(model, counted, hold, left_s, world.fleet, world.client, verify, world.witness)
        cost = cost_nanousd(answer.tokens, model.price)  # the bound itself, where tokens were counted exactly
        reply = respond(call, counted, answer, world.clock.monotonic() - began, cost=cost)
        await deliver(reply)
        bill.charge = Charge(
            cost_nanousd=cost,
            tokens=answer.tokens,
            model=model.id,
            key_id=caller.key_id,
            node_id=answer.shares[0].node_id,
            payables=_payables(answer, cost, world.ask_max),
            user_hash=world.hash_user(call.user) if call.user is not None else None,
        )
    return Outcome(model=model.id, tokens=answer.tokens, cost_nanousd=cost)


def _payables(answer: Answer, cost: int, ask_max: int | None) -> tuple[Payable, ...]:
    """What each node gets; nothing where it asks for nothing."""
    gets: dict[str, int] = {}  # a node may have changed its ask between two parts
    left = cost
    for share in answer.shares:
        nanousd = payable_nanousd(share.tokens, share.ask, ask_max, left)
        gets[share.node_id] = gets.get(share.node_id, 0) + nanousd
        left -= nanousd
    return tuple(Payable(node_id, nanousd) for node_id, nanousd in gets.items() if nanousd)
