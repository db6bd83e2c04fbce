"""A node dials every gateway behind its gateway's name, also those that come later, and lets go of those that leave."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import pytest

from embedmesh.http.server import HttpServer
from embedmesh.node import dialling
from embedmesh.node.dialling import DialOut
from embedmesh.rules.limits import DIALLED_CONNECTIONS
from tests.gateway.mesh import until

FIRST, SECOND = "127.0.0.1", "127.0.0.2"  # two gateways of one name: the same port on two addresses


class DialledGateways:
    """Take every connection, as gateways do, and count those that are open by the address that was dialled."""

    def __init__(self) -> None:
        self.open: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = writer.get_extra_info("sockname")[0]
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"\r\nHost: gateways.example:" in head, "the name is what the gateway hears, not its address"
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            self.open[address] += 1
            await reader.read()
            self.open[address] -= 1
        writer.close()


@contextlib.asynccontextmanager
async def listening(gateways: DialledGateways) -> AsyncIterator[int]:
    """On both addresses; yields the port."""
    first = await asyncio.start_server(gateways.serve, FIRST, 0)
    port: int = first.sockets[0].getsockname()[1]
    second = await asyncio.start_server(gateways.serve, SECOND, port)
    try:
        yield port
    finally:
        first.close()
        second.close()


async def test_every_gateway_of_the_name_is_dialled_also_one_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a gateway that has just started would have no node as long as nodes are content with the others."""
    monkeypatch.setattr(dialling, "LOOK_UP_S", 0.01)
    names: list[Sequence[str]] = [[FIRST]]
    looked_up = 0

    async def find(host: str, port: int) -> Sequence[str]:
        nonlocal looked_up
        looked_up += 1
        if not names[0]:
            raise OSError("no name server answers")
        return names[0]

    gateways = DialledGateways()
    async with listening(gateways) as port:
        out = DialOut(f"http://gateways.example:{port}", HttpServer({}), find)
        out.start("node_1", lambda method, path, body: {})
        try:
            await until("the first is dialled", lambda: gateways.open[FIRST] == DIALLED_CONNECTIONS)
            names[0] = [FIRST, SECOND]
            await until("so is the second", lambda: gateways.open[SECOND] == DIALLED_CONNECTIONS)
            names[0], looked_up = [], 0
            await until("the name server was asked again, in vain", lambda: looked_up > 2)
            assert gateways.open == {FIRST: DIALLED_CONNECTIONS, SECOND: DIALLED_CONNECTIONS}
            out.leave()
        finally:
            await out.stop()
        await until("all connections are closed", lambda: not gateways.open.total())


async def test_an_address_that_the_name_has_no_longer_is_not_dialled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections live on until the gateway ends them: it may be draining."""
    monkeypatch.setattr(dialling, "LOOK_UP_S", 0.01)
    monkeypatch.setattr(dialling, "REDIAL_MIN_S", 0.01)
    names: list[Sequence[str]] = [[FIRST, SECOND]]
    dialled: Counter[str] = Counter()
    ending = asyncio.Event()

    async def find(host: str, port: int) -> Sequence[str]:
        return names[0]

    class Leaving(DialledGateways):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            address = writer.get_extra_info("sockname")[0]
            dialled[address] += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            if address == SECOND:
                await ending.wait()
            else:
                await reader.read()
            writer.close()

    async with listening(Leaving()) as port:
        out = DialOut(f"http://gateways.example:{port}", HttpServer({}), find)
        out.start("node_1", lambda method, path, body: {})
        try:
            await until("both are dialled", lambda: min(dialled[FIRST], dialled[SECOND]) == DIALLED_CONNECTIONS)
            names[0] = [FIRST]
            await until("it is noticed", lambda: out._wanted == {FIRST})
            ending.set()
            await until("its connections have ended", lambda: SECOND not in out._tasks)
        finally:
            await out.stop()
    assert dialled[SECOND] == DIALLED_CONNECTIONS
