"""Rerank over HTTP on each store: paid by tokens or by searches, once, by itself, from a job and in a batch."""

import asyncio
import functools
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from embedmesh.catalogue import Catalogue
from embedmesh.commands.explain import _what_for
from embedmesh.fleet.load import Load
from embedmesh.fleet.registry import Node
from embedmesh.gateway.nodes.coalesce import CoalescingLink
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.rules.money import cost_nanousd
from embedmesh.upstream.pools import unix_pool
from tests.flow.reranking import BY_SEARCHES, BY_TOKENS, RERANKERS, SPECIALS, scored
from tests.flow.world import CATALOGUE
from tests.gateway.mesh import ON_EACH_STORE, Gateway, gateway
from tests.gateway.test_batches_api import Batcher, running
from tests.http.raw import Raw
from tests.test_walk import answer

pytestmark = [pytest.mark.asyncio(loop_scope="module"), ON_EACH_STORE]

DOLLAR = 10**9
DOCUMENTS = ["ab", "zz", "", "d"] * 26  # 104: two searches
TOKENS = 26 * 5 + 104 * (3 + SPECIALS)
COSTS = {BY_TOKENS.id: cost_nanousd(TOKENS, BY_TOKENS.price), BY_SEARCHES.id: 2 * 2_000}
RERANKING = pytest.mark.parametrize("model", list(COSTS))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gw(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Gateway]:
    """With rerankers, and a node that scores."""
    on_postgres = getattr(request, "param", "sqlite") == "postgres"
    url = request.getfixturevalue("database_of_module") if on_postgres else None
    models = Catalogue((*CATALOGUE.models, *RERANKERS))
    path = str(folder / "scores.sock")
    server = await asyncio.start_unix_server(functools.partial(answer, reply=scored), path)
    async with gateway(folder, store_url=url, catalogue=models) as made:
        made.registry.answered_right(made.registry.add(Node("n0", f"unix:{path}")), [one.id for one in RERANKERS])
        made.clients.add("n0", CoalescingLink(OwnLink(unix_pool(path), made.clock), Load()))
        yield made
    server.close()


@pytest.fixture
def caller(gw: Gateway) -> "Searcher":
    return Searcher(gw)


class Searcher(Batcher):
    """A key of an account of its own, with a dollar."""

    def __init__(self, gw: Gateway) -> None:
        self.account = f"a{len(gw.keys)}-{os.urandom(4).hex()}"
        gw.books.accounts.create(self.account)
        gw.books.accounts.credit(self.account, DOLLAR, self.account)
        super().__init__(gw, gw.books.keys.create(self.account, ("embeddings",))[1])

    async def rerank(self, model: str, **headers: str) -> Raw:
        body = {"model": model, "query": "abc", "documents": DOCUMENTS, "top_n": 3}
        reply = await self.gw.ask("POST", "/v1/rerank", body, key=self.key, **headers)
        await self.gw.store.drain()  # what was charged is in the books
        return reply


def best(reply: Raw) -> list[int]:
    assert reply.status == 200, reply.body
    return [result["index"] for result in json.loads(reply.body)["results"]]


@RERANKING
async def test_a_request_is_charged_once_and_kept_for_its_key(caller: Searcher, model: str) -> None:
    first = await caller.rerank(model, **{"Idempotency-Key": "k"})
    again = await caller.rerank(model, **{"Idempotency-Key": "k"})
    assert best(first) == [1, 5, 9] and again.body == first.body
    assert again.headers["idempotent-replayed"] == "true"
    told = json.loads(first.body)
    assert told["usage"]["total_tokens"] == TOKENS
    billed = {"search_units": 2} if model == BY_SEARCHES.id else {"input_tokens": TOKENS}
    assert told["meta"]["billed_units"] == billed
    assert first.headers["x-embedmesh-cost-nanousd"] == str(COSTS[model])
    assert await caller.balance() == (DOLLAR - COSTS[model], 0)


