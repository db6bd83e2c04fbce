"""Traces: which requests are traced, what is marked while one runs, and W3C's `traceparent`.

A mark is a clock reading in a list. Spans are made of marks once the reply is gone, elsewhere: see `embedmesh.otlp`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from random import getrandbits
from typing import NamedTuple, Protocol

import msgspec

from embedmesh.rules.errors import SetupError
from embedmesh.rules.shares import Shares

MARKS_OF_TRACE_MAX = 64  # a request of 2,048 inputs may be cut into hundreds of parts: the first ones tell how it went
RATE_SPAN_S = 1.0
SAMPLER, SAMPLER_ARGUMENT = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"  # OpenTelemetry's own names
RATIO_BITS = 64  # of a trace id decide by ratio, as OpenTelemetry's sampler has it: all parts of a trace decide alike
RATIO_MASK = (1 << RATIO_BITS) - 1
TRACE_ID_BITS, SPAN_ID_BITS = 128, 64
TRACEPARENT = re.compile("([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

Attribute = str | int | bool
Attributes = Mapping[str, Attribute]


class TraceParent(NamedTuple):
    """What `traceparent` says: the trace, the span that asks, and whether that is recorded."""

    trace_id: int
    span_id: int
    sampled: bool


class Mark(NamedTuple):
    """One step of a request, in seconds on the monotonic clock. `error` is why it failed: a word of a closed list."""

    name: str
    began: float
    ended: float
    span_id: int
    attributes: Attributes
    error: str


class Trace(msgspec.Struct, eq=False):
    """What is known of one traced request: never a text, a key, a header or a name of a caller's.

    `owner` has the share of the rate that it takes, `parent_id` is 0 where nobody asked for the trace.
    """

    trace_id: int
    parent_id: int
    span_id: int
    began: float
    owner: str
    rate: Shares
    name: str = ""
    attributes: dict[str, Attribute] = {}
    marks: list[Mark] = []
    omitted: int = 0
    ended: float = 0.0
    error: str = ""
    over: bool = False

    def tell(self, attributes: Attributes) -> None:
        """Add what is known of the request; nothing once the trace is over, when another thread reads it."""
        if not self.over:
            self.attributes |= attributes

    def mark(
        self,
        name: str,
        began: float,
        ended: float,
        error: str = "",
        attributes: Attributes | None = None,
        span_id: int = 0,
    ) -> None:
        """Note a step, at most MARKS_OF_TRACE_MAX of them, and none once the trace is over."""
        if self.over:
            return
        if len(self.marks) >= MARKS_OF_TRACE_MAX:
            self.omitted += 1
            return
        self.marks.append(Mark(name, began, ended, span_id or getrandbits(SPAN_ID_BITS), attributes or {}, error))


class TraceSink(Protocol):
    """Takes traces that are over. It never waits: what it has no room for it drops and counts."""

    sent: int  # traces

    @property
    def dropped(self) -> int:
        """Traces that were made in vain."""
        ...

    def put(self, trace: Trace) -> None:
        """A trace that nothing changes any more."""
        ...

    def close(self) -> None:
        """Send what waits, for a moment. Blocks that long."""
        ...


class Sampler(NamedTuple):
    """Which requests are traced: those whose trace id is `below`, or, where it says so, as their parent decided."""

    below: int
    by_parent: bool

    def takes(self, trace_id: int, parent: TraceParent | None) -> bool:
        """Whether this one is."""
        if parent is not None and self.by_parent:
            return parent.sampled
        return trace_id & RATIO_MASK < self.below


class Tracing:
    """Begins and ends traces. `a_second` bounds them for a process: each account, and each one's batches, has a share.

    So no caller's `traceparent` makes us trace everything, and nobody's traces keep out those of others.
    """

    def __init__(self, sampler: Sampler, sink: TraceSink, a_second: int) -> None:
        self.sink = sink
        self.over_rate = 0  # traces that were not begun
        self._sampler = sampler
        self._a_second = a_second
        self._below = sampler.below
        self._rate = Shares(a_second)
        self.rate_until = float("-inf")  # when there is room again, for all

    def draw(self, traceparent: str | None) -> tuple[int, int] | None:
        """The ids of trace and parent, if a request with this header is to be traced; 0 is no parent."""
        if traceparent is None:
            trace_id = getrandbits(TRACE_ID_BITS)
            return (trace_id, 0) if trace_id & RATIO_MASK < self._below else None
        parent = read_traceparent(traceparent)
        if parent is None:
            return self.draw(None)
        return parent[:2] if self._sampler.takes(parent.trace_id, parent) else None

    def start(self, drawn: tuple[int, int], owner: str, began: float) -> Trace | None:
        """A trace of what was drawn, if there is room in this second."""
        if began >= self.rate_until:
            self._rate, self.rate_until = Shares(self._a_second), began + RATE_SPAN_S
        if not self._rate.take(owner):
            self.over_rate += 1
            return None
        return Trace(*drawn, getrandbits(SPAN_ID_BITS), began, owner, self._rate)

    def begin(self, traceparent: str | None, owner: str, began: float) -> Trace | None:
        """A trace for a request that `began` then, if it is to be traced. Only for one whose caller is known."""
        drawn = self.draw(traceparent)
        return None if drawn is None else self.start(drawn, owner, began)

    def withdraw(self, trace: Trace) -> None:
        """It was no request yet: nothing of it is sent, and it takes no share."""
        trace.over = True
        trace.rate.give_back(trace.owner)

    def end(self, trace: Trace, ended: float, error: str = "") -> None:
        """The request is over; `error` is its failure's code. Changes nothing after the first time."""
        if trace.over:
            return
        trace.over, trace.ended, trace.error = True, ended, error
        self.sink.put(trace)


