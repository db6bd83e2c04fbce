"""Server-sent events are the same however their bytes come, and are what the standard says that they are."""

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedmesh.http import sse
from embedmesh.http.sse import EVENT_BYTES_MAX, SseParser

# What the WHATWG's "Event stream interpretation" says, step by step, of a whole stream.


def reference(stream: bytes) -> list[bytes]:
    """The data of all events of a whole stream."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    lines = re.split(rb"\r\n|\n|\r", stream)[:-1]  # what follows the last line end is no line
    events, buffer = [], b""
    for line in lines:
        if line == b"":
            if buffer != b"":
                events.append(buffer.removesuffix(b"\n"))
            buffer = b""
        elif line.startswith(b":"):
            continue
        else:
            field, colon, value = line.partition(b":")
            if colon and value.startswith(b" "):
                value = value[1:]
            if field == b"data":
                buffer += value + b"\n"
    return events


def fed(pieces: list[bytes]) -> list[bytes]:
    parser = SseParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert not parser.too_large
    return events


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    ends = [0, *sorted({at for at in cuts if at < len(stream)}), len(stream)]
    return [stream[start:end] for start, end in pairwise(ends)]


words = st.sampled_from(
    [
        b"data: {}", b"data:{}", b"data:  two", b"data", b"data:", b"data: ", b"Data: no", b" data: no", b"dat",
        b"a: b", b": ping", b":", b"event: error", b"id: 7", b"retry: 10",
        b"data: \xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80",
        b"data: \xff\xfe\x00", b"data: [DONE]", b"data: a:b: c", b"\xef\xbb\xbfdata: mark", b"data\x00: x", b"",
    ]
)  # fmt: skip
ends = st.sampled_from([b"\n", b"\n", b"\n\n", b"\n\n", b"\r\n", b"\r\n\r\n", b"\r", b"\r\r", b"", b"\n\r", b"\r\n\n"])
written = st.lists(st.tuples(words, ends).map(b"".join), max_size=12).map(b"".join)
streams = st.one_of(written, st.binary(max_size=60), written.map(lambda stream: b"\xef\xbb\xbf" + stream))


@given(streams, st.lists(st.integers(1, 300), max_size=8))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 9])
@example(b"\xef\xbb\xbfdata: a\n\n", [1, 2])
@example(b"data: a\n\n: x\n\ndata: b\n\n", [])
@example(b"data\n\ndata\n\n", [6])
def test_any_split_gives_the_events_of_the_standard(stream: bytes, cuts: list[int]) -> None:
    assert fed(cut(stream, cuts)) == reference(stream)


@given(streams)
def test_so_do_single_bytes_and_the_whole_at_once(stream: bytes) -> None:
    assert fed([bytes([byte]) for byte in stream]) == fed([stream]) == reference(stream)


@pytest.mark.parametrize(
    "stream, events",
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data\n\n", [b""]),
        (b"data: a\n", []),
        (b"data: a", []),
        (b": ping\n\n", []),
        (b"event: x\nid: 1\nretry: 5\n\n", []),
        (b"event: error\ndata: e\n\n", [b"e"]),
        (b"data: a\rdata: b\r\r", [b"a\nb"]),
        (b"data: a\r\n\r\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
        (b"<html>\n<body>data: no</body>\n\n", []),
    ],
)
def test_by_hand(stream: bytes, events: list[bytes]) -> None:
    """The oracle itself is right about these."""
    assert reference(stream) == fed([stream]) == events


@pytest.mark.parametrize(
    "stream, rest",
    [
        (b"data: a\n\ndata: b\n", b"b"),
        (b"data: a\n\ndata: b", b"b"),
        (b"data: a\r\n\r\ndata: b\r", b"b"),
        (b"data: a\n\n", None),
        (b"", None),
        (b": x", None),
    ],
)
def test_a_last_event_without_its_blank_line(stream: bytes, rest: bytes | None) -> None:
    for pieces in ([stream], [bytes([byte]) for byte in stream]):
        parser = SseParser()
        for piece in pieces:
            parser.feed(piece)
        assert parser.rest() == rest


BOUND = 40  # instead of a mebibyte, so that all splits can be tried


@pytest.mark.parametrize(
    "stream, events",
    [
        (b"data: 1\n\ndata:" + b"x" * (BOUND - 5) + b"\n\n", 2),
        (b"data: 1\n\ndata:" + b"x" * (BOUND - 4) + b"\n\ndata: 2\n\n", None),
        (b"data: 1\n\n:" + b"x" * BOUND, None),
        (b"data: 1\n\n" + b"data: " + b"x" * 2 * BOUND, None),
        (b"data: 1\n\n" + b"data: xxxx\n" * 8 + b"\n", 2),
        (b"data: 1\n\n" + b"data: xxxx\n" * 8 + b"data:x\n\n", None),
        (b"data: 1\n\n" + b"data:\n" * (BOUND + 1) + b"\n", 2),
        (b"data: 1\n\n" + b"data:\n" * (BOUND + 2), None),
        (b"data: 1\n\n" + b": xxxxxxxxx\n" * BOUND + b"data: 2\n\n", 2),
    ],
)
def test_one_event_is_bounded_whatever_the_split(
    stream: bytes, events: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events before the one that is too large are handed out; none after it."""
    monkeypatch.setattr(sse, "EVENT_BYTES_MAX", BOUND)
    for at in range(len(stream)):
        parser = SseParser()
        found = parser.feed(stream[:at]) + parser.feed(stream[at:])
        found += parser.feed(b"\n\ndata: more\n\n") if parser.too_large else []
        assert (len(found), parser.too_large) == ((events, False) if events else (1, True)), at


def test_a_line_that_never_ends_is_not_kept() -> None:
    parser = SseParser()
    for _ in range(40):
        parser.feed(b"x" * 65_536)
    assert parser.too_large and len(parser._line) <= EVENT_BYTES_MAX + 65_536


def test_ordinary_events_are_found_without_looking_at_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way takes all of them, also after a slow beginning."""
    parser = SseParser()
    assert parser.feed(b"data: fi") == [] and parser.feed(b"rst\n\n") == [b"first"]
    monkeypatch.setattr(SseParser, "_lines", None)
    assert parser.feed(b'data: {"a":1}\n\n' * 50) == [b'{"a":1}'] * 50
