"""Two gateways of one machine on PostgreSQL, with a real model: they agree, and one may die without the other."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from bench.rig.postgres import PostgresServer
from tests.story.endpoint import Endpoint, run_json, wait_until

SEEN_S = 1.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer) -> Iterator[Endpoint]:
    url = postgres.new()
    one = Endpoint(tmp_path_factory.mktemp("pair") / "data", "--workers", 2, EMBEDMESH_STORE=url).wait_ready()
    one.store = url  # type: ignore[attr-defined]
    yield one
    one.kill_all()


def command(pair: Endpoint, *arguments: object) -> Any:
    """A command on the same store, as JSON."""
    store: str = pair.store  # type: ignore[attr-defined]
    return run_json(*arguments, "--data-dir", pair.data_dir, EMBEDMESH_STORE=store)


def post(pair: Endpoint, key: str, text: str = "hello", **headers: str) -> httpx.Response:
    """On a connection of its own: whichever gateway takes it."""
    return httpx.post(
        f"{pair.base_url}/embeddings",
        json={"model": "all-MiniLM-L6-v2", "input": text},
        headers={"Authorization": f"Bearer {key}", **headers},
        timeout=20,
    )


def gateways(pair: Endpoint) -> list[int]:
    """Process ids."""
    return [pid for pid, role in pair.processes().items() if role == "gateway"]


def made(pair: Endpoint, *limits: object) -> dict[str, str]:
    key = command(pair, "keys", "create", *limits)
    assert isinstance(key, dict)
    return key


def test_there_are_two_and_the_address_of_the_store_is_not_on_their_command_lines(pair: Endpoint) -> None:
    assert len(gateways(pair)) == 2
    for pid in gateways(pair):
        assert "postgresql" not in Path(f"/proc/{pid}/cmdline").read_text()


def test_a_key_made_by_a_command_is_good_at_once_and_useless_within_a_second_of_its_end(pair: Endpoint) -> None:
    key = made(pair)
    assert [post(pair, key["key"]).status_code for _ in range(8)] == [200] * 8
    command(pair, "keys", "revoke", key["key_id"])
    revoked, in_a_row = time.monotonic(), 0
    while in_a_row < 8:  # of both gateways, whichever answers
        asked = time.monotonic()
        status = post(pair, key["key"]).status_code
        assert status == 401 or asked - revoked < SEEN_S
        in_a_row = in_a_row + 1 if status == 401 else 0


def test_a_limit_holds_over_both(pair: Endpoint) -> None:
    """Never more than the limit in one minute; the headers count down."""
    key = made(pair, "--requests-a-minute", 8)["key"]
    if time.time() % 60 > 50:
        time.sleep(60 - time.time() % 60)  # one minute of the clock is what is looked at
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: post(pair, key), range(24)))
    assert Counter(reply.status_code for reply in replies) == {200: 8, 429: 16}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 60_250
    left = [int(reply.headers["x-ratelimit-remaining-requests"]) for reply in replies if reply.status_code == 200]
    assert min(left) == 0 and max(left) <= 7


def test_keys_that_a_key_made_spend_its_budget_over_both(pair: Endpoint) -> None:
    """Four times as many as it covers ask at once, each with a key of its own: so many are served as it covers."""
    first = made(pair, "--scope", "embeddings", "--scope", "keys")
    price = int(post(pair, first["key"]).headers["x-embedmesh-cost-nanousd"])
    command(pair, "keys", "change", first["key_id"], "--budget-month", f"{6 * price / 1e9:.9f}")
    children = [
        httpx.post(
            f"{pair.base_url}/account/keys",
            json={"scopes": ["embeddings"]},
            headers={"Authorization": f"Bearer {first['key']}"},
            timeout=20,
        ).json()
        for _ in range(20)
    ]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda child: post(pair, child["key"]), children))
    assert Counter(reply.status_code for reply in replies) == {200: 5, 429: 15}
    assert {reply.json()["error"]["code"] for reply in replies if reply.status_code == 429} == {"insufficient_quota"}
    command(pair, "keys", "revoke", first["key_id"])
    listed = command(pair, "keys", "list")
    assert isinstance(listed, list)
    states = {key["key_id"]: key["state"] for key in listed}
    assert {states[child["key_id"]] for child in children} == {"revoked"}


def test_an_idempotency_key_gives_the_same_reply_wherever_it_comes_in(pair: Endpoint) -> None:
    """One charge; another body is a conflict."""
    key = made(pair)["key"]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: post(pair, key, "once", **{"Idempotency-Key": "k 1"}), range(12)))
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.content for reply in replies}) == 1
    fresh = [reply for reply in replies if "idempotent-replayed" not in reply.headers]
    assert len(fresh) == 1
    told = command(pair, "ledger", "explain", fresh[0].headers["x-embedmesh-request"])
    assert isinstance(told, dict) and told["state"] == "captured"
    conflict = post(pair, key, "twice", **{"Idempotency-Key": "k 1"})
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert conflict.headers["x-should-retry"] == "false"


def test_a_key_of_a_job_is_charged_once_over_both(pair: Endpoint) -> None:
    """Each key comes to both at one moment, and one of them is killed meanwhile: one charge a key, nothing held."""
    key = made(pair)["key"]
    headers = {"Authorization": f"Bearer {key}"}
    job = httpx.post(f"{pair.base_url}/jobs", json={"budget_usd": "1"}, headers=headers, timeout=20).json()

    def ask(unit: int) -> None:
        """On a connection of its own, again until it is answered."""
        named = {"x-embedmesh-job": job["id"], "Idempotency-Key": f"unit-{unit}"}
        until = (
            time.monotonic() + 90
        )  # a second try waits for the end of a dead gateway's first one, or for its next start
        while time.monotonic() < until:
            try:
                reply = post(pair, key, f"text {unit}", **named)
            except httpx.TransportError:
                continue
            if reply.status_code == 200:
                return
            assert reply.status_code in (503, 504), reply.text
            time.sleep(0.1)
        raise AssertionError(f"no answer for {unit}")

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number // 4) for number in range(160)]
        wait_until("a quarter is done", lambda: sum(each.done() for each in asked) >= 40, 60)
        os.kill(gateways(pair)[0], signal.SIGKILL)
        for each in asked:
            each.result(120)
    wait_until("there are two again", lambda: len(gateways(pair)) == 2, 10)
    closed = httpx.post(f"{pair.base_url}/jobs/{job['id']}/cancel", headers=headers, timeout=20).json()
    assert (closed["status"], closed["requests"], closed["texts"]) == ("closed", 40, 40)
    assert closed["charged_nanousd"] == closed["tokens"] * 10
    wait_until("nothing is held", lambda: command(pair, "accounts", "show", "local")[0]["held_nanousd"] == 0, 10)
    assert command(pair, "ledger", "check")["ok"]


def test_a_gateway_that_dies_is_not_missed(pair: Endpoint) -> None:
    """Connections that the dead one had break; an SDK tries again, and all are served; the money adds up."""
    client = OpenAI(base_url=pair.base_url, api_key=pair.api_key, max_retries=3)
    victim = gateways(pair)[0]
    with ThreadPoolExecutor(4) as pool:
        asking = [
            pool.submit(client.embeddings.create, model="all-MiniLM-L6-v2", input=f"text {number}")
            for number in range(200)
        ]
        time.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        assert all(len(each.result(30).data[0].embedding) == 384 for each in asking)
    wait_until("there are two again", lambda: len(set(gateways(pair)) - {victim}) == 2, 10)
    wait_until("nothing is held", lambda: command(pair, "accounts", "show", "local")[0]["held_nanousd"] == 0, 10)
    report = command(pair, "ledger", "check")
    assert isinstance(report, dict) and report["ok"], report


def test_it_ends_well(pair: Endpoint) -> None:
    assert pair.stop() == 0
    assert b"internal error" not in pair.log.read_bytes()
