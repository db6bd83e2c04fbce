"""Which requests are traced: W3C's header, OpenTelemetry's samplers, and a rate of which nobody takes all."""

from random import Random

import pytest

from embedmesh.rules.errors import SetupError
from embedmesh.rules.traces import (
    MARKS_OF_TRACE_MAX,
    Sampler,
    Trace,
    TraceParent,
    Tracing,
    asking_as,
    read_traceparent,
    sampler_of,
    traceparent_line,
    traceparent_of,
)

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ALL, NONE = 1 << 64, 0


class KeptTraces:
    """Keeps what is over."""

    def __init__(self) -> None:
        self.sent = self.dropped = 0
        self.traces: list[Trace] = []

    def put(self, trace: Trace) -> None:
        self.traces.append(trace)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("value", "sampled"),
    [
        (f"00-{ID}-{SPAN}-01", True),
        (f"00-{ID}-{SPAN}-00", False),
        (f"00-{ID}-{SPAN}-03", True),  # other flags mean nothing to us
        (f"cc-{ID}-{SPAN}-01", True),  # a later version
        (f"cc-{ID}-{SPAN}-01-what-comes", True),
        (f"00-{ID}-{SPAN}-01-more", None),
        (f"ff-{ID}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{ID}-{'0' * 16}-01", None),
        (f"00-{ID.upper()}-{SPAN}-01", None),
        (f"00-{ID}-{SPAN}", None),
        (f" 00-{ID}-{SPAN}-01", None),
        (f"00-{ID}-{SPAN}-01\n", None),
        ("", None),
    ],
)
def test_a_traceparent(value: str, sampled: bool | None) -> None:
    parent = None if sampled is None else TraceParent(int(ID, 16), int(SPAN, 16), sampled)
    assert read_traceparent(value) == parent


def test_what_is_sent_on_is_read_alike() -> None:
    assert read_traceparent(traceparent_of(1, 2)) == TraceParent(1, 2, True)


@pytest.mark.parametrize(
    ("name", "argument", "sampler"),
    [
        ("", "", Sampler(ALL, True)),
        ("always_on", "", Sampler(ALL, False)),
        ("always_off", "", Sampler(NONE, False)),
        ("traceidratio", "0.25", Sampler(ALL // 4, False)),
        ("traceidratio", "", Sampler(ALL, False)),
        ("parentbased_always_on", "0.1", Sampler(ALL, True)),
        ("parentbased_always_off", "", Sampler(NONE, True)),
        ("parentbased_traceidratio", "0", Sampler(NONE, True)),
        ("xray", "", None),
        ("parentbased_jaeger_remote", "", None),
        ("traceidratio", "1.5", None),
        ("traceidratio", "half", None),
        ("traceidratio", "nan", None),
    ],
)
def test_a_sampler_by_opentelemetrys_variables(name: str, argument: str, sampler: Sampler | None) -> None:
    given = {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument}
    if sampler is None:
        with pytest.raises(SetupError, match="Mend it"):
            sampler_of(given)
    else:
        assert sampler_of(given) == sampler


def test_a_parent_decides_where_the_sampler_says_so() -> None:
    recorded, not_recorded = TraceParent(ALL - 1, 1, True), TraceParent(0, 1, False)
    assert Sampler(NONE, True).takes(recorded.trace_id, recorded)
    assert not Sampler(ALL, True).takes(0, not_recorded)
    assert Sampler(ALL, False).takes(0, not_recorded)
    assert not Sampler(NONE, False).takes(recorded.trace_id, recorded)


def test_a_ratio_is_that_of_trace_ids() -> None:
    dice, sampler = Random(1), Sampler(ALL // 10, True)
    taken = sum(sampler.takes(dice.getrandbits(128), None) for _ in range(10_000))
    assert 900 < taken < 1_100


def test_nobody_has_us_trace_everything_or_keeps_others_out() -> None:
    """However many ask with `sampled`: of ten a second one account has at most eight, another finds some."""
    tracing = Tracing(Sampler(ALL, True), KeptTraces(), 10)
    asks = traceparent_of(1, 2)
    first = [tracing.begin(asks, "greedy", 5.0) for _ in range(100)]
    assert sum(each is not None for each in first) == 8
    assert tracing.over_rate == 92
    assert tracing.begin(asks, "modest", 5.9) is not None
    assert tracing.begin(asks, "greedy", 5.9) is None
    assert tracing.begin(asks, "greedy", 6.0) is not None


def test_what_was_withdrawn_takes_nothing() -> None:
    sink = KeptTraces()
    tracing = Tracing(Sampler(ALL, True), sink, 1)
    for _ in range(3):
        trace = tracing.begin(None, "a", 5.0)
        assert trace is not None
        tracing.withdraw(trace)
        tracing.end(trace, 6.0)
    assert (sink.traces, tracing.over_rate) == ([], 0)


def test_a_trace_is_bounded_and_nothing_comes_after_its_end() -> None:
    sink = KeptTraces()
    tracing = Tracing(Sampler(ALL, True), sink, 1)
    trace = tracing.begin(traceparent_of(7, 8), "a", 5.0)
    assert trace is not None
    for _ in range(MARKS_OF_TRACE_MAX + 3):
        trace.mark("attempt", 5.0, 5.1)
    tracing.end(trace, 6.0, "overloaded")
    tracing.end(trace, 7.0)
    trace.mark("late", 7.0, 7.1)
    trace.tell({"late": True})
    assert sink.traces == [trace]
    assert (trace.trace_id, trace.parent_id, trace.ended, trace.error) == (7, 8, 6.0, "overloaded")
    assert (len(trace.marks), trace.omitted, trace.attributes) == (MARKS_OF_TRACE_MAX, 3, {})


def test_a_line_is_of_the_request_that_it_is_for() -> None:
    """A call that several share is begun by any of them."""
    assert traceparent_line("req_1") == traceparent_line() == b""
    with asking_as("req_1", traceparent_of(1, 2)):
        line = b"Traceparent: 00-%032x-%016x-01\r\n" % (1, 2)
        assert traceparent_line("req_1") == traceparent_line() == line
        assert traceparent_line("req_2") == b""
    assert traceparent_line() == b""
