"""Servers of other makes that rerank, as nodes of a gateway: added by its API, asked by callers, each in its form."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from embedmesh.catalogue import Catalogue
from embedmesh.rules.models import RERANK, Model
from embedmesh.rules.nodes import Check, NodeState
from tests.flow.world import CATALOGUE
from tests.gateway.mesh import Gateway, gateway, says, until
from tests.gateway.test_foreign import Asked, Reply, server
from tests.gateway.test_foreign_rerank import MAKES, logit, sigmoid

pytestmark = pytest.mark.asyncio(loop_scope="module")

AWAY = Model(id="acme/away", width=1, max_tokens=512, price=1_000_000, modalities=RERANK)
MIXED = {name: MAKES[name] for name in ("TEI", "vLLM", "Infinity", "llama.cpp")}
BATCH = 8
QUERIES = ["a fox", "tax law", "zwei \u00e4"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gw(folder: Path) -> AsyncIterator[Gateway]:
    async with gateway(folder, catalogue=Catalogue((*CATALOGUE.models, AWAY))) as made:
        yield made


class Mixed:
    """A server of each make, added as a node of that name. Each notes what it was asked, once it is ready."""

    def __init__(self, gw: Gateway) -> None:
        self.gw = gw
        self.asked: dict[str, list[dict[str, Any]]] = {}
        self.broken: set[str] = set()

    async def add(self, stack: AsyncExitStack, name: str) -> None:
        make, path, tries = MIXED[name]

        def answer(asked: Asked) -> Reply:
            body = asked[1]
            assert len(body.get("documents") or body["texts"]) <= BATCH
            self.asked.setdefault(name, []).append(body)
            return (500, b"{}") if name in self.broken else make(asked[0][""].split()[1], body)

        port, _ = await stack.enter_async_context(server(answer))
        told = {"address": f"http://127.0.0.1:{port}{path}", "models": [{"id": AWAY.id, "name": "theirs"}]}
        stack.push_async_callback(self.gw.act, name, "remove")
        reply = await self.gw.admin("POST", "/nodes", told | {"name": name, "inputs_max": BATCH})
        found = json.loads(reply.body)
        assert (found["state"], found["models"], found["failures"]) == ("ready", [AWAY.id], {}), found
        node = await self.gw.until_ready(name)
        await until("its speed is known", lambda: node.load.measured)
        asked = self.asked.pop(name)
        assert len(asked) <= tries + 1, "its form, once; one question, and a larger one that measures it"
        assert sum(len(json.dumps(each)) for each in asked) < 4_000

    async def rerank(self, query: str, documents: list[str]) -> list[float]:
        body = {"model": AWAY.id, "query": query, "documents": documents}
        reply = await self.gw.ask("POST", "/v1/rerank", body, key=self.gw.key("embeddings"))
        assert reply.status == 200, reply.body
        told = json.loads(reply.body)
        scores = {each["index"]: each["relevance_score"] for each in told["results"]}
        ranked = [each["relevance_score"] for each in told["results"]]
        assert ranked == sorted(ranked, reverse=True)
        return [scores[at] for at in range(len(documents))]


@pytest_asyncio.fixture(loop_scope="module")
async def mixed(gw: Gateway) -> AsyncIterator[Mixed]:
    made = Mixed(gw)
    async with AsyncExitStack() as stack:
        for name in MIXED:
            await made.add(stack, name)
        yield made


async def test_requests_are_split_over_all_makes_and_no_part_has_two_queries(mixed: Mixed) -> None:
    """Whatever each tells, callers get the same scores, each pair's own."""
    documents = [f"{at} fox " * (at % 5 + 1) for at in range(120)]
    found = await asyncio.gather(*(mixed.rerank(query, documents) for query in QUERIES))
    for query, scores in zip(QUERIES, found, strict=True):
        assert scores == pytest.approx([sigmoid(logit(query, text)) for text in documents], abs=1e-6)
    assert len(mixed.asked) > 1
    asked = [body for each in mixed.asked.values() for body in each]
    assert {body["query"] for body in asked} == set(QUERIES)
    assert sum(len(body.get("documents") or body["texts"]) for body in asked) >= 3 * len(documents)


async def test_parts_of_a_server_that_breaks_are_done_by_the_others(mixed: Mixed) -> None:
    mixed.broken = {"TEI", "llama.cpp"}
    documents = [str(at) for at in range(60)]
    scores = await mixed.rerank("a fox", documents)
    assert scores == pytest.approx([sigmoid(logit("a fox", text)) for text in documents], abs=1e-6)


async def test_documents_that_a_server_does_not_take_do_not_send_it_away(gw: Gateway) -> None:
    """The caller is told why, in words about documents; the next one is served, by the form that is known."""

    def answer(asked: Asked) -> Reply:
        texts = asked[1].get("texts") or []
        if "large" in texts:
            return 413, b'{"error":"Input validation error: `inputs` must have less than 512 tokens. Given: 600"}'
        return MIXED["TEI"][0](asked[0][""].split()[1], asked[1])

    async with server(answer) as (port, asked):
        told = {"address": f"http://127.0.0.1:{port}", "models": [{"id": AWAY.id}], "name": "picky"}
        try:
            await gw.admin("POST", "/nodes", told)
            node = await gw.until_ready("picky")
            await until("its speed is known", lambda: node.load.measured)
            for _ in range(8):
                body = {"model": AWAY.id, "query": "q", "documents": ["large"]}
                refused = await gw.ask("POST", "/v1/rerank", body, key=gw.key("embeddings"))
                says(refused, 400, "longer than")
            assert (node.state, node.failures_in_a_row) == (NodeState.READY, 0)
            assert node.failed == {Check.STATUS_4XX: 8}
            before = len(asked)
            served = await gw.ask("POST", "/v1/rerank", body | {"documents": ["a"]}, key=gw.key("embeddings"))
            assert (served.status, len(asked)) == (200, before + 1)
        finally:
            await gw.act("picky", "remove")
