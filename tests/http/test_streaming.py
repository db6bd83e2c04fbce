"""A paid stream over real sockets: the echo operation behind the general server, through the same spine."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from embedmesh.flow.bill import Bill
from embedmesh.flow.paid import serve
from embedmesh.flow.world import World
from embedmesh.http.bodies import JSON_HEADERS
from embedmesh.http.exchange import GeneralExchange
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.rules.errors import NoNodeAvailable
from embedmesh.rules.exchange import RequestHead
from tests.flow.test_operation import Echo, EchoCall
from tests.flow.world import GOOD_KEY, POOR_KEY, MemoryLedger, make_world
from tests.http.raw import request, send, serving

WORDS = b"one two three"
RESETS = 60
HELD = 3 * 1 + 3 * 3


@asynccontextmanager
async def echoing(world: World) -> AsyncIterator[int]:
    """The port of a server whose only route is the echo."""
    bodies = BodyBudget(10**6)

    async def echo(request: web.BaseRequest) -> web.StreamResponse:
        exchange = GeneralExchange(request, bodies, web.Response(headers=JSON_HEADERS), 1.0)
        try:
            await serve(world, Echo(), RequestHead(exchange.header("authorization")), exchange.body, exchange.deliver)
        finally:
            exchange.end()
        return exchange.response

    async with serving(HttpServer({"/echo": {"POST": echo}})) as port:
        yield port


def ledger(world: World) -> list[tuple[str, int]]:
    assert isinstance(world.ledger, MemoryLedger)
    return world.ledger.log


async def read_chunks(reader: asyncio.StreamReader) -> list[bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"text/event-stream" in head and b"x-embedmesh-request" in head
    chunks = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunks.append(await reader.readexactly(size))
        await reader.readline()
    return chunks


async def test_a_stream_is_delivered_part_by_part_and_charged() -> None:
    world = make_world()
    async with echoing(world) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(path="/echo", body=WORDS, key=GOOD_KEY))
        assert await read_chunks(reader) == WORDS.split()
        writer.close()
    assert ledger(world) == [("hold", HELD), ("capture", HELD)]


async def test_a_caller_that_knows_no_chunks() -> None:
    """As nginx asks, unless it is told to speak HTTP/1.1."""
    world = make_world()
    async with echoing(world) as port:
        asked = request(path="/echo", body=WORDS, key=GOOD_KEY).replace(b"HTTP/1.1", b"HTTP/1.0")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked)
        head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
        writer.close()
    assert body == b"".join(WORDS.split()) and b" 200 OK" in head and b"chunked" not in head.lower()
    assert ledger(world) == [("hold", HELD), ("capture", HELD)]


async def test_a_caller_that_resets_in_the_middle_pays_what_was_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second word waits until the caller is gone; the third is not said any more."""
    world, gone = make_world(), asyncio.Event()
    parts = EchoCall.parts

    async def slow(call: EchoCall, bill: Bill) -> AsyncIterator[bytes]:
        async for part in parts(call, bill):
            yield part
            await gone.wait()
            await asyncio.sleep(0.05)

    monkeypatch.setattr(EchoCall, "parts", slow)
    async with echoing(world) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(path="/echo", body=WORDS, key=GOOD_KEY))
        await reader.readuntil(b"one")
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        gone.set()
        async with asyncio.timeout(5):
            while len(ledger(world)) < 2:
                await asyncio.sleep(0.01)
    assert ledger(world) in ([("hold", HELD), ("capture", 3 + 3)], [("hold", HELD), ("capture", 3 + 6)])


def breaks_after(monkeypatch: pytest.MonkeyPatch, said: int) -> None:
    async def broken(call: EchoCall, bill: Bill) -> AsyncIterator[bytes]:
        for word in call.words[:said]:
            yield word
        raise NoNodeAvailable("the node is gone")

    monkeypatch.setattr(EchoCall, "parts", broken)


async def test_a_caller_that_resets_right_after_the_last_byte_pays() -> None:
    """In a thread, as callers are elsewhere: it is gone before the handler has heard that all is written."""
    world = make_world()

    def once(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(request("POST", "/echo", WORDS, key=GOOD_KEY))
            got = b""
            while b"three" not in got:
                got += sock.recv(65_536)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with echoing(world) as port:
        for _ in range(RESETS):
            await asyncio.to_thread(once, port)
        await asyncio.sleep(0.1)
    assert [what for what, _ in ledger(world)].count("capture") == RESETS


async def test_a_failure_before_the_first_part_is_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    breaks_after(monkeypatch, 0)
    async with echoing(world) as port:
        reply = await send(port, request(path="/echo", body=WORDS, key=GOOD_KEY))
    assert (reply.status, reply.body) == (503, b"echo: no_node_available")
    assert ledger(world) == [("hold", HELD), ("release", HELD)]


async def test_a_failure_in_the_middle_cuts_the_connection_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    breaks_after(monkeypatch, 1)
    async with echoing(world) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(path="/echo", body=WORDS, key=GOOD_KEY))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await read_chunks(reader)
        writer.close()
    assert ledger(world) == [("hold", HELD), ("release", HELD)]


async def test_a_refusal_has_the_operation_s_envelope() -> None:
    world = make_world()
    async with echoing(world) as port:
        reply = await send(port, request(path="/echo", body=WORDS, key=POOR_KEY))
    assert (reply.status, reply.body) == (429, b"echo: insufficient_quota")


async def test_the_kernel_takes_little_for_a_caller_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On loopback it would take megabytes, and the caller would have to pay for them."""
    world, said = make_world(), 0

    async def endless(call: EchoCall, bill: Bill) -> AsyncIterator[bytes]:
        nonlocal said
        while True:
            said += 1
            yield b"x" * 1_000

    monkeypatch.setattr(EchoCall, "parts", endless)
    async with echoing(world) as port:
        with socket.socket() as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            caller.connect(("127.0.0.1", port))
            caller.sendall(request(path="/echo", body=WORDS, key=GOOD_KEY))
            async with asyncio.timeout(5):
                while not said:
                    await asyncio.sleep(0.01)
                before = -1
                while said != before:
                    before = said
                    await asyncio.sleep(0.1)
    assert said < 100
