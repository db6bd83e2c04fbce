"""Sends traces to OpenTelemetry collectors (OTLP over HTTP), with OpenTelemetry's own SDK, in a thread of its own.

Spans are made there of what was marked, a few at a time, so that the event loop never waits long for the interpreter's
lock. A collector that is away, slow or refuses disturbs nobody: the queue has a bound, what it has no room for is
dropped and counted, and so is what was not taken.
"""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from embedmesh import __version__
from embedmesh.rules.errors import SetupError
from embedmesh.rules.traces import Attribute, Mark, Trace, Tracing, sampler_of

log = logging.getLogger("embedmesh.traces")

QUEUED_TRACES_MAX = 1_024  # some 4 kB each: twenty seconds of the default rate, longer than a collector restarts
SENT_AT_ONCE_MAX = 32  # traces, of some eight spans: a request of OTLP costs 1.3 ms, of which each has its share
MADE_AT_ONCE_MAX = 8  # then the event loop has a turn: a trace is made in 0.03 ms, with the interpreter's lock
SEND_EVERY_S = 1.0
BREATH_S = 0.001
TRACES_CLOSE_S = 2.0  # to send what waits, at the end
BY_VARIABLES = "env"  # as the setting: OpenTelemetry's own variables say where
TRACES_PATH = "/v1/traces"  # of OTLP, where a URL has none
NO_FAULTS = frozenset(("cancelled", "dropped"))  # of nobody: another was faster, or the caller has gone
ADDRESS = "embedmesh.node_address"


