"""The client to nodes over a real Unix socket, against a node that says exactly what the test wrote."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from embedmesh.edge.node_client import NodePool
from embedmesh.rules.embeddings import EmbedIds, unpack_ids
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeFailure, NodeRefused, NodeUnreachable, WrongAnswer
from embedmesh.rules.ports import Candidate
from tests.flow.world import MODEL, right_reply

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
IDS = [[1, 2], [3]]
GOOD = msgspec.msgpack.encode(right_reply(IDS))


def http(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


@asynccontextmanager
async def node(folder: Path, script: Script) -> AsyncIterator[Candidate]:
    path = folder / "n.sock"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield Candidate("n0", f"unix:{path}", 0.1)
    finally:
        server.close()


def always(reply: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(reply)

    return script


async def test_ids_go_out_and_the_reply_comes_back(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(http(GOOD))

    async with node(tmp_path, script) as candidate:
        assert await NodePool().embed(candidate, MODEL, IDS) == right_reply(IDS)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/embeddings HTTP/1.1\r\n")
    assert b"Content-Type: application/vnd.embedmesh.v2+msgpack\r\n" in head
    asked = msgspec.msgpack.decode(body, type=EmbedIds)
    assert (asked.model, unpack_ids(asked)) == ("acme/tiny", IDS)
    assert asked.ids == b"\1\0\0\0\2\0\0\0\3\0\0\0"


async def test_a_chunked_reply_and_one_that_drips_are_put_together(tmp_path: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(GOOD), 50):
            part = GOOD[start : start + 50]
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")

    async with node(tmp_path, script) as candidate:
        assert await NodePool().embed(candidate, MODEL, IDS) == right_reply(IDS)


WRONG = [
    # what the node says, what the gateway makes of it
    (b"<html>hello</html>", WrongAnswer),
    (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", WrongAnswer),
    (http(b"not json"), WrongAnswer),
    (http(b"{}"), WrongAnswer),
    (http(b"\x91" * 3_000), WrongAnswer),
    (http(b"\x82\xa6tokens\x07\xa4data\xa4abcd"), WrongAnswer),
    (http(b"\x82\xa6tokens\xca\x7f\xc0\x00\x00\xa4data\xc4\x00"), WrongAnswer),
    (http(b"", "429 Too Many Requests"), NodeBusy),
    (http(b"", "503 Service Unavailable"), NodeBusy),
    (http(b"", "400 Bad Request"), NodeRefused),
    (http(b"", "404 Not Found"), NodeBusy),
    (http(b"", "500 Internal Server Error"), NodeBroke),
    (http(b"", "302 Found", "Location: http://127.0.0.1/\r\n"), NodeBroke),
    (http(b"x" * 1_000_000), WrongAnswer),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", WrongAnswer),
]


@pytest.mark.parametrize(("reply", "failure"), WRONG)
async def test_what_is_not_the_protocol_is_a_failure_of_the_node(
    tmp_path: Path, reply: bytes, failure: type[NodeFailure]
) -> None:
    async with node(tmp_path, always(reply)) as candidate:
        with pytest.raises(failure):
            await NodePool().embed(candidate, MODEL, IDS)


@pytest.mark.parametrize("cut", [0, 10, 60, len(http(GOOD)) - 1])
async def test_a_connection_that_breaks_is_told_at_once(tmp_path: Path, cut: int) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(http(GOOD)[:cut])

    async with node(tmp_path, script) as candidate:
        with pytest.raises(NodeBroke):
            async with asyncio.timeout(2):
                await NodePool().embed(candidate, MODEL, IDS)


async def test_a_large_reply_that_comes_in_one_read_is_right(tmp_path: Path) -> None:
    """The cap on the head is for the head: 2,000 vectors behind it are no sign of a hostile node."""
    many = [[1]] * 2_000
    async with node(tmp_path, always(http(msgspec.msgpack.encode(right_reply(many))))) as candidate:
        assert await NodePool().embed(candidate, MODEL, many) == right_reply(many)


async def test_nobody_there(tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/none.sock", "http://127.0.0.1:1/", "/etc/passwd"):
        with pytest.raises(NodeUnreachable):
            await NodePool().embed(Candidate("n0", address, 0.1), MODEL, IDS)


async def test_connections_are_kept_and_one_that_died_while_idle_is_replaced_unseen(tmp_path: Path) -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(3):  # then the node restarts
            await read_request(reader)
            writer.write(http(GOOD))

    pool = NodePool()
    async with node(tmp_path, script) as candidate:
        for _ in range(9):
            assert await pool.embed(candidate, MODEL, IDS) == right_reply(IDS)
    assert connections == 3
    pool.close()


async def test_giving_up_closes_the_connection_so_that_the_node_can_stop(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        assert await reader.read() == b""
        closed.set()

    async with node(tmp_path, script) as candidate:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await NodePool().embed(candidate, MODEL, IDS)
        async with asyncio.timeout(2):
            await closed.wait()


async def test_a_node_that_speaks_unasked_is_not_believed_next_time(tmp_path: Path) -> None:
    """A second reply on a kept connection must not become the answer to the next question."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(http(GOOD))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(http(b'{"poison":1}'))
        await read_request(reader)

    pool = NodePool()
    async with node(tmp_path, script) as candidate:
        await pool.embed(candidate, MODEL, IDS)
        await asyncio.sleep(0.1)
        assert await pool.embed(candidate, MODEL, IDS) == right_reply(IDS)


async def test_two_replies_in_one_packet_are_no_answer_for_two(tmp_path: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(http(GOOD) + http(b'{"poison":1}'))
        await read_request(reader)

    pool = NodePool()
    async with node(tmp_path, script) as candidate:
        for _ in range(2):
            with suppress(NodeFailure):
                assert await pool.embed(candidate, MODEL, IDS) == right_reply(IDS)
