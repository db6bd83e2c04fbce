"""Replies that are read as they come: framing, bounds, backpressure, and where the connection goes, on both loops."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.rules.errors import NodeBroke, NodeUnreachable, WrongAnswer
from embedmesh.rules.traces import asking_as, traceparent_line, traceparent_of
from embedmesh.signing.certificates import der, make_certificate, pinned_context, server_context
from embedmesh.upstream.http1 import Connection
from embedmesh.upstream.http1_stream import HELD_BYTES_MAX, LEFT_BYTES_MAX, READ_BYTES_MAX, BodyStream
from embedmesh.upstream.pools import InboundPool, OutboundPool, tcp_pool

LIMIT = 1 << 20
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSING = b"HTTP/1.1 200 OK\r\n\r\n"
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nContent-Length: 0\r\n\r\n"
SOON_S = 5.0  # what is to happen at once, on a machine that may be busy

Writer = asyncio.StreamWriter
Answer = Callable[[Writer], Awaitable[None]]
RUNNERS: list[Callable[[Coroutine[Any, Any, None]], None]] = [asyncio.run, uvloop.run]

both_loops = pytest.mark.parametrize("run", RUNNERS, ids=["asyncio", "uvloop"])


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Node:
    """A server that answers each request by a script; it counts connections, and when each was closed."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.connections = self.requests = 0
        self.closed: list[float] = []
        self.serving: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                answering = asyncio.ensure_future(self.answer(writer))
                gone: asyncio.Future[Any] = asyncio.ensure_future(reader.read(1)) if self.watches else answering
                await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone is not answering and gone.done():
                    gone.exception()
                    self.closed.append(time.monotonic())
                    answering.cancel()
                await answering
                if gone is not answering:
                    gone.cancel()
                    await asyncio.wait({gone})
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            self.closed.append(time.monotonic())
        finally:
            writer.transport.abort()

    watches = False  # for the client's end while it answers


@asynccontextmanager
async def node(
    answer: Answer, *, watches: bool = False, tls: tuple[ssl.SSLContext, ssl.SSLContext, bytes] | None = None
) -> AsyncIterator[tuple[Node, OutboundPool]]:
    made = Node(answer)
    made.watches = watches
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=tls[0] if tls else None)
    port = server.sockets[0].getsockname()[1]
    pool = tcp_pool("127.0.0.1", port, tls[1] if tls else None, certificate=tls[2] if tls else None)
    try:
        yield made, pool
    finally:
        pool.close()
        server.close()
        for task in made.serving:
            task.cancel()
        await asyncio.gather(*made.serving, return_exceptions=True)


def says(*pieces: bytes, then_close: bool = False) -> Answer:
    async def answer(writer: Writer) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)
        if then_close:
            writer.close()

    return answer


async def opened(pool: OutboundPool | InboundPool, limit: int = LIMIT) -> BodyStream:
    async with asyncio.timeout(SOON_S):
        return await pool.stream(lambda: REQUEST, limit)


async def body_of(stream: BodyStream) -> bytes:
    async with asyncio.timeout(SOON_S):
        return await stream.read_all(LIMIT)


