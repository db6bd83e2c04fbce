"""A caller never decides whether it pays: over real sockets, on both ways through the gateway, with a real ledger.

From the first byte of a reply's body in the kernel on, whatever the caller does is charged in full. Before that, and
when it was us who ended it, nothing is.
"""

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from embedmesh.dialects.openai import straight
from embedmesh.rules.caching import CachePolicy
from tests.gateway.till import SMALL_BUFFER_BYTES, Customer, Straightway, Till, customer, till, until
from tests.http.test_fast_path import on_each_loop

WIRES = ("tcp", "tls", "unix")
STRAIGHT = "straight"  # the fast path, too, and there is nothing to wait for
BOTH_WAYS = pytest.mark.parametrize("fast_path", [True, False, STRAIGHT], ids=["fast_path", "general", STRAIGHT])
TEXTS = ["wanted"] * 30 + ["a"] * 170  # 8 and 3 tokens; a reply of 0.9 MB, or 0.4 MB in base64
TOKENS, COST = 750, 1_125  # at 1.5 nano-USD each


@pytest.fixture(autouse=True)
def straightway(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test is about the straight way, as many texts as it likes go there."""
    ways = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if STRAIGHT in (ways.get("fast_path"), *ways.get("ways", ())):
        monkeypatch.setattr(Straightway, "wanted", True)
        monkeypatch.setattr(straight, "TEXTS_MAX", len(TEXTS))


async def begin(of: Till, caller: Customer, raw: bytes, size: int = 4_096) -> None:
    """Ask, and read the beginning of the reply."""
    await caller.send(raw)
    assert len(await caller.read(size)) == size


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]], ids=["large", "small"])
@pytest.mark.parametrize("fast_path", [STRAIGHT])
async def test_what_may_go_straight_does(tmp_path: Path, fast_path: str, texts: list[str]) -> None:
    async with till(tmp_path) as shop, customer(shop) as caller:
        for number in (1, 2):
            await caller.send(shop.ask(texts))
            assert (await caller.reply()).count(b'"embedding":[') == len(texts)
            await shop.ended(number)
        await shop.settled(2)
        assert (shop.nodes.at_once, shop.outcomes) == (2, {"ok": 2})
        assert len(shop.charged) == 2


@BOTH_WAYS
@on_each_loop
async def test_what_was_wanted_first_and_padded_is_paid_to_the_last_token(tmp_path: Path, fast_path: bool) -> None:
    """300 texts, then 1,700 of one token; 1.4 of 9.5 MB are read, which has all that was wanted; then a reset."""
    texts = ["wanted"] * 300 + ["a"] * 1_700
    async with till(tmp_path, small=False) as shop, customer(shop) as caller:
        await begin(shop, caller, shop.ask(texts, fast_path=fast_path), 1_400_000)
        caller.reset()
        await shop.settled(1)
        assert shop.charged == [(7_500, 11_250)]
        assert shop.outcomes == {"broken_off": 1}


ENDS: dict[str, Callable[[Customer], None]] = {
    "resets": Customer.reset,
    "closes": Customer.close,
    "does not read": lambda caller: None,
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("ends", ENDS)
@BOTH_WAYS
@on_each_loop
async def test_who_does_not_take_the_rest_pays_for_all(tmp_path: Path, fast_path: bool, ends: str, wire: str) -> None:
    write_s = 0.2 if ends == "does not read" else 20.0
    async with till(tmp_path, wire, write_s=write_s) as shop, customer(shop) as caller:
        await begin(shop, caller, shop.ask(TEXTS, fast_path=fast_path))
        ENDS[ends](caller)
        await shop.settled(1)
        assert shop.charged == [(TOKENS, COST)]
        assert shop.outcomes == {"broken_off": 1}


@pytest.mark.parametrize("headers", [{}, {"idempotency_key": "k"}, {"x_stainless_retry_count": "0"}])
@pytest.mark.parametrize("encoding", ["float", "base64"])
@BOTH_WAYS
async def test_however_it_was_asked_for(
    tmp_path: Path, fast_path: bool, encoding: str, headers: dict[str, str]
) -> None:
    async with till(tmp_path) as shop, customer(shop) as caller:
        await begin(shop, caller, shop.ask(TEXTS, fast_path=fast_path, encoding=encoding, **headers))
        caller.reset()
        await shop.settled(1)
        assert shop.charged == [(TOKENS, COST)]


async def test_a_caller_of_http_1_0_is_no_exception(tmp_path: Path) -> None:
    async with till(tmp_path) as shop, customer(shop) as caller:
        await begin(shop, caller, shop.ask(TEXTS).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        caller.reset()
        await shop.settled(1)
        assert (shop.charged, shop.outcomes) == ([(TOKENS, COST)], {"broken_off": 1})


@BOTH_WAYS
@on_each_loop
async def test_a_reply_that_nobody_has_looked_at_is_paid_once_the_kernel_has_it(
    tmp_path: Path, fast_path: bool
) -> None:
    """A small one goes into the socket at once; that its caller closes without a look changes nothing."""
    async with till(tmp_path) as shop, customer(shop) as caller:
        await caller.send(shop.ask(["wanted"], fast_path=fast_path))
        await until(lambda: shop.outcomes)
        caller.reset()
        await shop.settled(1)
        assert (shop.charged, shop.outcomes) == ([(8, 12)], {"ok": 1})


@pytest.mark.parametrize("wire", WIRES)
@BOTH_WAYS
@on_each_loop
async def test_who_reads_slowly_gets_all_of_it_and_pays_once(tmp_path: Path, fast_path: bool, wire: str) -> None:
    async with till(tmp_path, wire) as shop, customer(shop) as caller:
        await caller.send(shop.ask(TEXTS, fast_path=fast_path))
        body = await caller.reply(pause_s=0.001)
        assert body.count(b'"embedding":[') == len(TEXTS)
        await caller.send(shop.ask(["wanted"], fast_path=fast_path))  # the connection is good for more
        assert (await caller.reply()).count(b'"embedding":[') == 1
        await shop.settled(2)
        assert (shop.charged, shop.outcomes) == ([(TOKENS, COST), (8, 12)], {"ok": 2})


@BOTH_WAYS
@on_each_loop
async def test_who_closes_its_own_side_meanwhile_may_read_on_and_pays(tmp_path: Path, fast_path: bool) -> None:
    async with till(tmp_path) as shop, customer(shop) as caller:
        await begin(shop, caller, shop.ask(TEXTS, fast_path=fast_path))
        caller.half_close()
        await caller.read(10**9)
        await shop.settled(1)
        assert shop.charged == [(TOKENS, COST)]


# -- before the first byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("leave", [Customer.reset, Customer.close, Customer.half_close])
@BOTH_WAYS
@on_each_loop
async def test_who_goes_while_a_node_works_pays_nothing(
    tmp_path: Path, fast_path: bool, leave: Callable[[Customer], None], wire: str
) -> None:
    async with till(tmp_path, wire) as shop, customer(shop) as caller:
        shop.nodes.open.clear()
        await caller.send(shop.ask(TEXTS, fast_path=fast_path))
        await until(lambda: shop.nodes.calls)
        leave(caller)
        await shop.settled(1)
        assert (shop.charged, shop.outcomes) == ([], {"dropped": 1})
        assert shop.rows("SELECT state FROM holds") == (
            [] if str(fast_path) == STRAIGHT else [("released",)]
        )  # or a tab


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]], ids=["large", "small"])
@BOTH_WAYS
@on_each_loop
async def test_who_had_gone_when_we_wrote_pays_nothing(
    tmp_path: Path, fast_path: bool, texts: list[str], wire: str
) -> None:
    """We do not know it yet: the kernel says so when we write."""
    async with till(tmp_path, wire) as shop, customer(shop) as caller:
        shop.nodes.before_answer = caller.reset
        await caller.send(shop.ask(texts, fast_path=fast_path))
        await shop.settled(1)
        assert (shop.charged, shop.outcomes) == ([], {"dropped": 1})


@BOTH_WAYS
@on_each_loop
async def test_what_a_full_socket_did_not_take_is_not_paid(tmp_path: Path, fast_path: bool) -> None:
    """Small requests one behind the other, none of whose replies is read. All that the socket has taken are paid; so is
    the last one, if a part of it was; and nobody ever looked at those after it."""
    async with till(tmp_path) as shop, customer(shop) as caller:
        await caller.send(shop.ask(["wanted"], fast_path=fast_path) * 200)
        seen = -1
        while seen != (seen := sum(shop.outcomes.values())):  # until nothing moves any more
            await until(lambda: any(shop.waits(fast_path)))
            await asyncio.sleep(0.1)
        assert 0 < seen < 100
        await until(lambda: shop.set_aside == seen + 1)
        caller.reset()
        await shop.settled(seen + 1)
        in_part = shop.outcomes.get("broken_off", 0)
        assert shop.charged == [(8, 12)] * (seen + in_part)
        assert shop.outcomes == {"ok": seen, **({"broken_off": 1} if in_part else {"dropped": 1})}


# -- what we end ourselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
@BOTH_WAYS
@on_each_loop
async def test_what_we_break_off_when_we_stop_is_not_charged(tmp_path: Path, fast_path: bool, wire: str) -> None:
    async with till(tmp_path, wire) as shop, customer(shop) as caller:
        await begin(shop, caller, shop.ask(TEXTS, fast_path=fast_path))
        await shop.app.server.drain(0.05)
        await shop.settled(1)
        assert (shop.charged, shop.outcomes) == ([], {"dropped": 1})


@BOTH_WAYS
async def test_what_is_refused_costs_nothing_whether_or_not_it_is_read(tmp_path: Path, fast_path: bool) -> None:
    async with till(tmp_path) as shop:
        for leave in (Customer.reset, Customer.close):
            async with customer(shop) as caller:
                await caller.send(shop.ask(["much too long"], fast_path=fast_path))
                leave(caller)
        await shop.settled(2)
        assert (shop.charged, shop.rows("SELECT * FROM holds")) == ([], [])


# -- again -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "third"),
    [
        ({"x_stainless_retry_count": "0"}, {"x_stainless_retry_count": "1"}, "charged"),
        ({}, {"x_stainless_retry_count": "2"}, "charged"),
        ({"idempotency_key": "k"}, {"idempotency_key": "k", "x_stainless_retry_count": "1"}, "kept"),
    ],
)
@pytest.mark.parametrize("ways", [*itertools.product([True, False, STRAIGHT], repeat=2)], ids=str)
async def test_a_retry_of_a_delivery_that_broke_off_gets_the_reply_and_is_not_charged_again(
    tmp_path: Path, ways: tuple[bool, bool], first: dict[str, str], second: dict[str, str], third: str
) -> None:
    """Even where that one breaks off, too. Once it was read to its end only an Idempotency-Key finds it again."""
    async with till(tmp_path) as shop:
        async with customer(shop) as caller:
            await begin(shop, caller, shop.ask(TEXTS, fast_path=ways[0], **first))
            caller.reset()
        await shop.settled(1)
        async with customer(shop) as caller:
            await begin(shop, caller, shop.ask(TEXTS, fast_path=ways[1], **second))
            caller.reset()
        await shop.settled(2)
        bodies = []
        for _ in range(2):
            async with customer(shop) as caller:
                await caller.send(shop.ask(TEXTS, fast_path=ways[1], **second))
                bodies.append(await caller.reply())
                if len(bodies) == 1:
                    assert b"idempotent-replayed: true" in caller.head.lower()
        assert bodies[0] == bodies[1]
        await shop.settled(4)
        assert shop.charged == [(TOKENS, COST)] * (2 if third == "charged" else 1)
        assert shop.nodes.calls == len(shop.charged)


@BOTH_WAYS
async def test_a_retry_that_finds_its_twin_pays_once_for_both(tmp_path: Path, fast_path: bool) -> None:
    """Two callers of one work; one takes a part of the reply, the other all of it."""
    async with till(tmp_path) as shop, customer(shop) as one, customer(shop) as other:
        shop.nodes.open.clear()
        await one.send(shop.ask(TEXTS, fast_path=fast_path, x_stainless_retry_count="0"))
        await until(lambda: shop.nodes.calls)
        await other.send(shop.ask(TEXTS, fast_path=not fast_path, x_stainless_retry_count="1"))
        await until(lambda: any(shared.waiting == 2 for shared in shop.world.single_flight._shared.values()))
        shop.nodes.open.set()
        await one.read(SMALL_BUFFER_BYTES)
        one.reset()
        assert (await other.reply()).count(b'"embedding":[') == len(TEXTS)
        await shop.settled(2)
        assert (shop.charged, shop.nodes.calls) == ([(TOKENS, COST)], 1)


@BOTH_WAYS
async def test_a_free_cache_is_not_filled_by_who_hangs_up(tmp_path: Path, fast_path: bool) -> None:
    """Send, hang up before the reply, send again: the second is charged; and only then the third is free."""
    async with till(tmp_path, cache=CachePolicy.FREE) as shop:
        async with customer(shop) as caller:
            shop.nodes.before_answer = caller.reset
            await caller.send(shop.ask(TEXTS, fast_path=fast_path))
            await shop.settled(1)
        assert shop.charged == []
        shop.nodes.before_answer = lambda: None
        for number in range(2, 4):
            async with customer(shop) as caller:
                await caller.send(shop.ask(TEXTS, fast_path=fast_path))
                assert (await caller.reply()).count(b'"embedding":[') == len(TEXTS)
            await shop.settled(number)
            assert shop.charged == [(TOKENS, COST)]
        assert shop.nodes.calls == 2
