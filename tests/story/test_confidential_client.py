"""Our own client against `embedmesh serve`: sealed calls give what plain ones give, and cost what they cost."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embedmesh.client import AsyncClient, CallRefused, Client, CreateEmbeddingResponse, NodeNotTrusted, Pins
from embedmesh.client.calls import now_ms
from embedmesh.client.core import LockStep, Trust
from embedmesh.client.wanted import want
from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.limits import LOCK_S_MIN
from embedmesh.settings import store_path
from embedmesh.signing.identity import Identity
from tests.story.endpoint import MODEL, SAME, Endpoint, Vectors, run, wait_until

JSON = {"Content-Type": "application/json"}
SENTINEL = "quetzalcoatlus sentinel text"


def pins_of(endpoint: Endpoint) -> Path:
    """What a person copies from the node's machine to the client's."""
    return wait_until(
        "the node's identity is there", lambda: next(endpoint.data_dir.rglob("node.identity.pub"), None), 30
    )


def vectors(reply: CreateEmbeddingResponse) -> Vectors:
    return np.array([item.embedding for item in reply.data], np.float32)


def held(endpoint: Endpoint) -> int:
    with open_books(endpoint.data_dir, store_path(endpoint.data_dir)) as books:
        return books.accounts.find("local").held_nanousd


def client_of(endpoint: Endpoint, **more: Any) -> Client:
    pins = pins_of(endpoint)
    return Client(base_url=endpoint.base_url, api_key=endpoint.api_key, pins=pins, confidential=True, **more)


@pytest.fixture
def client(endpoint: Endpoint) -> Client:
    """Leaves no money set aside: the other tests have the same account."""
    return client_of(endpoint, lock_ahead=False)


def test_a_sealed_call_gives_what_a_plain_one_gives(endpoint: Endpoint, client: Client) -> None:
    for input in ("one text", ["a text", SENTINEL, "x " * 100], [[1996, 4937], [2158]], ["text"] * 300):
        for more in ({}, {"dimensions": 64}, {"encoding_format": "float", "user": "somebody"}):
            sealed = client.embeddings.create(model=MODEL, input=input, **more)
            plain = client.embeddings.create(model=MODEL, input=input, confidential=False, **more)
            assert np.abs(vectors(sealed) - vectors(plain)).max() < SAME
            assert (sealed.usage, sealed.model) == (plain.usage, plain.model)
            assert sealed.node_id and sealed.node_id in pins_of(endpoint).read_text()


def test_ids_that_stand_for_long_words_are_no_lie_of_the_nodes(endpoint: Endpoint, client: Client) -> None:
    """One id is 112 hyphens: the node counts far more tokens than a sealed request of that length has else."""
    for _ in range(4):  # three wrong answers in a row would put it out
        reply = client.embeddings.create(model=MODEL, input=[[67307]] * 50, lock_tokens=10_000)
        assert reply.usage.total_tokens == 50 * 114
    assert client.embeddings.create(model=MODEL, input="still there").data


def test_it_costs_what_it_costs_in_the_clear(endpoint: Endpoint, client: Client) -> None:
    def charged() -> int:
        return -endpoint.account().balance_nanousd

    before = charged()
    client.embeddings.create(model=MODEL, input=["what does it cost"] * 5)
    sealed = charged() - before
    client.embeddings.create(model=MODEL, input=["what does it cost"] * 5, confidential=False)
    assert sealed == charged() - before - sealed > 0


def test_what_is_refused_is_read_here_and_is_free(endpoint: Endpoint, client: Client) -> None:
    before = endpoint.account().balance_nanousd
    for more, code in (
        ({"input": ["fine", "word " * 5_000]}, "context_length_exceeded"),
        ({"input": "a", "dimensions": 10_000}, "invalid_value"),
        ({"input": "a", "extra_body": {"no_such_member": 1}}, "unknown_parameter"),
        ({"input": ["word " * 200] * 2, "lock_tokens": 3}, "max_tokens_per_request"),
    ):
        with pytest.raises(CallRefused) as caught:
            client.embeddings.create(model=MODEL, **more)
        assert (caught.value.code, caught.value.sealed) == (code, True)
    assert endpoint.account().balance_nanousd == before


def test_calls_that_follow_one_another_need_no_lock_of_their_own(endpoint: Endpoint) -> None:
    """The last lock is used up by hand."""

    def counted(name: str) -> int:
        page = endpoint.get("/metrics", endpoint.admin_key).text
        found = re.search(rf"^embedmesh_{name}\S* ([0-9.]+)$", page, re.MULTILINE)
        assert found is not None, page
        return int(float(found[1]))

    texts = [f"one after another {number}" for number in range(6)]
    opened, before = counted("store_locks_opened"), endpoint.account().balance_nanousd
    with client_of(endpoint) as client:
        rows = np.concatenate([vectors(client.embeddings.create(model=MODEL, input=text)) for text in texts])
        assert np.abs(rows - endpoint.embed(texts)).max() < SAME
        reserves = client._calls._reserves
        assert reserves is not None
        left = reserves.begin(MODEL, 256, now_ms()).reserve
    assert left is not None
    step = LockStep(want(model=MODEL, input="the last", fields={}), Trust(Pins.read(pins_of(endpoint))))
    sealed = step.read(left.lock, now_ms())
    reply = endpoint.http.post(f"{endpoint.base_url}/confidential/embeddings", content=sealed.body, headers=JSON)
    assert sealed.read(reply.content).tokens > 0
    assert endpoint.account().balance_nanousd < before
    wait_until("all is counted", lambda: counted("store_locks_opened") == opened + 7, 10)


def test_a_node_that_is_not_pinned_is_not_sealed_for(endpoint: Endpoint) -> None:
    """And its lock, which nobody uses, is released when it expires."""
    trust = Trust(Pins([Identity(b"x" * 32).public_key]))
    step = LockStep(want(model=MODEL, input=SENTINEL, fields={}), trust)
    soon = msgspec.json.decode(step.body) | {"timeout": LOCK_S_MIN}
    lock = endpoint.http.post(f"{endpoint.base_url}/nodes/lock", json=soon)
    with pytest.raises(NodeNotTrusted, match="Nothing was sent"):
        step.read(lock.content, now_ms())
    wait_until("the lock is released", lambda: not held(endpoint), 4 * LOCK_S_MIN)


async def test_many_sealed_calls_at_one_time(endpoint: Endpoint) -> None:
    async with AsyncClient(
        base_url=endpoint.base_url,
        api_key=endpoint.api_key,
        pins=pins_of(endpoint),
        confidential=True,
        lock_ahead=False,
    ) as client:
        calls = [client.embeddings.create(model=MODEL, input=f"number {number}") for number in range(100)]
        replies = await asyncio.gather(*calls)
    right = endpoint.embed([f"number {number}" for number in range(100)])
    assert np.abs(np.concatenate([vectors(reply) for reply in replies]) - right).max() < SAME


def test_the_command_line_gives_what_it_gives_without(endpoint: Endpoint, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{SENTINEL} {number}\n" for number in range(300)) + "word " * 5_000 + "\n")
    rows = {}
    for name, more in (("plain", []), ("sealed", ["--confidential", "--node-identity", str(pins_of(endpoint))])):
        out = tmp_path / f"{name}.jsonl"
        done = run("embed", texts, "-o", out, "--data-dir", endpoint.data_dir, *more)
        assert done.returncode == 1, done.stderr.decode()
        assert b"line 301" in done.stderr
        rows[name] = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["error"] for row in rows["sealed"] if "error" in row] == [row["error"] for row in rows["plain"][300:]]
    one, other = (np.array([row["embedding"] for row in rows[name][:300]]) for name in ("plain", "sealed"))
    assert np.abs(one - other).max() < SAME


def test_the_sentinel_is_in_nothing_that_is_kept(endpoint: Endpoint) -> None:
    """After all of the above: the store and its journal, logs, receipts, metrics."""
    kept = [file for file in endpoint.data_dir.rglob("*") if file.is_file()] + [endpoint.said, endpoint.log]
    for file in kept:
        assert SENTINEL.encode() not in file.read_bytes(), file
    assert SENTINEL not in endpoint.get("/metrics", endpoint.admin_key).text
