"""Replies of nodes: those whose heads are known are read as httptools reads them, however they come."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.rules.errors import NodeBroke, NodeFailure, TooLarge
from embedmesh.upstream import http1
from embedmesh.upstream.http1 import KNOWN_HEAD_BYTES_MAX, KNOWN_HEADS_MAX, Connection
from embedmesh.upstream.http1_reader import NODE_HEAD_BYTES_MAX, Http1Reply

LIMIT = 600
BODIES = [b"", b"ab", b"x" * 40, b"\r\n\r\n", b"a\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", b"y" * (LIMIT + 1)]
STARTS = [
    "HTTP/1.1 200 OK",
    "HTTP/1.1 204 No Content",
    "HTTP/1.1 429 Too Many Requests",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 304 x",
]
CHUNKED = "Transfer-Encoding: chunked\r\n"
LINES = [
    "",
    "Content-Type: application/vnd.embedmesh.v2+msgpack\r\n",
    "Connection: close\r\n",
    "Connection: keep-alive\r\n",
    "Signature: em=:a b=:\r\n",
    "A-B: c d  e\r\n",
    "content-length: 40\r\n",
    "Upgrade: x\r\n",
    "X:y\r\n",
    "X_y: \x80\r\n",
    "X: y \r\n",
    "X: y\r\n z\r\n",
    "Retry-After: 3\r\nretry-after: 4\r\n",
    CHUNKED,
    "X: " + "z" * KNOWN_HEAD_BYTES_MAX + "\r\n",
]


class Script:
    """A transport, and a receiver: what was written, told and closed."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.told: list[tuple[object, ...]] = []
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def abort(self) -> None:
        self.aborted = True

    def replied(self, reply: Http1Reply) -> None:
        self.told.append((reply.status, reply.headers, reply.body, reply.by_closing))

    def broke(self, failure: NodeFailure) -> None:
        self.told.append((type(failure), str(failure)))


def connected() -> tuple[Connection, Script]:
    connection, script = Connection(), Script()
    connection.connection_made(cast(Any, script))
    return connection, script


def reply(start: str, line: str, body: bytes, said: int | None, *, last: bool = False) -> bytes:
    """A whole reply; `said` is its Content-Length, `last` puts that behind the other lines."""
    length = "" if said is None else f"Content-Length: {said}\r\n"
    lines = line + length if last else length + line
    return f"{start}\r\n{lines}\r\n".encode() + body


def ordinary(body: bytes) -> bytes:
    return reply(STARTS[0], LINES[1], body, len(body))