def tracing_of(url: str, a_second: int, service: str, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """What traces this process, if `url` says where to send them, or `env`; None if it does not. Raises SetupError."""
    if not url or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    sampler = sampler_of(environment)
    return Tracing(sampler, SpanSender(endpoint_of(url), _resource(service, environment)), a_second)


def endpoint_of(url: str) -> str | None:
    """Where spans are posted; None: where OpenTelemetry's variables say. Raises SetupError."""
    if url == BY_VARIABLES:
        return None
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if good and "@" in parts.netloc:
        raise SetupError(
            "--traces is shown to who lists processes: leave name and password out, and give them as "
            "OTEL_EXPORTER_OTLP_HEADERS."
        )
    if not good or parts.query or parts.fragment:
        raise SetupError(
            "--traces is the address of a collector, such as http://127.0.0.1:4318, or `env`: then OpenTelemetry's own "
            "variables say it. Mend it."
        )
    return url if parts.path.strip("/") else url.rstrip("/") + TRACES_PATH


def _resource(service: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What sends, besides what OpenTelemetry's variables say."""
    named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    own = {} if named else {"service.name": service}
    return own | {"service.version": __version__, "service.instance.id": str(uuid.uuid4())}


class SpanSender:
    """Implements `rules.traces.TraceSink`."""

    def __init__(self, endpoint: str | None, resource: Mapping[str, str]) -> None:
        """Raises SetupError where the SDK is not installed."""
        self.sent = 0
        self._full = self._refused = self._left = 0  # traces that were dropped: each is counted by one thread alone
        self._queue: deque[Trace] = deque()
        self._stopping = threading.Event()
        self._spans = _Spans(resource)
        self._exporter = self._spans.exporter(endpoint)
        self._answers = True  # the collector, as far as we know
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)  # never keeps us from ending
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Traces that there was no room for, or that were not taken."""
        return self._full + self._refused + self._left

    def put(self, trace: Trace) -> None:
        if len(self._queue) >= QUEUED_TRACES_MAX:
            self._full += 1
        else:
            self._queue.append(trace)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(TRACES_CLOSE_S)
        if self._thread.is_alive():
            self._exporter.shutdown()  # it may wait to try again
        while left := self._next():
            self._left += len(left)

    def _run(self) -> None:
        while not self._stopping.wait(SEND_EVERY_S):
            self._send()
        self._send()

    def _send(self) -> None:
        """All that waits."""
        while traces := self._next():
            if self._taken(traces):
                self.sent += len(traces)
            else:
                self._refused += len(traces)

    def _next(self) -> list[Trace]:
        """The next few, which two threads may ask for in the end."""
        found: list[Trace] = []
        with contextlib.suppress(IndexError):
            while len(found) < SENT_AT_ONCE_MAX:
                found.append(self._queue.popleft())
        return found

    def _made(self, traces: Sequence[Trace]) -> list[Any]:
        spans: list[Any] = []
        for number, trace in enumerate(traces, 1):
            spans += self._spans.of(trace)
            if number % MADE_AT_ONCE_MAX == 0:
                self._stopping.wait(BREATH_S)
        return spans

    def _taken(self, traces: Sequence[Trace]) -> bool:
        try:
            taken = bool(self._spans.was_taken(self._exporter.export(self._made(traces))))
        except Exception as error:  # noqa: BLE001 - whatever is raised: this thread goes on
            log.debug("spans were not sent: %s", type(error).__name__)
            taken = False
        if taken != self._answers:
            self._answers = taken
            log.warning(
                "the collector of traces takes them again"
                if taken
                else "the collector of traces does not take them: they are dropped until it does"
            )
        return taken


class _Spans:
    """Makes the SDK's spans of marks. The SDK is imported here, by who traces."""

    def __init__(self, resource: Mapping[str, str]) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import ReadableSpan
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
            from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
        except ImportError:
            raise SetupError("Traces need more packages: pip install 'embedmesh[traces]'.") from None
        for name in ("opentelemetry", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a line for each try: we say it once
        self._span, self._context = ReadableSpan, SpanContext
        self._flags = TraceFlags(TraceFlags.SAMPLED)
        self._resource = Resource.create(dict(resource))
        self._scope = InstrumentationScope("embedmesh", __version__)
        self._kinds = {"": SpanKind.SERVER, "attempt": SpanKind.CLIENT}
        self._inside = SpanKind.INTERNAL
        self._ok, self._failed = Status(StatusCode.UNSET), Status(StatusCode.ERROR)

    def exporter(self, endpoint: str | None) -> Any:
        """What posts spans, as OpenTelemetry's variables say how: headers, certificate, timeout, compression."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise SetupError("Traces need more packages: pip install 'embedmesh[traces]'.") from None
        return OTLPSpanExporter(endpoint=endpoint)

    def was_taken(self, result: Any) -> bool:
        """Whether an export succeeded."""
        return str(result.name) == "SUCCESS"

    def of(self, trace: Trace) -> list[Any]:
        """All spans of a trace, its own first."""
        unix = time.time() - time.monotonic()  # a mark is on the monotonic clock
        own = self._context(trace.trace_id, trace.span_id, is_remote=False, trace_flags=self._flags)
        parent = None
        if trace.parent_id:
            parent = self._context(trace.trace_id, trace.parent_id, is_remote=True, trace_flags=self._flags)
        attributes = {"gen_ai.provider.name": "embedmesh"} | trace.attributes
        if trace.omitted:
            attributes["embedmesh.marks_omitted"] = trace.omitted
        whole = Mark(trace.name, trace.began, trace.ended, trace.span_id, attributes, trace.error)
        return [
            self._made(whole, own, parent, unix, self._kinds[""]),
            *(
                self._made(
                    mark,
                    self._context(trace.trace_id, mark.span_id, is_remote=False, trace_flags=self._flags),
                    own,
                    unix,
                    self._kinds.get(mark.name, self._inside),
                )
                for mark in trace.marks
            ),
        ]

    def _made(self, mark: Mark, context: Any, parent: Any, unix: float, kind: Any) -> Any:
        attributes: dict[str, Attribute] = {name: value for name, value in mark.attributes.items() if name != ADDRESS}
        attributes |= _address(str(mark.attributes.get(ADDRESS, "")))
        if mark.error:
            attributes["error.type"] = mark.error
        return self._span(
            name=mark.name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=self._failed if mark.error and mark.error not in NO_FAULTS else self._ok,
            start_time=int((mark.began + unix) * 1e9),
            end_time=int((mark.ended + unix) * 1e9),
            instrumentation_scope=self._scope,
        )


def _address(url: str) -> dict[str, Attribute]:
    """A node's host and port, where it has some."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return {}
    if parts.scheme not in ("http", "https") or not host:
        return {}
    return {"server.address": host} | ({} if port is None else {"server.port": port})
