"""Traces reach a collector as OpenTelemetry has them; one that is away, slow or refuses disturbs nobody."""

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from embedmesh import otlp
from embedmesh.otlp import QUEUED_TRACES_MAX, SpanSender, endpoint_of, tracing_of
from embedmesh.rules.errors import SetupError
from embedmesh.rules.traces import Trace, Tracing
from tests.collector import attributes_of, collecting
from tests.story.endpoint import wait_until

WITHIN_S = 20.0


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "SEND_EVERY_S", 0.02)
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)


def traced(tracing: Tracing, *, error: str = "") -> Trace:
    """A request of a second, whose one attempt took half of it."""
    now = time.monotonic()
    trace = tracing.begin(None, "a", now - 1.0)
    assert trace is not None
    trace.name = "embeddings m"
    trace.tell({"gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 7})
    trace.mark("queue", now - 1.0, now - 0.75)
    node = {"embedmesh.node_id": "n", "embedmesh.node_address": "https://node.example:8443"}
    trace.mark("attempt", now - 0.75, now - 0.25, error, node)
    tracing.end(trace, now, error)
    return trace


def begun(url: str, environment: Mapping[str, str] = {}) -> tuple[Tracing, SpanSender]:
    tracing = tracing_of(url, 10_000, "embedmesh-test", environment)
    assert tracing is not None and isinstance(tracing.sink, SpanSender)
    return tracing, tracing.sink


def test_a_trace_is_spans_under_one_that_is_the_request() -> None:
    with collecting() as (collector, url):
        tracing, sink = begun(url)
        trace = traced(tracing, error="closed")
        wait_until("the spans are there", lambda: len(collector.spans) == 3, WITHIN_S)
        sink.close()
        whole, queue, attempt = collector.spans
        assert [span.name for span in collector.spans] == ["embeddings m", "queue", "attempt"]
        assert {span.trace_id for span in collector.spans} == {trace.trace_id.to_bytes(16, "big")}
        assert (whole.span_id, whole.parent_span_id) == (trace.span_id.to_bytes(8, "big"), b"")
        assert queue.parent_span_id == attempt.parent_span_id == whole.span_id
        assert len({span.span_id for span in collector.spans}) == 3
        assert [span.kind for span in collector.spans] == [2, 1, 3]  # server, internal, client
        assert [span.status.code for span in collector.spans] == [2, 0, 2]  # error, unset
        assert attributes_of(whole) == {
            "gen_ai.provider.name": "embedmesh",
            "gen_ai.request.model": "m",
            "gen_ai.usage.input_tokens": 7,
            "error.type": "closed",
        }
        assert attributes_of(attempt) == {
            "embedmesh.node_id": "n",
            "server.address": "node.example",
            "server.port": 8443,
            "error.type": "closed",
        }
        assert abs(whole.end_time_unix_nano / 1e9 - time.time()) < WITHIN_S
        assert (whole.end_time_unix_nano - whole.start_time_unix_nano) / 1e9 == pytest.approx(1.0, abs=1e-4)
        assert (attempt.end_time_unix_nano - attempt.start_time_unix_nano) / 1e9 == pytest.approx(0.5, abs=1e-4)
        assert collector.resources[0]["service.name"] == "embedmesh-test"
        assert (sink.sent, sink.dropped) == (1, 0)


def test_opentelemetrys_own_variables_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as (collector, url):
        given = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-team=blue",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_SERVICE_NAME": "ours",
        }
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        tracing, sink = begun("env", given)
        traced(tracing)
        sink.close()
        assert collector.named("embeddings m")
        assert collector.headers[0]["x-team"] == "blue"
        found = collector.resources[0]
        assert (found["service.name"], found["deployment.environment.name"]) == ("ours", "test")
    assert tracing_of(url, 1, "s", {"OTEL_SDK_DISABLED": "true"}) is None
    assert tracing_of("", 1, "s", given) is None, "nothing leaves unless it is asked for"


@pytest.mark.parametrize("how", ["away", "refuses", "slow"])
def test_a_collector_disturbs_nobody(how: str) -> None:
    """What it does not take is dropped and counted, `put` never waits, and the end takes a few seconds at most."""
    with collecting() as (collector, url):
        if how == "refuses":
            collector.status = 400
        elif how == "slow":
            collector.open.clear()
        tracing, sink = begun("http://127.0.0.1:1" if how == "away" else url)
        sent = 2 * QUEUED_TRACES_MAX + 100
        begins = time.thread_time()
        for _ in range(sent):
            traced(tracing)
        took = time.thread_time() - begins
        assert took < 1.0, f"{took / sent * 1e6:.0f} µs each"
        assert sink.dropped > 0
        ends = time.monotonic()
        sink.close()
        assert time.monotonic() - ends < 6.0
        assert sink.dropped <= sent
        if how != "slow":
            wait_until("all are counted", lambda: sink.dropped + sink.sent == sent, WITHIN_S)
        assert sink.sent == 0


def test_it_takes_spans_again_once_it_can(caplog: pytest.LogCaptureFixture) -> None:
    with collecting() as (collector, url):
        collector.status = 400
        tracing, sink = begun(url)
        traced(tracing)
        wait_until("it was refused", lambda: sink.dropped == 1, WITHIN_S)
        collector.status = 200
        traced(tracing)
        wait_until("it was taken", lambda: sink.sent == 1, WITHIN_S)
        sink.close()
    said = [record.getMessage() for record in caplog.records if record.name == "embedmesh.traces"]
    assert said == [
        "the collector of traces does not take them: they are dropped until it does",
        "the collector of traces takes them again",
    ]
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


@pytest.mark.parametrize(
    ("url", "posted"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c.example/otlp/v1/traces", "https://c.example/otlp/v1/traces"),
        ("env", None),
    ],
)
def test_where_spans_are_posted(url: str, posted: str | None) -> None:
    assert endpoint_of(url) == posted


@pytest.mark.parametrize("url", ["http://name:word@c:4318", "https://word@c"])
def test_an_address_has_no_secret_in_it(url: str) -> None:
    """`serve` gives it to its node on the command line."""
    with pytest.raises(SetupError, match="OTEL_EXPORTER_OTLP_HEADERS") as refused:
        endpoint_of(url)
    assert "word@" not in str(refused.value)


def test_the_thread_survives_whatever_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as (collector, url):
        tracing, sink = begun(url)
        monkeypatch.setattr(sink._spans, "of", lambda trace: 1 // 0)
        traced(tracing)
        wait_until("it was dropped", lambda: sink.dropped == 1, WITHIN_S)
        monkeypatch.undo()
        traced(tracing)
        wait_until("the next one is there", lambda: collector.spans, WITHIN_S)
        sink.close()


@pytest.mark.parametrize("url", ["c:4318", "grpc://c:4317", "http://", "http://c:port", "http://c:4318?x=1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(SetupError, match="--traces"):
        endpoint_of(url)


def test_without_the_packages_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(SetupError, match=r"pip install 'embedmesh\[traces\]'"):
        SpanSender("http://127.0.0.1:1", {})
