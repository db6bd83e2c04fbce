"""The client to nodes over a real Unix socket, against a node that says exactly what the test wrote."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from embedmesh.gateway.nodes.links import NodeClients
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.embeddings import Counted, EmbedIds, EmbedVectors, Ids, unpack_ids
from embedmesh.rules.errors import (
    NodeBroke,
    NodeBusy,
    NodeFailure,
    NodeRefused,
    NodeTooSlow,
    NodeUnreachable,
    WrongAnswer,
)
from embedmesh.rules.forwarding import Part
from embedmesh.upstream.pools import unix_pool
from tests.flow.world import MODEL, right_reply
from tests.gateway.attempts import Asked, ask, at_once

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
async def node(folder: Path, script: Script) -> AsyncIterator[OwnLink]:
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
        link = OwnLink(unix_pool(str(path)), SystemClock())
        yield link
        link.close()
    finally:
        server.close()


async def embed(link: OwnLink, ids: list[list[int]] = IDS) -> EmbedVectors:
    lengths = [len(each) + 2 for each in ids]
    part = Part("n0", tuple(range(len(ids))), sum(lengths), 0.1)
    return await link.embed(part, MODEL, Counted(lengths=lengths, ids=ids), "req_1")


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

    async with node(tmp_path, script) as link:
        assert await embed(link) == right_reply(IDS)
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

    async with node(tmp_path, script) as link:
        assert await embed(link) == right_reply(IDS)


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
    (http(b"", "504 Gateway Timeout"), NodeTooSlow),
    (http(b"", "302 Found", "Location: http://127.0.0.1/\r\n"), NodeBroke),
    (http(b"x" * 1_000_000), WrongAnswer),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", WrongAnswer),
]


@pytest.mark.parametrize(("reply", "failure"), WRONG)
async def test_what_is_not_the_protocol_is_a_failure_of_the_node(
    tmp_path: Path, reply: bytes, failure: type[NodeFailure]
) -> None:
    async with node(tmp_path, always(reply)) as link:
        with pytest.raises(failure):
            await embed(link)


@pytest.mark.parametrize("cut", [0, 10, 60, len(http(GOOD)) - 1])
async def test_a_connection_that_breaks_is_told_at_once(tmp_path: Path, cut: int) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(http(GOOD)[:cut])

    async with node(tmp_path, script) as link:
        with pytest.raises(NodeBroke):
            async with asyncio.timeout(2):
                await embed(link)


async def test_a_reply_of_ours_has_a_length(tmp_path: Path) -> None:
    """One that only ends with its connection may have been cut: then the node has died, and told no lie."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + GOOD[:20])

    async with node(tmp_path, script) as link:
        with pytest.raises(NodeBroke):
            await embed(link)


async def test_a_large_reply_that_comes_in_one_read_is_right(tmp_path: Path) -> None:
    """The cap on the head is for the head: 2,000 vectors behind it are no sign of a hostile node."""
    many = [[1]] * 2_000
    async with node(tmp_path, always(http(msgspec.msgpack.encode(right_reply(many))))) as link:
        assert await embed(link, many) == right_reply(many)


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NodeUnreachable):
        await embed(OwnLink(unix_pool(f"{tmp_path}/none.sock"), SystemClock()))


async def test_a_node_that_was_removed_is_unreachable(tmp_path: Path) -> None:
    clients = NodeClients()
    async with node(tmp_path, always(http(GOOD))) as link:
        clients.add("n0", link)
        part = Part("n0", (1,), 3, 0.1)
        await clients.embed(part, MODEL, Counted(lengths=[4, 3], ids=IDS), "req_1")
        clients.remove("n0")
        with pytest.raises(NodeUnreachable):
            await clients.embed(part, MODEL, Counted(lengths=[4, 3], ids=IDS), "req_1")


