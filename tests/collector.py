"""A collector of traces on loopback: decodes OTLP as OpenTelemetry publishes it, and keeps the spans."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Collector:
    """`spans` are those that came, `posts` counts requests. It says `status`, once `open` is set."""

    def __init__(self) -> None:
        self.status = 200
        self.open = threading.Event()
        self.open.set()
        self.posts = 0
        self.headers: list[dict[str, str]] = []
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Any] = []

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.posts += 1
        self.headers.append(headers)
        self.open.wait(30)
        if path != "/v1/traces":
            return 404
        if self.status == 200:
            asked = ExportTraceServiceRequest.FromString(body)
            for each in asked.resource_spans:
                self.resources.append(attributes_of(each.resource))
                for scope in each.scope_spans:
                    self.spans += scope.spans
        return self.status


def attributes_of(span: Any) -> dict[str, Any]:
    """Name -> value."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """The collector and its URL. Skips where OpenTelemetry's packages are not installed."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra `traces`")
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = collector.take(self.path, dict(self.headers), body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield collector, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        collector.open.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