def read_traceparent(value: str) -> TraceParent | None:
    """The header's value as W3C's Trace Context has it; None for anything else, which counts as no header."""
    found = TRACEPARENT.fullmatch(value)
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    parent = TraceParent(int(found[2], 16), int(found[3], 16), bool(int(found[4], 16) & 1))
    return parent if parent.trace_id and parent.span_id else None


def traceparent_of(trace_id: int, span_id: int) -> str:
    """The header's value for what a recorded span asks of others."""
    return f"00-{trace_id:032x}-{span_id:016x}-01"


def sampler_of(environment: Mapping[str, str]) -> Sampler:
    """What OpenTelemetry's variables say; without them as the parent decides, and everything without one.

    Raises SetupError.
    """
    name = environment.get(SAMPLER, "") or "parentbased_always_on"
    kind = name.removeprefix("parentbased_")
    try:
        ratio = {"always_on": 1.0, "always_off": 0.0, "traceidratio": -1.0}[kind]
    except KeyError:
        raise SetupError(
            f"{SAMPLER} is not one of always_on, always_off, traceidratio, or one of them after parentbased_. Mend it."
        ) from None
    if ratio < 0:
        try:
            ratio = float(environment.get(SAMPLER_ARGUMENT, "") or 1.0)
        except ValueError:
            ratio = -1.0
        if not 0.0 <= ratio <= 1.0:
            raise SetupError(f"{SAMPLER_ARGUMENT} is a number from 0 to 1. Mend it.")
    return Sampler(round(ratio * (1 << RATIO_BITS)), kind != name)


# -- to nodes ----------------------------------------------------------------------------------------------------------

_asked: ContextVar[tuple[str, str] | None] = ContextVar("asked", default=None)


@contextmanager
def asking_as(request_id: str, traceparent: str) -> Iterator[None]:
    """What is asked of a node inside, for that request, is asked with this `traceparent`; empty for none."""
    before = _asked.set((request_id, traceparent))
    try:
        yield
    finally:
        _asked.reset(before)


def traceparent_line(request_id: str | None = None) -> bytes:
    """The header's line for what is asked of a node now; empty where there is none.

    With a `request_id`, only if the line is that request's: several share a call that any of them may have begun.
    """
    asked = _asked.get()
    if asked is None or not asked[1] or request_id not in (None, asked[0]):
        return b""
    return b"Traceparent: %b\r\n" % asked[1].encode("ascii")