replies = st.builds(
    lambda start, line, body, off, last: reply(
        start, line, body, None if off is None else max(0, len(body) + off), last=last
    ),
    st.sampled_from(STARTS),
    st.sampled_from(LINES),
    st.sampled_from(BODIES),
    st.sampled_from([0, 0, 0, 0, None, -1, 1]),
    st.booleans(),
)
chunked = st.just(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nContent-Length: 9\r\n\r\n")
interim = st.just(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
odd = st.sampled_from([b"\r\n", b"\n", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab", b"<html>", b"\0"])
streams = st.lists(st.one_of(replies, replies, replies, chunked, interim, odd), min_size=1, max_size=3).map(b"".join)


def read(connection: Connection, script: Script, pieces: list[bytes], *, closed: bool) -> tuple[object, ...]:
    """What becomes of one exchange."""
    script.told, script.aborted = [], False
    connection.begin(b"", LIMIT, script)
    for piece in pieces:
        if not script.aborted:
            connection.data_received(piece)
    usable = connection.usable
    if closed:
        connection.connection_lost(None)
    return script.told, script.aborted, usable, connection.heard


@given(stream=streams, cuts=st.lists(st.integers(0, 400), max_size=3), closed=st.booleans(), more=st.binary(max_size=4))
def test_a_known_head_changes_nothing(stream: bytes, cuts: list[int], closed: bool, more: bytes) -> None:
    """Whatever a node sends and however it is cut: httptools alone reads what comes byte by byte at first."""
    knows, script = connected()
    for each in (stream, *(reply(STARTS[0], line, body, len(body)) for line in LINES[:2] for body in BODIES)):
        other, again = connected()
        other._known = knows._known
        read(other, again, [each], closed=False)
    stream += more
    ends = sorted({cut for cut in cuts if 0 < cut < len(stream)})
    pieces = [stream[start:end] for start, end in zip([0, *ends], [*ends, len(stream)], strict=True)]
    fresh, witness = connected()
    expected = read(fresh, witness, [stream[:1], *filter(None, [pieces[0][1:], *pieces[1:]])], closed=closed)
    assert read(knows, script, pieces, closed=closed) == expected
    other, again = connected()
    assert read(other, again, pieces, closed=closed) == expected


def test_the_parser_is_not_asked_about_a_known_head(monkeypatch: pytest.MonkeyPatch) -> None:
    connection, script = connected()
    for body in BODIES[:4]:
        assert read(connection, script, [ordinary(body)], closed=False)[0] == [(200, script.told[0][1], body, False)]
    monkeypatch.setattr(http1, "ReplyReader", None)
    monkeypatch.setattr(http1, "_plain_reply", None)
    for body in (b"", b"zz", b"w" * 40):
        told, aborted, usable, _ = read(connection, script, [ordinary(body)], closed=False)
        assert told == [
            (200, {b"content-type": LINES[1][14:-2].encode(), b"content-length": b"%d" % len(body)}, body, False)
        ]
        assert usable and not aborted


def test_known_heads_are_bounded() -> None:
    """The oldest goes; a long one is never kept, nor one that says nothing of its body's length."""
    connection, script = connected()
    for size in range(KNOWN_HEADS_MAX + 5):
        read(connection, script, [ordinary(b"a" * size)], closed=False)
    assert len(connection._known) == KNOWN_HEADS_MAX
    assert ordinary(b"").removesuffix(b"\r\n\r\n") not in connection._known
    assert ordinary(b"a" * size).removesuffix(b"\r\n\r\n" + b"a" * size) in connection._known
    known = set(connection._known)
    for other in (reply(STARTS[0], LINES[-1], b"a", 1), reply(STARTS[0], CHUNKED, b"0\r\n\r\n", None)):
        assert read(connection, script, [other], closed=False)[2]
        assert set(connection._known) == known


def test_a_head_with_a_signature_is_not_remembered() -> None:
    """It never comes again."""
    connection, script = connected()
    told = read(connection, script, [reply(STARTS[0], "Signature: em=:a b=:\r\n", b"a", 1)], closed=False)[0]
    assert told == [(200, {b"content-length": b"1", b"signature": b"em=:a b=:"}, b"a", False)]
    assert not connection._known


def test_a_known_head_with_a_body_over_the_limit_is_refused() -> None:
    """The limit is the question's, not the head's."""
    connection, script = connected()
    large = ordinary(b"v" * 50)
    read(connection, script, [large], closed=False)
    connection.begin(b"", 50 - NODE_HEAD_BYTES_MAX, script)
    connection.data_received(large)
    assert script.told[-1][0] is TooLarge and script.aborted


def test_nothing_is_told_from_inside_of_begin_nor_after_a_cancel() -> None:
    connection, script = connected()
    connection.begin(b"question", LIMIT, script)
    assert (script.written, script.told) == ([b"question"], [])
    connection.cancel()
    connection.data_received(ordinary(b"late"))
    connection.connection_lost(None)
    assert script.told == [] and script.aborted and not connection.usable
    with pytest.raises(NodeBroke):
        connection.begin(b"", LIMIT, script)


def test_a_receiver_may_begin_the_next_exchange_at_once() -> None:
    """It is told when the connection is free again."""
    connection, script = connected()

    class Next(Script):
        def replied(self, reply: Http1Reply) -> None:
            super().replied(reply)
            connection.begin(b"second", LIMIT, script)

    first = Next()
    for known in (False, True):
        connection.begin(b"first", LIMIT, first)
        connection.data_received(ordinary(b"a"))
        assert script.written[-1] == b"second" and len(script.told) == int(known)
        connection.data_received(ordinary(b"b"))
        assert script.told[-1][2] == b"b" and first.told[-1][2] == b"a"
