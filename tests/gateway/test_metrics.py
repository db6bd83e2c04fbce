"""Counters are counters, every reading says what it is, and one page tells the sum over all workers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedmesh.gateway.api.metrics import GATEWAY_COUNTERS, GATEWAY_GAUGES, Metrics
from embedmesh.gateway.api.worker_metrics import WorkerMetrics


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
    metrics = Metrics(lambda: dict.fromkeys([*GATEWAY_COUNTERS, *GATEWAY_GAUGES], 3.0))
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    for name, words in GATEWAY_COUNTERS.items():
        family = families[f"embedmesh_{name}"]
        assert (family.type, family.documentation) == ("counter", words)
        assert [one.name for one in family.samples] == [f"embedmesh_{name}_total"]
    for name, words in GATEWAY_GAUGES.items():
        family = families[f"embedmesh_{name}"]
        assert (family.type, family.documentation) == ("gauge", words)
    assert families["process_resident_memory_bytes"].samples[0].value > 0


def test_latency_is_told_by_outcome_and_model() -> None:
    metrics = Metrics(dict)
    metrics.ended("ok", "acme/tiny", 0.002)
    metrics.ended("ok", "acme/tiny", 7.0)
    metrics.ended("invalid_json", "", 0.0001)
    found = values(metrics.text())
    assert found["embedmesh_request_seconds_count", "ok", "acme/tiny"] == 2
    assert found["embedmesh_request_seconds_bucket", "ok", "5.0", "acme/tiny"] == 1
    assert found["embedmesh_request_seconds_bucket", "ok", "+Inf", "acme/tiny"] == 2
    assert found["embedmesh_request_seconds_sum", "ok", "acme/tiny"] == pytest.approx(7.002)
    assert found["embedmesh_request_seconds_count", "invalid_json", ""] == 1
    assert found["embedmesh_requests_total", "ok"] == 2


def test_a_scrape_of_any_worker_tells_the_sum(worker: Callable[..., Metrics]) -> None:
    one, two = worker(1, in_flight=2.0, nodes_ready=3.0), worker(2, in_flight=5.0, nodes_ready=2.0)
    one.ended("ok", "m", 0.002)
    two.ended("ok", "m", 0.002)
    two.ended("overloaded", "m", 0.002)
    two.internal_errors.inc()
    two.text()  # leaves its numbers for the other
    found = values(one.text())
    assert found["embedmesh_requests_total", "ok"] == 2
    assert found["embedmesh_requests_total", "overloaded"] == 1  # an outcome that this worker never had
    assert found["embedmesh_request_seconds_count", "ok", "m"] == 2
    assert found["embedmesh_internal_errors_total",] == 1
    assert found["embedmesh_in_flight",] == 7
    assert found["embedmesh_nodes_ready",] == 3  # the same nodes, seen twice
    assert found == pytest.approx({**values(two.text()), **{key: found[key] for key in found if "process" in key[0]}})


def test_no_counter_falls_where_a_worker_died_and_another_took_its_place(worker: Callable[..., Metrics]) -> None:
    one, two = worker(1, cache_hits=10.0, in_flight=4.0), worker(2)
    one.ended("ok", "m", 0.5)
    before = values(one.text())
    after = values(worker(1, cache_hits=0.0, in_flight=0.0).text())
    assert after["embedmesh_requests_total", "ok"] == before["embedmesh_requests_total", "ok"] == 1
    assert after["embedmesh_cache_hits_total",] == 10
    assert after["embedmesh_request_seconds_sum", "ok", "m"] == 0.5
    assert after["embedmesh_in_flight",] == 0  # what is now is not carried on
    assert values(two.text())["embedmesh_requests_total", "ok"] == 1


def test_a_broken_file_of_another_worker_is_left_out(worker: Callable[..., Metrics], tmp_path: Path) -> None:
    one = worker(1)
    one.ended("ok", "m", 0.5)
    (tmp_path / "2.json").write_bytes(b'{"embedmesh_requests": [["x", ')
    assert values(one.text())["embedmesh_requests_total", "ok"] == 1
