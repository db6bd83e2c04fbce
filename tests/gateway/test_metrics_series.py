"""A gateway's page of metrics is bounded, whatever is asked of it and whatever nodes come and go."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from string import ascii_letters

import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedmesh.fleet.registry import Node, Registry
from embedmesh.gateway.api.fleet_metrics import NODES_MEASURED_MAX, FleetCollector
from embedmesh.gateway.api.metrics import NO_ROUTE, OUTCOMES_OF_CODES, Metrics
from embedmesh.gateway.api.table import APIS
from embedmesh.gateway.api.worker_metrics import WorkerMetrics
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.nodes import Check
from tests.flow.world import CATALOGUE
from tests.gateway.mesh import Gateway
from tests.gateway.test_metrics_page import FLEET, GATEWAY, PROCESS, labelled, listed, shown

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROUNDS = 12
ROUTES = {route.path for api in APIS for route in api.ROUTES}


def series(page: str) -> set[tuple[str, ...]]:
    """Each by its name and labels."""
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items())))
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


async def page(gw: Gateway) -> str:
    return (await gw.ask("GET", "/metrics", key=gw.key("metrics"))).body.decode()


def attack(gw: Gateway, word: str) -> Iterator[tuple[str, str, object, str | None]]:
    """Requests with a name that somebody has made up, wherever one can stand: method, path, body, key."""
    api, admin, any_key = gw.key("embeddings", "generate"), gw.key("admin"), gw.key("keys", "embeddings")
    chat = {"model": word, "messages": [{"role": "user", "content": word}]}
    yield "POST", "/v1/embeddings", {"model": word, "input": word, "user": word}, api
    yield "POST", "/v1/embeddings", {"model": "tiny", "input": word, word: word}, api
    yield "POST", "/v1/embeddings", {"model": "tiny", "input": word}, f"em_{word}"
    yield "POST", "/v1/embeddings", word.encode(), api
    yield "POST", f"/openai/deployments/{word}/embeddings", {"input": word}, api
    yield "POST", "/v1/chat/completions", chat, api
    yield "POST", "/v1/confidential/embeddings", {"model_name": word, "ciphertext": word}, api
    yield "POST", "/v1/nodes/lock", {"model": word}, api
    yield "POST", f"/v1/nodes/{word}/heartbeat", {"node": word}, None
    yield "GET", f"/v1/models/{word}", None, api
    yield "GET", f"/v1/files/file-{word}", None, any_key
    yield "GET", f"/v1/batches/batch_{word}", None, any_key
    yield "GET", f"/v1/admin/accounts/{word}", None, admin
    yield "POST", f"/v1/admin/nodes/{word}/drain", {}, admin
    yield "GET", f"/{word}", None, None
    yield "POST", f"/v1/{word}/{word}", None, api
    yield "DELETE", "/v1/embeddings", None, api
    yield word.upper(), "/v1/embeddings", None, api
    yield "GET", f"/health?{word}={word}", None, None


async def test_what_callers_and_strangers_make_up_is_in_no_series(gw: Gateway) -> None:
    dice = Random(20_261_130)
    words: list[str] = []
    seen: list[set[tuple[str, ...]]] = []
    for _ in range(ROUNDS):
        word = "".join(dice.choices(ascii_letters, k=12))
        words.append(word)
        for method, path, body, key in attack(gw, word):
            reply = await gw.ask(method, path, body, key=key, x_request_id=word)
            assert reply.status < 500 or reply.status == 503, (method, path, reply.body)
        seen.append(series(await page(gw)))
    assert seen[1] == seen[-1], "the first two rounds have all that there is"
    text = await page(gw)
    assert [word for word in words if word in text or word.lower() in text or word.upper() in text] == []
    codes = {*OUTCOMES_OF_CODES, "internal_error"}
    models = {model.id for model in CATALOGUE.models} | {""}
    for _, *labels in seen[-1]:
        said = dict(label.split("=", 1) for label in labels)
        assert said.get("route", NO_ROUTE) in ROUTES | {NO_ROUTE}
        assert said.get("code", "ok") in codes and said.get("model", "") in models
    assert {route for _, *labels in seen[-1] for route in labels if route == "route=/v1/embeddings"}


async def test_a_page_has_what_the_reference_lists(gw: Gateway) -> None:
    await gw.ask("GET", "/v1/admin/ledger", key=gw.key("admin"))
    text = await page(gw)
    assert shown(text) <= listed(GATEWAY, FLEET, PROCESS)
    labels = {row.name: set(row.labels) for row in [*GATEWAY, *FLEET, *PROCESS]}
    assert {name: found for name, found in labelled(text).items() if found != labels[name]} == {}
    assert 'embedmesh_ledger_checks_total{result="right"} 1.0' in text
    assert 'embedmesh_ledger_checked_timestamp_seconds{result="right"} 1' in text


def come(registry: Registry, number: int) -> None:
    node = registry.add(Node(f"node_{number}", "http://192.0.2.1"))
    node.counts["answers"] += 1
    node.counts["canaries_passed"] += 1
    node.failed[Check.CONNECT] += 1


async def test_a_node_that_leaves_takes_its_series_with_it(gw: Gateway) -> None:
    before = series(await page(gw))
    for number in range(1_000):
        come(gw.registry, number)
        if number >= 10:
            gw.registry.remove(f"node_{number - 10}")
    during = series(await page(gw)) - before
    assert {node for _, *labels in during for node in labels if node.startswith("node=")} == {
        f"node=node_{number}" for number in range(990, 1_000)
    }
    for number in range(990, 1_000):
        gw.registry.remove(f"node_{number}")
    assert series(await page(gw)) == before
    for number in range(NODES_MEASURED_MAX + 50):
        come(gw.registry, number)
    after = series(await page(gw))
    assert len({node for _, *labels in after for node in labels if node.startswith("node=")}) == NODES_MEASURED_MAX
    for number in range(NODES_MEASURED_MAX + 50):
        gw.registry.remove(f"node_{number}")


@pytest.fixture
def worker(tmp_path: Path) -> Callable[[Registry], Metrics]:
    def make(registry: Registry) -> Metrics:
        metrics = Metrics(dict, WorkerMetrics(tmp_path / "1.json"))
        metrics.registry.register(FleetCollector(registry))
        return metrics

    return make


async def test_a_new_worker_continues_the_counters_of_nodes_that_are_there(
    worker: Callable[[Registry], Metrics],
) -> None:
    """Those of nodes that have left would be kept for ever: each worker would hand them on to the next."""
    first = Registry(SystemClock())
    come(first, 1)
    come(first, 2)
    worker(first).text()
    second = Registry(SystemClock())
    metrics = worker(second)
    come(second, 2)
    text = metrics.text().decode()
    assert 'embedmesh_node_answers_total{node="node_2"} 2.0' in text
    assert "node_1" not in text


async def test_a_large_page_stops_no_request(tmp_path: Path) -> None:
    """Made and written in a thread that lets the event loop go on; who asks meanwhile shares one page."""
    workers = [WorkerMetrics(tmp_path / f"{number}.json") for number in (1, 2)]
    ours, other = (Metrics(dict, each) for each in workers)
    for metrics in (ours, other):
        for number in range(100):
            for code in ("ok", "overloaded", "rate_limit_exceeded"):
                metrics.route("/v1/embeddings").ended(code, f"acme/model-{number}", 0.01, 3, 30)
    writing = asyncio.create_task(other.keep(workers[1]))
    steps = 0
    while not (tmp_path / "2.json").exists():
        await asyncio.sleep(0)
        steps += 1
    assert steps > 20  # 5,700 series: one for every hundred of them, and more
    writing.cancel()
    await asyncio.wait([writing])
    first = asyncio.create_task(ours.page())
    await asyncio.sleep(0)
    later = [asyncio.create_task(ours.page()) for _ in range(3)]
    steps = 0
    while not first.done():
        await asyncio.sleep(0)
        steps += 1
    assert steps > 100
    pages = await asyncio.gather(*later)
    assert pages[0] is pages[1] is pages[2] and pages[0] is not first.result()
    line = b'embedmesh_requests_total{code="overloaded",model="acme/model-7",route="/v1/embeddings"} 2.0'
    assert line in first.result() and line in pages[0]
