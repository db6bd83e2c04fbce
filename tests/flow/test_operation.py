"""Another operation than embeddings runs through the same spine: an echo that streams, priced by two meters."""

import asyncio
from collections.abc import AsyncGenerator

import msgspec
import pytest

from embedmesh.flow.bill import Bill
from embedmesh.flow.deliver import Outcome
from embedmesh.flow.operation import Bound, CanPayFor
from embedmesh.flow.paid import serve
from embedmesh.flow.world import World
from embedmesh.rules.errors import EmptyInput, Failure
from embedmesh.rules.exchange import Deliver, Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Share
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from tests.flow.world import GOOD_KEY, METERED_KEY, MODEL, POOR_KEY, make_world


class Echo:
    """Says every word of the body again. A word costs 1 nano-USD to hear and 3 to say."""

    scope = "embeddings"
    result = msgspec.Struct

    def envelope(self, failure: Failure) -> bytes:
        return f"echo: {failure.code}".encode()

    def parse(self, world: World, head: RequestHead, body: bytes) -> "EchoCall":
        if not body.split():
            raise EmptyInput("Say something.")
        return EchoCall(body.split())

    def price_min(self, world: World, account_id: str, model: Model | None) -> int:
        return 1_000_000

    def may_be_free(self, world: World, caller: Caller) -> bool:
        return False


class EchoCall:
    model, user, lock, streams, reply_bytes_max, kept_bytes = MODEL, None, None, True, 1_024, 0

    def __init__(self, words: list[bytes]) -> None:
        self.words = words

    def check_served(self, world: World) -> None: ...

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        return len(self.words)

    def bound(self, world: World, caller: Caller, *, claimed: bool) -> Bound:
        return Bound(self.metered(len(self.words)), within_s=30.0)

    async def work(self, world: World, bill: Bill) -> AsyncGenerator[bytes, None]:
        bill.owe(*self.metered(0), shares=(Share("echo", len(self.words)),))
        return self.parts(bill)

    async def parts(self, bill: Bill) -> AsyncGenerator[bytes, None]:
        for said, word in enumerate(self.words, 1):
            bill.owe(*self.metered(said), shares=(Share("echo", len(self.words)),))
            yield word

    def render(self, result: AsyncGenerator[bytes, None], headers: dict[str, str]) -> StreamedReply:
        return StreamedReply(headers, result)

    def paid(self, world: World, caller: Caller) -> None: ...

    def metered(self, said: int) -> tuple[Metered, ...]:
        return Metered(Meter.INPUT, len(self.words), 1_000_000), Metered(Meter.OUTPUT, said, 3_000_000)


# -- the tests


async def echo(world: World, deliver: Deliver, body: bytes = b"a b c", key: str = GOOD_KEY) -> Outcome:
    async def receive(account_id: str) -> bytes:
        return body

    return await serve(world, Echo(), RequestHead(f"Bearer {key}"), receive, deliver)


def reader(read: list[bytes], parts_max: int = 100) -> Deliver:
    """A caller that reads so many parts and then breaks off."""

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, StreamedReply)
        async for part in reply.parts:
            read.append(part)
            if len(read) == parts_max:
                return Delivery.BROKEN_OFF
        return Delivery.WHOLE

    return deliver


async def test_a_stream_is_held_for_its_bound_and_charged_by_its_meters() -> None:
    world = make_world()
    read: list[bytes] = []
    outcome = await echo(world, reader(read))
    assert read == [b"a", b"b", b"c"]
    assert world.ledger.log == [("hold", 3 * 1 + 3 * 3), ("capture", 12)]
    assert (outcome.tokens, outcome.cost_nanousd, outcome.delivery) == (6, 12, Delivery.WHOLE)


async def test_a_caller_that_breaks_a_stream_off_pays_what_was_said_until_then() -> None:
    world = make_world()
    read: list[bytes] = []
    outcome = await echo(world, reader(read, parts_max=2))
    assert world.ledger.log == [("hold", 12), ("capture", 3 * 1 + 2 * 3)]
    assert outcome.delivery is Delivery.BROKEN_OFF


@pytest.mark.parametrize("error", [ConnectionResetError, asyncio.CancelledError, RuntimeError])
async def test_a_stream_that_we_break_off_costs_nothing(error: type[BaseException]) -> None:
    world = make_world()

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        raise error

    with pytest.raises(error):
        await echo(world, deliver)
    assert world.ledger.log == [("hold", 12), ("release", 12)]


@pytest.mark.parametrize(
    ("key", "body", "code"), [(GOOD_KEY, b" ", "empty_input"), (POOR_KEY, b"a", "insufficient_quota")]
)
async def test_a_refusal_is_told_in_the_operation_s_own_envelope(key: str, body: bytes, code: str) -> None:
    world = make_world()
    with pytest.raises(Failure) as refused:
        await echo(world, reader([]), body, key)
    assert refused.value.envelope is not None and refused.value.envelope(refused.value) == f"echo: {code}".encode()
    assert world.ledger.log == []


async def test_its_tokens_count_against_the_key_s_limits() -> None:
    world = make_world()
    await echo(world, reader([]), key=METERED_KEY)
    assert world.rate_limits.taken == {"requests": 1, "tokens": 3}
