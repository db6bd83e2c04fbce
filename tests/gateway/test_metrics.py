"""Counters are counters, every reading says what it is, and one page tells the sum over all workers."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedmesh.gateway.api.metrics import GATEWAY_COUNTERS, GATEWAY_GAUGES, NO_ROUTE, CountedRequest, Metrics
from embedmesh.gateway.api.worker_metrics import WorkerMetrics
from embedmesh.rules.errors import NotFound
from embedmesh.rules.metrics import MetricWords, words_and_labels

ROUTE = "/v1/embeddings"


def values(page: bytes) -> dict[tuple[str, ...], float]:
    """Samples by name and label values, these in the order of their labels' names."""
    families = text_string_to_metric_families(page.decode())
    return {
        (one.name, *(value for _, value in sorted(one.labels.items()))): one.value
        for family in families
        for one in family.samples
    }


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., Metrics]:
    def make(number: int, **readings: float) -> Metrics:
        return Metrics(lambda: readings, WorkerMetrics(tmp_path / f"{number}.json"))

    return make


def test_a_reading_is_of_its_type_and_says_what_it_is() -> None:
    named = {name: said for name, said in GATEWAY_COUNTERS.items() if name.startswith(("store_", "batch", "cache_"))}
    readings = {name: _three(said) for name, said in (named | GATEWAY_GAUGES).items()}
    families = {one.name: one for one in text_string_to_metric_families(Metrics(lambda: readings).text().decode())}
    for name, said in (named | GATEWAY_GAUGES).items():
        family, (words, labels) = families[f"embedmesh_{name}"], words_and_labels(said)
        assert (family.type, family.documentation) == ("counter" if name in named else "gauge", words)
        (sample,) = family.samples
        assert sample.name == f"embedmesh_{name}" + ("_total" if name in named else "")
        assert (sample.value, sample.labels) == (3.0, {label: f"a {label}" for label in labels})
    assert families["process_resident_memory_bytes"].samples[0].value > 0


def _three(said: MetricWords) -> float | dict[tuple[str, ...], float]:
    """A reading of a metric, with a value of each of its labels."""
    _, labels = words_and_labels(said)
    return {tuple(f"a {label}" for label in labels): 3.0} if labels else 3.0


def test_requests_are_told_by_route_model_and_code_and_their_seconds_by_outcome() -> None:
    metrics = Metrics(dict)
    counts = metrics.route(ROUTE)
    counts.ended("ok", "acme/tiny", 0.002, 5, 70)
    counts.ended("ok", "acme/tiny", 7.0)
    for code in (
        "invalid_json",
        "model_not_found",
        "broken_off",
        "dropped",
        "overloaded",
        "bad_node_response",
        "new_one",
    ):
        counts.ended(code, "", 0.0001)
    metrics.route("/v1/models").ended("ok", "", 0.002)
    metrics.route(NO_ROUTE).ended("not_found", "", 0.0)
    found = values(metrics.text())
    assert found["embedmesh_requests_total", "ok", "acme/tiny", ROUTE] == 2
    assert found["embedmesh_requests_total", "overloaded", "", ROUTE] == 1
    assert found["embedmesh_requests_total", "ok", "", "/v1/models"] == 1
    assert found["embedmesh_requests_total", "not_found", "", NO_ROUTE] == 1
    assert found["embedmesh_tokens_total", "acme/tiny"] == 5
    assert found["embedmesh_charged_nanousd_total", "acme/tiny"] == 70
    assert found["embedmesh_request_seconds_count", "acme/tiny", "ok", ROUTE] == 2
    assert found["embedmesh_request_seconds_bucket", "5.0", "acme/tiny", "ok", ROUTE] == 1
    assert found["embedmesh_request_seconds_bucket", "+Inf", "acme/tiny", "ok", ROUTE] == 2
    assert found["embedmesh_request_seconds_sum", "acme/tiny", "ok", ROUTE] == pytest.approx(7.002)
    counted = {key[2]: found[key] for key in found if key[0] == "embedmesh_request_seconds_count" and not key[1]}
    assert counted == {"refused": 2, "left": 2, "failed": 3, "ok": 1}
    assert not [key for key in found if key[0].endswith("_created")]
    assert metrics.requests()["ok"] == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("no"), "not_found"),
        (ConnectionResetError(), "dropped"),
        (asyncio.CancelledError(), "dropped"),
        (KeyError("a bug"), "internal_error"),
    ],
)
def test_what_a_request_raised_is_its_code(error: BaseException, code: str) -> None:
    metrics = Metrics(dict)
    with contextlib.suppress(type(error)), CountedRequest(metrics.route("/v1/models")):
        raise error
    assert metrics.requests() == {code: 1}


def test_a_scrape_of_any_worker_tells_the_sum(worker: Callable[..., Metrics]) -> None:
    one, two = worker(1, in_flight=2.0, nodes_ready=3.0), worker(2, in_flight=5.0, nodes_ready=2.0)
    one.route(ROUTE).ended("ok", "m", 0.002)
    two.route(ROUTE).ended("ok", "m", 0.002)
    two.route(ROUTE).ended("overloaded", "m", 0.002)
    two.internal_errors.inc()
    two.text()  # leaves its numbers for the other
    found = values(one.text())
    assert found["embedmesh_requests_total", "ok", "m", ROUTE] == 2
    assert found["embedmesh_requests_total", "overloaded", "m", ROUTE] == 1  # an outcome that this worker never had
    assert found["embedmesh_request_seconds_count", "m", "ok", ROUTE] == 2
    assert found["embedmesh_internal_errors_total",] == 1
    assert found["embedmesh_in_flight",] == 7
    assert found["embedmesh_nodes_ready",] == 3  # the same nodes, seen twice
    assert found == pytest.approx({**values(two.text()), **{key: found[key] for key in found if "process" in key[0]}})


def test_no_counter_falls_where_a_worker_died_and_another_took_its_place(worker: Callable[..., Metrics]) -> None:
    one, two = worker(1, cache_hits=10.0, in_flight=4.0), worker(2)
    one.route(ROUTE).ended("ok", "m", 0.5)
    before = values(one.text())
    after = values(worker(1, cache_hits=0.0, in_flight=0.0).text())
    assert (
        after["embedmesh_requests_total", "ok", "m", ROUTE] == before["embedmesh_requests_total", "ok", "m", ROUTE] == 1
    )
    assert after["embedmesh_cache_hits_total",] == 10
    assert after["embedmesh_request_seconds_sum", "m", "ok", ROUTE] == 0.5
    assert after["embedmesh_in_flight",] == 0  # what is now is not carried on
    assert values(two.text())["embedmesh_requests_total", "ok", "m", ROUTE] == 1


def test_a_broken_file_of_another_worker_is_left_out(worker: Callable[..., Metrics], tmp_path: Path) -> None:
    one = worker(1)
    one.route(ROUTE).ended("ok", "m", 0.5)
    (tmp_path / "2.json").write_bytes(b'{"embedmesh_requests": [["x", ')
    assert values(one.text())["embedmesh_requests_total", "ok", "m", ROUTE] == 1
