"""Who cannot pay the least that a request costs is refused before it is counted; work in vain takes from limits."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest

from embedmesh.flow.deliver import Outcome
from embedmesh.flow.paid import BYTES_A_TOKEN, LARGE_BYTES, SOON_BYTES_MAX, serve
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import Failure, StoreUnavailable
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.ports import Caller
from tests.flow.world import (
    EMBEDDINGS,
    GOOD_KEY,
    METERED_KEY,
    PENNY_KEY,
    POOR_KEY,
    LetterTokenizer,
    ScriptedWorld,
    make_world,
)

LONG = b'{"model":"tiny","truncate":"end","input":"' + b"a" * 10_000 + b'"}'
LARGE = LONG.replace(b"a" * 10_000, b"a" * LARGE_BYTES)


class Counting(LetterTokenizer):
    """Knows how many characters it was given."""

    def __init__(self) -> None:
        self.chars = 0

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        self.chars += sum(map(len, texts))
        return super().ids(texts)


@pytest.fixture
def tokenizer() -> Counting:
    return Counting()


@pytest.fixture
def world(tokenizer: Counting) -> ScriptedWorld:
    made = make_world()
    return msgspec.structs.replace(made, tokenizers=dict.fromkeys(made.tokenizers, tokenizer))


async def ask(
    world: ScriptedWorld,
    key: str,
    body: bytes,
    *,
    idempotency_key: str | None = None,
    retries: int | None = None,
    read: Callable[[], Awaitable[object]] | None = None,
) -> Outcome:
    async def receive(account_id: str) -> bytes:
        return body

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        if read is not None:
            await read()
        return Delivery.WHOLE

    return await serve(world, EMBEDDINGS, RequestHead(f"Bearer {key}", idempotency_key, retries), receive, deliver)


async def refusal(world: ScriptedWorld, key: str, body: bytes, **how: Any) -> str:
    with pytest.raises(Failure) as refused:
        await ask(world, key, body, **how)
    return refused.value.code


@pytest.mark.parametrize("body", [LONG, LARGE])
async def test_without_money_a_long_text_is_not_looked_at(
    world: ScriptedWorld, tokenizer: Counting, body: bytes
) -> None:
    assert await refusal(world, POOR_KEY, body) == "insufficient_quota"
    assert tokenizer.chars == 0
    assert world.ledger.log == []


async def test_with_too_little_it_is_looked_at_until_that_is_known(world: ScriptedWorld, tokenizer: Counting) -> None:
    """4 nano-USD pay two tokens; each input has two special ones."""
    many = b'{"model":"tiny","truncate":"end","input":[' + b",".join([b'"' + b"a" * 2_000 + b'"'] * 9) + b"]}"
    assert await refusal(world, PENNY_KEY, many) == "insufficient_quota"
    assert tokenizer.chars == 0
    assert await refusal(world, PENNY_KEY, LONG) == "insufficient_quota"
    assert tokenizer.chars < 3_000


async def test_an_invalid_request_is_told_so_before_money_is_looked_at(world: ScriptedWorld) -> None:
    """Save in one so large that it is not even parsed."""
    assert await refusal(world, POOR_KEY, LONG.replace(b'"end"', b'"off"')) == "invalid_value"
    assert await refusal(world, POOR_KEY, b"[" + b" " * SOON_BYTES_MAX) == "invalid_json"
    assert await refusal(world, POOR_KEY, b"[" + b" " * LARGE_BYTES) == "insufficient_quota"
    assert world.ledger.looked_at == 1


async def test_who_can_pay_is_served_and_a_short_request_asks_nothing_more(world: ScriptedWorld) -> None:
    assert (await ask(world, GOOD_KEY, LONG)).tokens == 8
    assert (await ask(world, GOOD_KEY, LARGE)).tokens == 8
    assert world.ledger.looked_at == 3
    await ask(world, GOOD_KEY, b'{"model":"tiny","input":"abc"}')
    assert world.ledger.looked_at == 3


async def test_what_was_paid_before_is_given_to_who_has_nothing_left(world: ScriptedWorld) -> None:
    """By its Idempotency-Key with its own body; with another body it is worth nothing."""
    await ask(world, GOOD_KEY, LARGE, idempotency_key="k")
    before = world.ledger.log[:]
    world.ledger.poor.add("acct")
    await ask(world, GOOD_KEY, LARGE, idempotency_key="k")
    assert world.ledger.log == before
    assert await refusal(world, GOOD_KEY, LARGE + b" ", idempotency_key="k") == "insufficient_quota"
    assert await refusal(world, GOOD_KEY, LARGE, idempotency_key="other") == "insufficient_quota"


async def test_a_retry_finds_its_twin_though_that_holds_all_the_money(world: ScriptedWorld) -> None:
    reading, read = asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        reading.set()
        await read.wait()

    first = asyncio.ensure_future(ask(world, GOOD_KEY, LARGE, retries=0, read=slowly))
    await reading.wait()
    world.ledger.poor.add("acct")
    await ask(world, GOOD_KEY, LARGE, retries=1)
    read.set()
    await first
    assert [what for what, _ in world.ledger.log] == ["hold", "capture"]


async def test_what_is_known_of_an_account_whose_cache_is_free_needs_no_money(world: ScriptedWorld) -> None:
    class Free:
        async def find(self, token: str) -> Caller:
            return Caller("acct", "key_1", frozenset({"embeddings"}), cache=CachePolicy.FREE)

    world = msgspec.structs.replace(world, keys=Free())
    world.ledger.poor.add("acct")
    assert await refusal(world, GOOD_KEY, LARGE) == "insufficient_quota"
    world.ledger.poor.clear()
    await ask(world, GOOD_KEY, LARGE)
    world.ledger.poor.add("acct")
    await ask(world, GOOD_KEY, LARGE)


IN_VAIN = {
    "not valid": (GOOD_KEY, b'{"model":"none","input":"' + b"a" * 1_000 + b'"}'),
    "not JSON": (GOOD_KEY, b"{" * 1_000),
    "too long": (GOOD_KEY, b'{"model":"tiny","input":"' + b"a" * 9_000 + b'"}'),
    "too many tokens for the minute": (METERED_KEY, b'{"model":"tiny","input":["' + b'abcdef","' * 9 + b'a"]}'),
    "no money, before it is counted": (POOR_KEY, LONG),
    "no money, before it is parsed": (POOR_KEY, LARGE),
}


@pytest.mark.parametrize("why", IN_VAIN)
async def test_what_is_refused_takes_from_the_limit_of_tokens(world: ScriptedWorld, why: str) -> None:
    """A token for every 16 bytes of its body."""
    key, body = IN_VAIN[why]
    await refusal(world, key, body)
    assert world.rate_limits.in_vain == [len(body) // BYTES_A_TOKEN]


async def test_what_is_refused_for_want_of_money_takes_its_tokens_or_bytes(world: ScriptedWorld) -> None:
    """Whichever is more: of a short text its tokens are taken already."""
    body = b'{"model":"tiny","input":"abc"}' + b" " * 160
    assert await refusal(world, POOR_KEY, body) == "insufficient_quota"
    assert world.rate_limits.in_vain == [len(body) // BYTES_A_TOKEN - 5]


async def test_what_is_refused_by_our_own_fault_takes_nothing(world: ScriptedWorld) -> None:
    """The store cannot say what there is."""

    class Away:
        async def available_nanousd(self, account_id: str, key_id: str) -> int:
            raise StoreUnavailable("away")

    world = msgspec.structs.replace(world, ledger=Away())
    assert await refusal(world, GOOD_KEY, LONG) == "store_unavailable"
    assert world.rate_limits.in_vain == []


async def test_work_for_a_caller_who_hangs_up_stays_taken(world: ScriptedWorld) -> None:
    """While its text is being counted."""
    asking = asyncio.ensure_future(ask(world, GOOD_KEY, LARGE))
    while not world.ledger.looked_at:
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert world.rate_limits.in_vain == [len(LARGE) // BYTES_A_TOKEN]
    assert world.ledger.log == []
