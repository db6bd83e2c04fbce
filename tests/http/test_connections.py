"""Over the bound the connection that has been idle longest goes; one address leaves room for others."""

import asyncio
import contextlib
import random
import resource
from collections.abc import Callable

import pytest
from aiohttp import web
from embedmesh.rules.exchange import Reply

from embedmesh.gateway.network import parsed
from embedmesh.http.connections import LOCAL_ORIGIN, Connections, Origins
from embedmesh.http.exchange import Exchange
from embedmesh.http.fast_path import FastPath
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.rules.errors import SetupError
from tests.http.raw import read_reply, request, serving

# -- who is behind a connection ----------------------------------------------------------------------------------------

PEERS = [
    (("192.0.2.1", 5), "192.0.2.1"),
    (("2001:db8:1:2:3:4:5:6", 5, 0, 0), "2001:db8:1:2::/64"),
    (("2001:db8:1:2:ffff::", 5, 0, 0), "2001:db8:1:2::/64"),
    (("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1"),
    (("127.0.0.1", 5), "127.0.0.1"),
    (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
    (("10.1.2.3", 5), None),  # a trusted proxy
    (("::ffff:10.1.2.3", 5, 0, 0), None),
    ("", None),  # a Unix socket
    (None, None),
]


@pytest.mark.parametrize(("peer", "origin"), PEERS)
def test_a_connection_is_of_an_address_or_of_the_network_that_one_person_has(peer: object, origin: str | None) -> None:
    assert Origins(["10.0.0.0/8"]).of_peer(peer) == origin


FORWARDED = [
    ("192.0.2.9", "192.0.2.9"),
    ("192.0.2.1, 192.0.2.9", "192.0.2.9"),  # what stands before, anybody may have sent
    ("192.0.2.9,2001:db8::1", "2001:db8::/64"),
    ("junk, unknown", LOCAL_ORIGIN),
    ("", LOCAL_ORIGIN),
    (None, LOCAL_ORIGIN),
]


@pytest.mark.parametrize(("forwarded", "origin"), FORWARDED)
def test_a_trusted_proxy_says_who_is_behind_it_and_nobody_else_does(forwarded: str | None, origin: str) -> None:
    origins = Origins(["10.0.0.0/8"])
    assert origins.of(("10.1.2.3", 5), forwarded) == origin
    assert origins.of(("192.0.2.1", 5), forwarded) == "192.0.2.1"


def test_what_is_no_network_is_told_with_the_setting_to_mend() -> None:
    with pytest.raises(SetupError, match=r"10\.0\.0\.1/8.*Mend --trusted-proxies"):
        parsed(Origins, ["10.0.0.1/8"], "--trusted-proxies")


# -- which one goes ----------------------------------------------------------------------------------------------------


class Scripted:
    """A connection that is idle since, or busy (None)."""

    def __init__(self, since: float | None) -> None:
        self.since = since
        self.closed = False

    def idle_since(self) -> float | None:
        return self.since

    def force_close(self) -> None:
        self.closed = True


def test_the_one_that_has_been_idle_longest_goes_for_a_new_one() -> None:
    """Whenever it was made; one in the middle of a request stays, and where all are the new one is refused."""
    connections = Connections(4)
    all_of = [Scripted(float(number)) for number in range(4)]
    for number, one in enumerate(all_of):
        assert connections.made(one, f"origin {number}", float(number))
    all_of[0].since = None
    all_of[1].since = 9.0
    for now, goes in ((10.0, 2), (11.0, 3), (12.0, 1)):
        assert connections.made(Scripted(None), f"origin at {now}", now)
        assert [one.closed for one in all_of].count(True) == (2, 3, 1).index(goes) + 1
        assert all_of[goes].closed
    assert not all_of[0].closed
    assert not connections.made(Scripted(None), "another", 13.0)
    connections.lost(all_of[0])
    assert connections.made(Scripted(None), "another", 14.0)


def test_one_origin_leaves_room_for_others_and_replaces_its_own() -> None:
    connections = Connections(100)
    honest = [Scripted(0.0) for _ in range(3)]
    for one in honest:
        connections.made(one, "honest", 0.0)
    greedy = [Scripted(float(number)) for number in range(1, 1_000)]
    assert all(connections.made(one, "greedy", one.since) for one in greedy)
    still_open = [one for one in greedy if not one.closed]
    assert len(still_open) < 85
    assert still_open == greedy[-len(still_open) :]
    for number in range(12):
        assert connections.made(Scripted(None), f"another {number}", 2_000.0)
    assert not any(one.closed for one in honest)


def test_an_origin_whose_own_are_all_busy_gets_no_more() -> None:
    connections = Connections(100)
    mine = 0
    while connections.made(Scripted(None), "greedy", 0.0):
        mine += 1
    assert 75 < mine < 85
    assert connections.made(Scripted(None), "honest", 0.0)


def test_what_has_no_origin_has_no_share_but_all() -> None:
    """A trusted proxy's connections, and those of a Unix socket."""
    connections = Connections(100)
    assert sum(connections.made(Scripted(None), None, 0.0) for _ in range(200)) == 100


def test_there_are_never_more_than_there_are_files_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are left for the store and for nodes: without them all would end."""
    for files, most in ((1_024, 768), (10**6, 8_192), (resource.RLIM_INFINITY, 8_192)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, files=files: (files, files))
        connections = Connections()
        assert sum(connections.made(Scripted(None), None, 0.0) for _ in range(9_000)) == most


def test_who_goes_is_found_as_by_looking_at_all() -> None:
    """Whatever they do meanwhile, and nothing is kept of those that are closed."""
    dice = random.Random(7)
    connections = Connections(30)
    there: list[Scripted] = []
    for turn in range(3_000):
        now = float(turn)
        for one in dice.sample(there, k=min(3, len(there))):
            one.since = dice.choice([None, now])
        if there and dice.random() < 0.3:
            connections.lost(there.pop(dice.randrange(len(there))))
        idle = [one for one in there if one.since is not None]
        longest = min((one.since for one in idle), default=None)
        new = Scripted(now)
        full = len(there) == 30
        assert connections.made(new, None, now) == (not full or bool(idle))
        if full and idle:
            [gone] = [one for one in there if one.closed]
            assert gone.since == longest
            there.remove(gone)
        there.append(new)
        assert len(connections._origins) == len(there) <= 30
        assert len(connections._all._heap) <= 2 * 30 + 17
    for one in there:
        connections.lost(one)
    assert (connections._origins, dict(connections._of)) == ({}, {})


# -- over real sockets -------------------------------------------------------------------------------------------------

LINE = b"POST /fast_path HTTP/1.1\r\n"


class Service:
    """Answers at once, or when `gate` is opened, by the fast path and by the general server."""

    def __init__(self, connections_max: int) -> None:
        self.gate = asyncio.Event()
        self.running = 0
        bodies = BodyBudget(1_000)
        self.connections = Connections(connections_max)

        async def on_fast_path(exchange: Exchange) -> None:
            await self._wait()
            await exchange.deliver(Reply({}, b"{}"))

        async def slow(asked: web.BaseRequest) -> web.StreamResponse:
            await self._wait()
            return web.Response(body=b"{}")

        async def quick(asked: web.BaseRequest) -> web.StreamResponse:
            return web.Response(body=b"{}")

        self.server = HttpServer(
            {"/slow": {"GET": slow}, "/quick": {"GET": quick}},
            fast_path=FastPath(LINE, on_fast_path, bodies),
            connections=self.connections,
            origins=Origins(["127.0.0.0/8"]),  # or the three would be too many of one address
        )

    async def _wait(self) -> None:
        self.running += 1
        await self.gate.wait()


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not what():
            await asyncio.sleep(0.002)


async def test_a_connection_that_is_idle_goes_and_those_in_a_request_stay() -> None:
    service = Service(3)
    async with serving(service.server) as port:
        on_fast_path, general, idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        idle[1].write(request("GET", "/quick"))
        assert (await read_reply(idle[0])).status == 200
        on_fast_path[1].write(request(path="/fast_path", body=b"{}"))
        general[1].write(request("GET", "/slow"))
        await until(lambda: service.running == 2)
        new = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            assert await idle[0].read() == b""
        new[1].write(request("GET", "/slow"))
        await until(lambda: service.running == 3)
        refused = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert await refused[0].read() == b""
        service.gate.set()
        for reader, writer in (on_fast_path, general, new):
            async with asyncio.timeout(5):
                assert (await read_reply(reader)).status == 200
            writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /quick HT", b"POST /fast_path HTTP/1.1\r\nHost: a\r\n"])
async def test_who_sends_no_head_is_idle(sent: bytes) -> None:
    """Half a head is no request: it holds nobody out."""
    service = Service(2)
    async with serving(service.server) as port:
        first = await asyncio.open_connection("127.0.0.1", port)
        first[1].write(sent)
        second = await asyncio.open_connection("127.0.0.1", port)
        second[1].write(request("GET", "/quick"))
        assert (await read_reply(second[0])).status == 200
        third = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            assert await first[0].read() == b""
        for reader, writer in (second, third):
            writer.write(request("GET", "/quick"))
            assert (await read_reply(reader)).status == 200
            writer.close()


@pytest.mark.parametrize("path", ["/fast_path", "/refused"])
async def test_who_was_answered_and_still_sends_is_idle(path: str) -> None:
    """What still comes of its body is read for nobody."""
    service = Service(2)
    service.gate.set()
    async with serving(service.server) as port:
        first = await asyncio.open_connection("127.0.0.1", port)
        first[1].write(request(path=path, body=b"x" * 1_000)[:-1])
        assert (await read_reply(first[0])).status in (200, 404)
        second = await asyncio.open_connection("127.0.0.1", port)
        second[1].write(request("GET", "/quick"))
        assert (await read_reply(second[0])).status == 200
        third = await asyncio.open_connection("127.0.0.1", port)
        third[1].write(request("GET", "/quick"))
        assert (await read_reply(third[0])).status == 200
        assert len(service.connections._origins) == 2
        second[1].write(request("GET", "/quick"))
        assert (await read_reply(second[0])).status == 200
        for _, writer in (first, second, third):
            writer.close()


async def test_who_does_not_read_a_page_is_cut_off() -> None:
    """It is in the middle of a request, and would never be closed for another."""
    ended = asyncio.Event()

    async def large(asked: web.BaseRequest) -> web.StreamResponse:
        asked.task.add_done_callback(lambda _: ended.set())
        return web.Response(body=b"x" * 50_000_000)

    connections = Connections()
    server = HttpServer({"/large": {"GET": large}}, write_s=0.2, connections=connections)
    async with serving(server) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(request("GET", "/large"))
        async with asyncio.timeout(5):
            await ended.wait()
        await until(lambda: not connections._origins)
        writer.close()
