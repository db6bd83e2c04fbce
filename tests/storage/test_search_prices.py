"""Searches in the books: their price by account, and requests that paid them, from the hold to the statement."""

import time
from functools import partial
from typing import Any

import msgspec
import pytest

from embedmesh.rules.errors import Failure, InvalidValue
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.meters import price_meters
from embedmesh.rules.ports import Caller
from embedmesh.storage.secrets.secret import claim_of
from embedmesh.storage.store import Store
from tests.flow.reranking import BY_SEARCHES, BY_TOKENS, SPECIALS, ask, body, ranking_world
from tests.storage.shop import SECRET, Shop
from tests.storage.test_tab_keeper import running

MILLION = 1_000_000


async def test_searches_have_a_price_by_account(shop: Shop, store: Store) -> None:
    """The account's own, the store's for all, the catalogue's; nano-USD for one, as the catalogue has it."""
    prices = shop.books.prices
    shop.books.accounts.create("b")

    async def seen() -> tuple[int, int]:
        await store.prices.look()
        return store.prices.search(BY_SEARCHES, "a") // MILLION, store.prices.search(BY_SEARCHES, "b") // MILLION

    assert await seen() == (2_000, 2_000)
    prices.set(BY_SEARCHES.id, 3_000, meter="searches")
    prices.set(BY_SEARCHES.id, 0, meter="searches", account_id="b")
    prices.set(BY_SEARCHES.id, 7, account_id="a")  # of tokens: that of another meter
    assert await seen() == (3_000, 0)
    assert prices.end(BY_SEARCHES.id, meter="searches") and not prices.end(BY_SEARCHES.id, meter="searches")
    assert await seen() == (2_000, 0)
    listed = [(one.meter, one.price, one.account_id) for one in reversed(prices.list(BY_SEARCHES.id))]
    assert listed == [("searches", 3_000, None), ("searches", 0, "b"), ("input", 7, "a")]
    assert (price_meters(BY_SEARCHES), price_meters(BY_TOKENS)) == (("searches",), ("input",))
    with pytest.raises(InvalidValue, match="searches, or images"):
        prices.set(BY_SEARCHES.id, 1, meter="search")


async def test_requests_are_charged_for_searches_from_the_hold_to_the_statement(shop: Shop) -> None:
    """By a hold of their own, with a key, and under a tab: the ledger keeps its promises, and explains each."""
    shop.credit(10**9)
    key = shop.books.keys.create("a", ("embeddings",))[0]
    shop.books.prices.set(BY_SEARCHES.id, 3_000, meter="searches")
    shop.books.prices.set(BY_SEARCHES.id, 1_000, meter="searches", account_id="a")

    class Keys:
        async def find(self, token: str) -> Caller | None:
            return Caller("a", key.key_id, frozenset({"embeddings"}))

    async with running(shop) as store:
        await store.prices.look()
        claims = partial(claim_of, SECRET)
        edges: dict[str, Any] = {"keys": Keys(), "ledger": store, "prices": store.prices, "claim_of": claims}
        world = msgspec.structs.replace(ranking_world(), clock=shop.clock, **edges)
        documents = ["ab"] * 101
        sent = body(documents, model=BY_SEARCHES)
        first = await ask(world, sent, key="k")
        await store.drain()
        again = await ask(world, sent, key="k")
        assert (again.body, again.headers["idempotent-replayed"]) == (first.body, "true")
        told = [first]
        while len(told) < 4 or not store.has_tab(key.key_id):
            told.append(await ask(world, sent))
        told += [await ask(world, sent) for _ in range(3)]
        shop.books.prices.set(BY_SEARCHES.id, 10**9, meter="searches", account_id="a")
        await store.prices.look()
        with pytest.raises(Failure) as refused:
            await ask(world, sent)
        assert refused.value.code == "insufficient_quota"
    assert shop.money() == (10**9 - len(told) * 2_000, 0)
    tokens, tabs = 101 * (5 + SPECIALS), set[str | None]()
    for reply in told:
        assert reply.headers["x-embedmesh-cost-nanousd"] == "2000"
        explained = shop.books.reports.explain(reply.headers["x-embedmesh-request"])
        tabs.add(explained.tab_id)
        bought = explained.bought
        assert bought is not None
        assert (bought.tokens, bought.price, bought.cost, bought.model) == (tokens, None, 2_000, BY_SEARCHES.id)
        assert bought.meters == (Metered(Meter.SEARCHES, 2, 1_000 * MILLION), Metered(Meter.INPUT, tokens, 0))
    assert len(tabs) > 1 and None in tabs, "some under a tab, some by a hold"
    shop.assert_right()
    (usage,) = shop.books.reports.usage("a", 0, 10**5)
    assert (usage.requests, usage.tokens, usage.cost) == (len(told), len(told) * tokens, len(told) * 2_000)
    month = time.strftime("%Y-%m", time.gmtime(shop.clock.now_ms / 1000))
    lines = [line for line in shop.books.reports.statement("a", month) if line.kind == "charge"]
    assert {(line.model, line.price) for line in lines} == {(BY_SEARCHES.id, None)}
    assert sum(line.tokens or 0 for line in lines) == len(told) * tokens