async def test_searches_are_told_in_usage_statement_and_ledger(gw: Gateway, caller: Searcher) -> None:
    """By the price that was set for the account; and the ledger keeps its promises."""
    asked = {"model": BY_SEARCHES.id, "price": 700, "account": caller.account}
    refused = await gw.admin("POST", "/prices", asked)
    assert refused.status == 400 and "use one of searches" in refused.error["message"]
    price = await gw.admin("POST", "/prices", asked | {"meter": "searches"})
    assert (price.status, json.loads(price.body)["meter"]) == (200, "searches")
    await gw.store.prices.look()
    reply = await caller.rerank(BY_SEARCHES.id)
    assert reply.headers["x-embedmesh-cost-nanousd"] == "1400"
    (usage,) = (await caller.ask("GET", "/v1/account/usage"))["data"]
    assert (usage["model"], usage["requests"], usage["tokens"]) == (BY_SEARCHES.id, 1, TOKENS)
    assert usage["cost_nanousd"] == 1_400
    found = await gw.admin("GET", f"/requests/{reply.headers['x-embedmesh-request']}")
    bought = json.loads(found.body)["bought"]
    assert (bought["tokens"], bought["price"], bought["cost_nanousd"]) == (TOKENS, None, 1_400)
    assert [(each["meter"], each["quantity"], each["price"]) for each in bought["meters"]] == [
        ("searches", 2, 700 * 10**6),
        ("input", TOKENS, 0),
    ]
    assert _what_for(bought).startswith(f"for 2 searches at $0.0000007, {TOKENS} input tokens at $0.00 a million of ")
    assert gw.books.check().broken == []


@RERANKING
async def test_a_job_pays_a_key_once_and_computes_it_again_free(caller: Searcher, model: str) -> None:
    job = (await caller.ask("POST", "/v1/jobs", {"budget_nanousd": 10**6}))["id"]
    about = {"x-embedmesh-job": job, "Idempotency-Key": "unit-1"}
    first, again = await caller.rerank(model, **about), await caller.rerank(model, **about)
    assert best(first) == [1, 5, 9] and again.body == first.body
    assert [reply.headers["x-embedmesh-cost-nanousd"] for reply in (first, again)] == [str(COSTS[model]), "0"]
    small = (await caller.ask("POST", "/v1/jobs", {"budget_nanousd": 100}))["id"]
    refused = await caller.rerank(model, **about | {"x-embedmesh-job": small})
    assert refused.error["code"] == "insufficient_quota"
    for each in (job, small):
        await caller.ask("POST", f"/v1/jobs/{each}/cancel")
    assert await caller.balance() == (DOLLAR - COSTS[model], 0)


@RERANKING
async def test_a_batch_pays_each_line_at_the_batchs_price(gw: Gateway, caller: Searcher, model: str) -> None:
    def line(number: int, **more: Any) -> bytes:
        asked = {"model": model, "query": "abc", "documents": DOCUMENTS, "top_n": 3} | more
        whole = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/rerank", "body": asked}
        return json.dumps(whole).encode() + b"\n"

    data = line(1) + line(2, query="") + line(3, documents=["ab"])
    async with running(gw):
        batch = await caller.run(data, endpoint="/v1/rerank")
    output, errors = await caller.results(batch)
    assert (batch["status"], [each["custom_id"] for each in output]) == ("completed", ["id-1", "id-3"])
    assert [result["index"] for result in output[0]["response"]["body"]["results"]] == [1, 5, 9]
    assert [each["custom_id"] for each in errors] == ["id-2"]
    one = 1_000 if model == BY_SEARCHES.id else cost_nanousd(5 + SPECIALS, BY_TOKENS.price // 2)
    many = 2_000 if model == BY_SEARCHES.id else cost_nanousd(TOKENS, BY_TOKENS.price // 2)
    assert await caller.balance() == (DOLLAR - many - one, 0)
    assert batch["usage"]["total_tokens"] == TOKENS + 5 + SPECIALS
    assert gw.books.check().broken == []