async def test_a_part_asks_for_its_own_inputs_in_its_own_order(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(http(GOOD))

    async with node(tmp_path, script) as link:
        await link.embed(
            Part("n0", (2, 0), 5, 0.1), MODEL, Counted(lengths=[3, 9, 4], ids=[[7], [8] * 7, [9, 9]]), "req_1"
        )
    asked = msgspec.msgpack.decode(seen[0].partition(b"\r\n\r\n")[2], type=EmbedIds)
    assert unpack_ids(asked) == [[9, 9], [7]]


async def test_connections_are_kept_and_one_that_died_while_idle_is_replaced_unseen(tmp_path: Path) -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(3):  # then the node restarts
            await read_request(reader)
            writer.write(http(GOOD))

    async with node(tmp_path, script) as link:
        for _ in range(9):
            assert await embed(link) == right_reply(IDS)
    assert connections == 3


async def test_giving_up_closes_the_connection_so_that_the_node_can_stop(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        assert await reader.read() == b""
        closed.set()

    async with node(tmp_path, script) as link:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await embed(link)
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

    async with node(tmp_path, script) as link:
        await embed(link)
        await asyncio.sleep(0.1)
        assert await embed(link) == right_reply(IDS)


async def test_two_replies_in_one_packet_are_no_answer_for_two(tmp_path: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(http(GOOD) + http(b'{"poison":1}'))
        await read_request(reader)

    async with node(tmp_path, script) as link:
        for _ in range(2):
            with suppress(NodeFailure):
                assert await embed(link) == right_reply(IDS)


# -- attempts that begin at once


def first_good(reply: bytes) -> Script:
    """The first reply of a connection is right, so that it is kept; then comes `reply`, and the end."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(http(GOOD))
        await read_request(reader)
        writer.write(reply)
        await writer.drain()

    return script


async def test_an_attempt_begins_at_once_where_a_connection_is_idle(tmp_path: Path) -> None:
    """Then it is answered as any other; and so is the next, on the same connection."""
    async with node(tmp_path, always(http(GOOD))) as link:
        assert ask(link, Asked(), IDS) is None, "there is no connection yet"
        await embed(link)
        for _ in range(3):
            assert await at_once(link, IDS) == right_reply(IDS)
        first, second, third = Asked(), Asked(), Asked()
        assert ask(link, first, IDS) is not None
        assert ask(link, second, IDS) is not None, "the first that found none had one more opened"
        assert ask(link, third, IDS) is None, "both are in use"
        assert await first.told == await second.told == right_reply(IDS)


async def test_both_ways_send_the_same(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await read_request(reader))
            writer.write(http(GOOD))

    async with node(tmp_path, script) as link:
        await embed(link)
        await at_once(link, IDS)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("reply", "failure"), WRONG)
async def test_what_is_not_the_protocol_is_told_as_a_failure(
    tmp_path: Path, reply: bytes, failure: type[NodeFailure]
) -> None:
    async with node(tmp_path, first_good(reply)) as link:
        await embed(link)
        with pytest.raises(failure):
            await at_once(link, IDS)


@pytest.mark.parametrize("cut", [10, 60, len(http(GOOD)) - 1])
async def test_a_reply_that_is_cut_is_told_as_a_failure(tmp_path: Path, cut: int) -> None:
    async with node(tmp_path, first_good(http(GOOD)[:cut])) as link:
        await embed(link)
        with pytest.raises(NodeBroke):
            await at_once(link, IDS)


async def test_an_attempt_on_a_connection_that_had_died_is_made_on_another(tmp_path: Path) -> None:
    """Nobody hears of it: the node restarted, and nothing of a reply had come."""
    async with node(tmp_path, first_good(b"")) as link:
        await embed(link)
        assert await at_once(link, IDS) == right_reply(IDS)
        await asyncio.sleep(0)
        assert not link._again


async def test_an_attempt_that_is_made_again_tells_how_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "n.sock"
    async with node(tmp_path, first_good(b"")) as link:
        await embed(link)
        path.unlink()
        with pytest.raises(NodeUnreachable):
            await at_once(link, IDS)


async def test_an_attempt_that_is_cancelled_tells_nothing_and_closes_its_connection(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(http(GOOD))
        await read_request(reader)
        assert await reader.read() == b""
        closed.set()

    async with node(tmp_path, script) as link:
        await embed(link)
        asked = Asked()
        attempt = ask(link, asked, IDS)
        assert attempt is not None
        await asyncio.sleep(0.02)
        attempt.cancel()
        attempt.cancel()
        async with asyncio.timeout(2):
            await closed.wait()
        assert not asked.told.done()
        assert ask(link, Asked(), IDS) is None, "the connection is gone"


async def test_to_cancel_what_has_ended_harms_nobody(tmp_path: Path) -> None:
    """Its connection is another attempt's by now."""
    async with node(tmp_path, always(http(GOOD))) as link:
        await embed(link)
        first, second = Asked(), Asked()
        attempt = ask(link, first, IDS)
        await first.told
        assert ask(link, second, IDS) is not None
        assert attempt is not None
        attempt.cancel()
        assert await second.told == right_reply(IDS)


async def test_what_is_cancelled_while_it_is_made_again_tells_nothing(tmp_path: Path) -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        if connections > 1:
            assert await reader.read() == b"", "the second is broken off"
            return
        writer.write(http(GOOD))
        await read_request(reader)

    async with node(tmp_path, script) as link:
        await embed(link)
        asked = Asked()
        attempt = ask(link, asked, IDS)
        assert attempt is not None
        while connections < 2:
            await asyncio.sleep(0.001)
        attempt.cancel()
        while link._again:
            await asyncio.sleep(0.001)
        assert not asked.told.done()


async def test_ids_may_be_bytes_already(tmp_path: Path) -> None:
    """And of the same request some may be numbers: one canary asks several inputs again."""
    seen: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await read_request(reader))
            writer.write(http(GOOD))

    async with node(tmp_path, script) as link:
        spellings: list[list[Ids]] = [[[1, 2], [3]], [b"\1\0\0\0\2\0\0\0", b"\3\0\0\0"], [[1, 2], b"\3\0\0\0"]]
        for ids in spellings:
            await link.embed(Part("n0", (0, 1), 7, 0.1), MODEL, Counted(lengths=[4, 3], ids=ids), "req_1")
    assert seen[0] == seen[1] == seen[2]
