"""`embedmesh serve --traces`: one trace from the caller through gateway and node, at a real collector's door."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.collector import Collector, attributes_of, collecting
from tests.story.endpoint import MODEL, Endpoint, wait_until

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENTINEL = "jackdaws love my big sphinx"
WITHIN_S = 30.0


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, Collector]]:
    folder: Path = tmp_path_factory.mktemp("traces")
    with collecting() as (collector, url):
        one = Endpoint(folder / "data", "--traces", url).wait_ready()
        try:
            yield one, collector
            assert one.stop() == 0
        finally:
            one.kill_all()


def of_trace(collector: Collector, trace_id: str) -> list[Any]:
    return [span for span in list(collector.spans) if span.trace_id.hex() == trace_id]


def named(spans: list[Any], name: str) -> Any:
    (found,) = [span for span in spans if span.name == name]
    return found


@pytest.mark.parametrize("way", ["straight", "hard"])
def test_one_trace_from_the_caller_to_the_batch(traced: tuple[Endpoint, Collector], way: str) -> None:
    endpoint, collector = traced
    trace_id = ID[:-1] + ("1" if way == "straight" else "2")
    more = {} if way == "straight" else {"user": "magpie"}
    endpoint.embed("so that its key has a tab")
    headers = {"traceparent": f"00-{trace_id}-{SPAN}-01", "tracestate": "vendor=magpie", "baggage": "secret=magpie"}
    reply = endpoint.ask(input=SENTINEL, headers=headers, **more)
    assert reply.status_code == 200
    spans = wait_until("all spans", lambda: s if len(s := of_trace(collector, trace_id)) == 10 else None, WITHIN_S)
    whole = next(span for span in spans if span.parent_span_id.hex() == SPAN)
    attempt = named(spans, "attempt")
    at_node = next(span for span in spans if span.parent_span_id == attempt.span_id)
    inside = sorted(span.name for span in spans if span.parent_span_id == whole.span_id)
    assert inside == ["attempt", "capture", "count", "hold", "queue", "verify"]
    assert sorted(span.name for span in spans if span.parent_span_id == at_node.span_id) == ["batch", "queue"]
    told = attributes_of(whole)
    assert told["embedmesh.request_id"] == reply.headers["x-embedmesh-request"]
    assert told["gen_ai.operation.name"] == "embeddings"
    assert told["gen_ai.request.model"] == MODEL
    assert told["gen_ai.usage.input_tokens"] == reply.json()["usage"]["prompt_tokens"]
    assert attributes_of(at_node)["gen_ai.usage.input_tokens"] == told["gen_ai.usage.input_tokens"]
    for span in spans:  # by one clock, as all is one machine
        assert whole.start_time_unix_nano - 10**6 <= span.start_time_unix_nano <= span.end_time_unix_nano
    services = {each["service.name"] for each in collector.resources}
    assert services == {"embedmesh-gateway", "embedmesh-node"}


def test_what_is_told_holds_nothing_of_a_caller(traced: tuple[Endpoint, Collector]) -> None:
    """No text, key, header, user or file; strangers have no trace at all."""
    endpoint, collector = traced
    spans = len(collector.spans)
    refused = httpx.post(
        f"{endpoint.base_url}/embeddings",
        json={"model": MODEL, "input": SENTINEL},
        headers={"Authorization": "Bearer em_stranger", "traceparent": f"00-{'f' * 32}-{SPAN}-01"},
    )
    assert refused.status_code == 401
    wrong = endpoint.ask(input=SENTINEL, model="magpie", headers={"traceparent": f"00-{'e' * 32}-{SPAN}-01"})
    assert wrong.status_code == 404
    endpoint.embed([SENTINEL, "another"])
    wait_until("the last spans", lambda: len(collector.spans) > spans, WITHIN_S)
    told = repr(collector.spans) + repr(collector.resources)
    for secret in ("jackdaw", "magpie", "vendor", endpoint.api_key, endpoint.api_key[3:12], str(endpoint.data_dir)):
        assert secret not in told
    assert not of_trace(collector, "f" * 32) and not of_trace(collector, "e" * 32)
    assert endpoint.metric("embedmesh_traces_sent_total") > 0
    assert endpoint.metric("embedmesh_traces_dropped_total") == 0
