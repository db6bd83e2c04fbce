"""Jobs over HTTP, on each store: a budget is opened, requests are charged from it, each key once."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from embedmesh.rules import jobs
from embedmesh.rules.money import cost_nanousd
from tests.flow.world import MODEL
from tests.gateway.mesh import ON_EACH_STORE, Gateway
from tests.gateway.test_batches_api import node_of
from tests.http.raw import Raw

pytestmark = [pytest.mark.asyncio(loop_scope="module"), ON_EACH_STORE]

DOLLAR = 10**9
TEXTS = ["abc", "de"]


class Employer:
    """A caller of jobs: a key of an account of its own, with a dollar."""

    def __init__(self, gw: Gateway) -> None:
        self.gw = gw
        self.account = f"a{len(gw.keys)}-{os.urandom(4).hex()}"
        gw.books.accounts.create(self.account)
        gw.books.accounts.credit(self.account, DOLLAR, self.account)
        self.key = gw.books.keys.create(self.account, ("embeddings",))[1]

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        reply = await self.gw.ask(method, path, body, key=self.key)
        assert reply.status == 200, reply.body
        return json.loads(reply.body)

    async def open(self, **body: Any) -> str:
        job_id: str = (await self.ask("POST", "/v1/jobs", body or {"budget_usd": "0.5"}))["id"]
        return job_id

    async def embed(self, job_id: str | None, key: str | None, texts: object = TEXTS, **headers: str) -> Raw:
        if job_id is not None:
            headers["x-embedmesh-job"] = job_id
        if key is not None:
            headers["Idempotency-Key"] = key
        body = {"model": "tiny", "input": texts}
        return await self.gw.ask("POST", "/v1/embeddings", body, key=self.key, **headers)

    async def money(self) -> tuple[int, int]:
        account = await self.ask("GET", "/v1/account")
        return account["balance_nanousd"], account["held_nanousd"]


@pytest_asyncio.fixture(loop_scope="module")
async def caller(gw: Gateway, folder: Path) -> AsyncIterator[Employer]:
    async with node_of(gw, folder):
        yield Employer(gw)


async def test_a_job_from_end_to_end(caller: Employer) -> None:
    """Opened, charged once a key, the same again free with the same vectors, closed; the rest of the money is back."""
    opened = await caller.ask("POST", "/v1/jobs", {"budget_nanousd": DOLLAR // 2, "name": "nightly", "texts_total": 4})
    assert (opened["object"], opened["status"], opened["name"]) == ("embedmesh.job", "open", "nightly")
    assert opened["expires_at"] - opened["created_at"] == 86_400
    job_id = opened["id"]
    assert await caller.money() == (DOLLAR, DOLLAR // 2)
    first = await caller.embed(job_id, "unit-1")
    again = await caller.embed(job_id, "unit-1")
    assert (first.status, again.status, first.body) == (200, 200, again.body)
    tokens = json.loads(first.body)["usage"]["total_tokens"]
    cost = cost_nanousd(tokens, MODEL.price)
    assert first.headers["x-embedmesh-cost-nanousd"] == str(cost) and "idempotent-replayed" not in first.headers
    assert (again.headers["x-embedmesh-cost-nanousd"], again.headers["idempotent-replayed"]) == ("0", "true")
    assert first.headers["x-embedmesh-request"] == again.headers["x-embedmesh-request"]
    other = await caller.embed(job_id, "unit-1", "xyz")
    assert (other.status, other.error["code"], other.headers["x-should-retry"]) == (
        409,
        "idempotency_conflict",
        "false",
    )
    alone = await caller.embed(None, "unit-1")
    assert (alone.status, alone.headers["x-embedmesh-cost-nanousd"]) == (200, str(cost)), "not a key of the job"
    await caller.gw.store.drain()
    job = await caller.ask("GET", f"/v1/jobs/{job_id}")
    assert (job["charged_nanousd"], job["held_nanousd"]) == (cost, DOLLAR // 2 - cost)
    assert (job["requests"], job["texts"], job["tokens"], job["recomputed_tokens"]) == (1, 2, tokens, tokens)
    assert (job["texts_per_s"], job["eta_s"]) == (2 / 60, 60)
    assert [each["id"] for each in (await caller.ask("GET", "/v1/jobs?limit=1"))["data"]] == [job_id]
    assert (await caller.ask("GET", f"/v1/jobs?after={job_id}"))["data"] == []
    for _ in range(2):
        closed = await caller.ask("POST", f"/v1/jobs/{job_id}/cancel")
        assert (closed["status"], closed["charged_nanousd"], closed["held_nanousd"]) == ("closed", cost, 0)
    assert await caller.money() == (DOLLAR - 2 * cost, 0)
    over = await caller.embed(job_id, "unit-2")
    assert (over.status, over.error["code"], over.headers["x-should-retry"]) == (409, "job_over", "false")


async def test_what_comes_at_one_moment_is_charged_once(caller: Employer) -> None:
    """The first does the work; the others wait, and are computed free."""
    job_id = await caller.open()
    replies = await asyncio.gather(*(caller.embed(job_id, f"unit-{number % 3}") for number in range(15)))
    assert {reply.status for reply in replies} == {200} and len({reply.body for reply in replies}) == 1
    costs = sorted(int(reply.headers["x-embedmesh-cost-nanousd"]) for reply in replies)
    assert costs[:12] == [0] * 12 and 0 < costs[12] == costs[13] == costs[14]
    closed = await caller.ask("POST", f"/v1/jobs/{job_id}/cancel")
    assert (closed["requests"], closed["charged_nanousd"]) == (3, sum(costs))
    assert await caller.money() == (DOLLAR - sum(costs), 0)


async def test_what_no_job_takes(caller: Employer) -> None:
    job_id = await caller.open()
    same_account = caller.gw.books.keys.create(caller.account, ("embeddings",))[1]
    stranger = Employer(caller.gw)
    refused = {
        "no Idempotency-Key": (await caller.embed(job_id, None), 400, "missing_parameter"),
        "unknown": (await caller.embed("job_none", "k"), 404, "not_found"),
        "no job at all": (await caller.embed("", "k"), 404, "not_found"),
        "of another account": (await stranger.embed(job_id, "k"), 404, "not_found"),
        "wrong in itself": (await caller.embed(job_id, "k", ""), 400, "empty_input"),
        "no embeddings": (
            await caller.gw.ask(
                "POST",
                "/v1/chat/completions",
                {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
                key=caller.gw.books.keys.create(caller.account, ("generate",))[1],
                **{"x-embedmesh-job": job_id, "Idempotency-Key": "k"},
            ),
            400,
            "invalid_value",
        ),
    }
    caller.key, own = same_account, caller.key
    refused["of another key"] = await caller.embed(job_id, "k"), 403, "insufficient_scope"
    caller.key = own
    for what, (reply, status, code) in refused.items():
        assert (reply.status, reply.error["code"]) == (status, code), what
    assert (await stranger.gw.ask("GET", f"/v1/jobs/{job_id}", key=stranger.key)).status == 404
    assert (await stranger.gw.ask("POST", f"/v1/jobs/{job_id}/cancel", key=stranger.key)).status == 404
    job = await caller.ask("GET", f"/v1/jobs/{job_id}")
    assert (job["status"], job["charged_nanousd"]) == ("open", 0)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_value"),
        ({"budget_usd": "1", "budget_nanousd": 1}, 400, "invalid_value"),
        ({"budget_usd": 1}, 400, "invalid_value"),
        ({"budget_usd": "-1"}, 400, "invalid_value"),
        ({"budget_usd": "1", "expires_in_s": 0}, 400, "invalid_value"),
        ({"budget_usd": "1", "expires_in_s": 604_801}, 400, "invalid_value"),
        ({"budget_usd": "1", "name": "a\nb"}, 400, "invalid_value"),
        ({"budget_usd": "1", "nme": "a"}, 400, "invalid_value"),
        ({"budget_usd": "1.000000001"}, 429, "insufficient_quota"),
    ],
)
async def test_what_is_no_job(caller: Employer, body: dict[str, Any], status: int, code: str) -> None:
    reply = await caller.gw.ask("POST", "/v1/jobs", body, key=caller.key)
    assert (reply.status, reply.error["code"]) == (status, code), reply.body
    assert await caller.money() == (DOLLAR, 0)


async def test_money_is_the_jobs_alone(caller: Employer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job has what the account set aside for it, though nothing else is left; it has no more than that."""
    tokens = 2 * 2 + sum(map(len, TEXTS))
    cost = cost_nanousd(tokens, MODEL.price)
    job_id = await caller.open(budget_nanousd=cost)
    rest = await caller.open(budget_nanousd=DOLLAR - cost)
    assert (await caller.embed(None, None)).error["code"] == "insufficient_quota"
    long = await caller.embed(job_id, "long", ["abc"] * 2_000)
    assert (long.status, long.error["code"]) == (429, "insufficient_quota")
    assert (await caller.embed(job_id, "one")).status == 200
    short = await caller.embed(job_id, "two")
    assert (short.status, short.error["code"]) == (429, "insufficient_quota") and job_id in short.error["message"]
    monkeypatch.setattr(jobs, "JOB_RECOMPUTES_MAX", 1)
    assert (await caller.embed(job_id, "one")).status == 200
    often = await caller.embed(job_id, "one")
    assert (often.status, often.error["code"]) == (429, "insufficient_quota") and "times more" in often.error["message"]
    for each in (job_id, rest):
        await caller.ask("POST", f"/v1/jobs/{each}/cancel")
    assert await caller.money() == (DOLLAR - cost, 0)


async def test_without_a_node_nothing_is_charged_and_the_key_stays_free(gw: Gateway, folder: Path) -> None:
    caller = Employer(gw)
    job_id = await caller.open()
    assert (await caller.embed(job_id, "one")).status in (404, 503)
    async with node_of(gw, folder):
        assert (await caller.embed(job_id, "one")).status == 200
    await gw.store.drain()
    job = await caller.ask("GET", f"/v1/jobs/{job_id}")
    assert (job["requests"], job["recomputed_tokens"]) == (1, 0)