FRAMINGS = {
    "chunked": ((CHUNKED, chunk(b"one"), chunk(b"two") + b"0\r\n\r\n"), False),
    "one write": ((CHUNKED + chunk(b"one") + chunk(b"two") + b"0\r\n\r\n",), False),
    "byte by byte": (tuple(bytes([each]) for each in CHUNKED + chunk(b"onetwo") + b"0\r\n\r\n"), False),
    "length": ((b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n", b"one", b"two"), False),
    "interim": (
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", CHUNKED, chunk(b"onetwo"), b"0\r\nA: b\r\n\r\n"),
        False,
    ),
    "closing": ((CLOSING, b"one", b"two"), True),
}


@both_loops
@pytest.mark.parametrize("framing", FRAMINGS)
def test_every_framing(framing: str, run: Callable[..., None]) -> None:
    """The body is the same, and the connection is used again, unless its end was the body's."""
    pieces, closes = FRAMINGS[framing]

    async def lives() -> None:
        async with node(says(*pieces, then_close=closes)) as (made, pool):
            for _ in range(3):
                stream = await opened(pool)
                assert stream.status == 200
                assert await body_of(stream) == b"onetwo"
                assert await stream.read() is None
                assert stream.by_closing is closes
            assert made.connections == (3 if closes else 1)
            whole = await pool.exchange(lambda: REQUEST, LIMIT)
            assert whole.body == b"onetwo", "a connection that was lent still exchanges"

    run(lives())


@both_loops
def test_over_tls(tmp_path: Path, run: Callable[..., None]) -> None:
    make_certificate(tmp_path / "k", tmp_path / "c")
    certificate = der(tmp_path / "c")
    tls = server_context(tmp_path / "c", tmp_path / "k"), pinned_context(certificate), certificate
    large = b"x" * 300_000

    async def lives() -> None:
        async with node(says(CHUNKED, chunk(b"one"), chunk(large), b"0\r\n\r\n"), tls=tls) as (made, pool):
            for _ in range(2):
                assert await body_of(await opened(pool)) == b"one" + large
            assert (await pool.exchange(lambda: REQUEST, LIMIT)).body == b"one" + large
            assert made.connections == 1

    run(lives())


@pytest.mark.parametrize(
    "pieces", [(CHUNKED, chunk(b"one")), (CHUNKED, b"9\r\none"), (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\none",)]
)
async def test_a_cut_body_is_never_a_whole_one(pieces: tuple[bytes, ...]) -> None:
    """What had come is handed out first."""
    async with node(says(*pieces, then_close=True)) as (_, pool):
        stream = await opened(pool)
        assert await stream.read() == b"one"
        with pytest.raises(NodeBroke):
            await stream.read()
        with pytest.raises(NodeBroke):
            await stream.read()


@pytest.mark.parametrize(
    "pieces, limit",
    [
        ((b"garbage\r\n\r\n",), LIMIT),
        ((b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 4_000,), LIMIT),
        ((CHUNKED, b"zz\r\n"), LIMIT),
        ((CHUNKED, chunk(b"x" * 101)), 100),
        ((CHUNKED, *[chunk(b"x")] * 101), 100),
        ((CHUNKED, b"1;" + b"e" * 60_000), 100),
    ],
)
async def test_what_is_no_http_or_too_large_is_refused(pieces: tuple[bytes, ...], limit: int) -> None:
    async with node(says(*pieces, b"", b""), watches=True) as (made, pool):
        with pytest.raises(WrongAnswer):
            await body_of(await opened(pool, limit))
        async with asyncio.timeout(SOON_S):
            while not made.closed:
                await asyncio.sleep(0.001)


async def test_a_body_of_single_byte_chunks_may_be_as_large_as_any() -> None:
    async with node(says(CHUNKED + chunk(b"x") * 100 + b"0\r\n\r\n")) as (_, pool):
        assert await body_of(await opened(pool, 100)) == b"x" * 100


@both_loops
def test_a_slow_reader_holds_the_node_back(run: Callable[..., None]) -> None:
    """Little is kept here, and all of it arrives once it is read."""
    piece, pieces = b"y" * 32_768, 400
    written = 0

    async def answer(writer: Writer) -> None:
        nonlocal written
        writer.write(CHUNKED)
        for _ in range(pieces):
            writer.write(chunk(piece))
            await writer.drain()
            written += len(piece)
        writer.write(b"0\r\n\r\n")

    async def lives() -> None:
        async with node(answer) as (_, pool):
            stream = await opened(pool, 1 << 30)
            before = -1
            while written != before:  # until the kernel's own buffers are full, too
                before = written
                await asyncio.sleep(0.1)
                assert stream._unread <= HELD_BYTES_MAX + READ_BYTES_MAX
            assert written < len(piece) * pieces
            total = 0
            while (some := await stream.read()) is not None:
                total += len(some)
            assert total == written == len(piece) * pieces
            again = await opened(pool, 1 << 30)
            assert await again.read(), "a connection that was paused reads again"
            again.close()

    run(lives())


@both_loops
def test_closing_tells_the_node_at_once(run: Callable[..., None]) -> None:
    """Within 100 ms, also while the stream is held back; who waits for more is told."""

    async def endless(writer: Writer) -> None:
        writer.write(CHUNKED)
        while True:
            writer.write(chunk(b"z" * 1_000))
            await writer.drain()

    async def silent(writer: Writer) -> None:
        writer.write(CHUNKED + chunk(b"a"))
        await asyncio.sleep(3600)

    async def lives() -> None:
        async with node(endless, watches=True) as (made, pool):
            stream = await opened(pool, 1 << 30)
            while not stream._paused:
                await asyncio.sleep(0.001)
            at = time.monotonic()
            stream.close()
            while not made.closed:
                await asyncio.sleep(0.001)
            assert made.closed[0] - at < 0.1
            with pytest.raises(NodeBroke):
                await stream.read()
        async with node(silent, watches=True) as (made, pool):
            stream = await opened(pool)
            assert await stream.read() == b"a"
            waiting = asyncio.ensure_future(stream.read())
            await asyncio.sleep(0)
            stream.close()
            with pytest.raises(NodeBroke):
                await asyncio.wait_for(waiting, SOON_S)

    run(lives())


async def test_cancelling_the_wait_for_the_head_closes_the_connection() -> None:
    async def silent(writer: Writer) -> None:
        await asyncio.sleep(3600)

    async with node(silent, watches=True) as (made, pool):
        waiting = asyncio.ensure_future(pool.stream(lambda: REQUEST, LIMIT))
        while not made.requests:
            await asyncio.sleep(0.001)
        waiting.cancel()
        async with asyncio.timeout(SOON_S):
            while not made.closed:
                await asyncio.sleep(0.001)
        assert pool.take() is None


async def test_cancelling_a_read_loses_nothing() -> None:
    go = asyncio.Event()

    async def answer(writer: Writer) -> None:
        writer.write(CHUNKED)
        await go.wait()
        writer.write(chunk(b"one") + b"0\r\n\r\n")

    async with node(answer) as (_, pool):
        stream = await opened(pool)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await stream.read()
        go.set()
        assert await body_of(stream) == b"one"


async def test_a_stream_that_is_left_gives_its_connection_back() -> None:
    """If its end comes soon and small; else the connection is closed. To close it afterwards changes nothing."""
    late = asyncio.Event()

    async def answer(writer: Writer) -> None:
        writer.write(CHUNKED + chunk(b"[DONE]"))
        await late.wait()
        writer.write(tails[-1])

    tails: list[bytes] = []
    for tail, kept in ((b"0\r\n\r\n", True), (chunk(b"x" * (LEFT_BYTES_MAX + 1)), False)):
        async with node(answer, watches=True) as (made, pool):
            late.clear()
            tails.append(tail)
            stream = await opened(pool)
            assert await stream.read() == b"[DONE]"
            stream.leave()
            stream.close()
            late.set()
            async with asyncio.timeout(SOON_S):
                while stream._connection is not None:
                    await asyncio.sleep(0.001)
            assert (pool.take() is not None) is kept, made


async def test_a_body_is_read_whole_up_to_a_bound() -> None:
    async with node(says(CHUNKED, chunk(b"x" * 100), b"0\r\n\r\n")) as (_, pool):
        assert await (await opened(pool)).read_all(100) == b"x" * 100
        assert await (await opened(pool)).read_all(99) == b"x" * 99
        assert pool.take() is None, "the rest of that reply is not wanted"


async def test_a_connection_that_was_closed_while_idle_is_replaced() -> None:
    async def answer(writer: Writer) -> None:
        writer.write(CHUNKED + chunk(b"a") + b"0\r\n\r\n")
        await writer.drain()
        asyncio.get_running_loop().call_later(0.02, writer.close)

    async with node(answer) as (made, pool):
        for _ in range(3):
            assert await body_of(await opened(pool)) == b"a"
            await asyncio.sleep(0.015)
        assert made.requests == 3


async def test_a_node_that_cannot_be_reached() -> None:
    async with node(says()) as (_, pool):
        pass
    with pytest.raises(NodeUnreachable):
        await opened(pool)


async def test_over_a_connection_that_the_node_opened() -> None:
    """As over one of ours; it is offered again afterwards."""
    pool = InboundPool()

    async def accept(reader: asyncio.StreamReader, writer: Writer) -> None:
        await Node(says(CHUNKED, chunk(b"one"), b"0\r\n\r\n")).serve(reader, writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    pool.offer(connection)
    for _ in range(3):
        assert await body_of(await opened(pool)) == b"one"
    connection.abort()
    await asyncio.sleep(0.01)
    pool.close()
    server.close()


class Script:
    """A transport that does nothing."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


bodies = st.lists(st.binary(min_size=1, max_size=9), max_size=6)


@given(bodies, st.lists(st.integers(1, 200), max_size=6), st.sampled_from(["chunked", "length", "closing"]))
async def test_any_split_and_any_cut(pieces: list[bytes], cuts: list[int], framing: str) -> None:
    """The body is whole however the bytes come; each proper beginning of the reply is known to be cut, or may be."""
    whole = b"".join(pieces)
    wire = {
        "chunked": CHUNKED + b"".join(map(chunk, pieces)) + b"0\r\n\r\n",
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole,
        "closing": CLOSING + whole,
    }[framing]
    ends = [0, *sorted({at for at in cuts if at < len(wire)}), len(wire)]
    for upto in range(1, len(ends)):
        put_back: list[Connection] = []
        connection = Connection()
        connection.connection_made(Script())  # type: ignore[arg-type]
        stream = BodyStream(connection, LIMIT, put_back.append)
        for start, end in pairwise(ends[: upto + 1]):
            stream.get_buffer(-1)[: end - start] = wire[start:end]
            stream.buffer_updated(end - start)
        if end == len(wire) and framing != "closing":
            assert await stream.read_all(LIMIT) == whole
            assert connection.usable
        else:
            stream.connection_lost(None)
            if stream.by_closing:
                assert framing == "closing" and whole.startswith(await stream.read_all(LIMIT))
            else:
                with pytest.raises(NodeBroke):
                    await stream.read_all(LIMIT)
            assert not connection.usable
        assert put_back == [connection]


async def test_a_connection_is_dialled_in_a_context_of_its_own() -> None:
    """Callbacks of a connection run in the context that made it: no later request may find the trace."""
    found: list[bytes] = []

    async def dial() -> Connection:
        found.append(traceparent_line())
        raise NodeUnreachable("nobody there")

    pool = OutboundPool(dial)
    with asking_as("req_1", traceparent_of(1, 2)):
        pool.grow()
        for ask in (pool.exchange, pool.stream):
            with pytest.raises(NodeUnreachable):
                await ask(lambda: REQUEST, LIMIT)
    assert found == [b""] * 3
