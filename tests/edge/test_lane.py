"""The lane takes what is ordinary, and means by it what the general server means; all else is the general server's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.edge import lane as module
from embedmesh.edge import server as server_module
from embedmesh.edge.exchange import Exchange, GeneralExchange
from embedmesh.edge.lane import Lane, read_head
from embedmesh.edge.receive import BodyBudget
from embedmesh.edge.server import HttpServer
from embedmesh.rules.errors import InvalidApiKey
from embedmesh.rules.ports import Reply
from tests.edge.http import Raw, read_reply, request, send, serving

LINE = b"POST /v1/embeddings HTTP/1.1\r\n"
ROOM = 1_000_000
SHOWN = ("authorization", "idempotency-key", "x-stainless-retry-count", "x-request-id", "user-agent", "x-odd")


class Service:
    """One handler behind both ways: it says what it was asked. `lane` counts how often the lane was taken."""

    def __init__(self, *, with_lane: bool = True) -> None:
        self.bodies = BodyBudget(ROOM)
        self.on_lane = self.bugs = self.cancelled = self.broken = 0
        self.hold: asyncio.Event | None = None
        lane = Lane(LINE, self._by_lane, self.bodies) if with_lane else None
        routes = {"/v1/embeddings": {"POST": self._general}, "/health": {"GET": self._health}}
        self.server = HttpServer(routes, on_internal_error=self._bug, lane=lane)

    def free(self) -> int:
        return ROOM - self.bodies._free_bytes

    def _bug(self) -> None:
        self.bugs += 1

    async def _by_lane(self, exchange: Exchange) -> None:
        self.on_lane += 1
        await self._handle(exchange)

    async def _general(self, asked: web.BaseRequest) -> web.StreamResponse:
        response = web.Response(headers={"Content-Type": "application/json"})
        exchange = GeneralExchange(asked, self.bodies, response)
        try:
            await self._handle(exchange)
        finally:
            exchange.end()
        return response

    async def _health(self, asked: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"well")

    async def _handle(self, exchange: Exchange) -> None:
        try:
            if exchange.header("authorization") == "Bearer wrong":
                raise InvalidApiKey("no")
            body = await exchange.body()
            if body == b"bug":
                raise KeyError("the secret value")
            if self.hold is not None:
                await self.hold.wait()
            large = int(body[5:]) if body.startswith(b"large") else 0
            said = {name: exchange.header(name) for name in SHOWN}
            await exchange.deliver(Reply({"x-said": repr(said)}, body + b"x" * large))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except ConnectionError:
            self.broken += 1
            raise


@asynccontextmanager
async def connected(service: Service) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with serving(service.server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.close()


async def answer(reader: asyncio.StreamReader) -> Raw:
    async with asyncio.timeout(5):
        return await read_reply(reader)


async def until(what: object, *, within_s: float = 3.0) -> None:
    async with asyncio.timeout(within_s):
        while not what():  # type: ignore[operator]
            await asyncio.sleep(0.005)


def same(one: Raw, other: Raw) -> None:
    """Apart from the time and ids of our own."""
    assert (one.status, one.body) == (other.status, other.body)
    own = ("date", "x-request-id")
    assert {k: v for k, v in one.headers.items() if k not in own} == {
        k: v for k, v in other.headers.items() if k not in own
    }
    assert set(one.headers) == set(other.headers)


async def both(raw: bytes) -> tuple[bool, Raw, Raw]:
    """Whether the lane took it, and what is said with and without one."""
    service, plain = Service(), Service(with_lane=False)
    async with serving(service.server) as port, serving(plain.server) as general:
        replies = await asyncio.gather(send(port, raw), send(general, raw))
    assert service.bugs == plain.bugs
    assert (service.free(), plain.free()) == (0, 0)
    return bool(service.on_lane), *replies


# -- what it takes, and what it means ----------------------------------------------------------------------------------

BODY = b'{"a":1}'
ORDINARY = {
    "plain": request(body=BODY),
    "an SDK's": request(
        body=BODY, user_agent="OpenAI/Python 2.1", x_stainless_retry_count="1", Connection="keep-alive"
    ),
    "a charset": request(body=BODY, content_type="application/json; charset=utf-8"),
    "white space around values": request(body=BODY, x_odd=" \t two  words \t "),
    "an empty value": request(body=BODY, x_odd=""),
    "an empty body": request(body=b""),
    "names in any case": request(body=BODY).replace(b"Content-Length", b"CONTENT-length"),
    "a sane id": request(body=BODY, x_request_id="mine-1"),
    "another id": request(body=BODY, x_request_id="not sane"),
    "a wrong key": request(body=BODY, key="wrong"),
}


@pytest.mark.parametrize("raw", ORDINARY.values(), ids=ORDINARY)
async def test_what_is_ordinary_takes_the_lane_and_means_the_same(raw: bytes) -> None:
    taken, by_lane, general = await both(raw)
    assert taken
    same(by_lane, general)
    kept = "mine-1" if b"mine-1" in raw else None
    assert (by_lane.headers["x-request-id"] == kept) == (kept is not None)


def head(*lines: str, body: bytes = BODY, line: bytes = LINE) -> bytes:
    usual = ["Host: a", f"Content-Length: {len(body)}", "Content-Type: application/json"]
    return line + "\r\n".join([*usual, *lines]).encode("latin-1") + b"\r\n\r\n" + body


OTHERS = {
    "two lengths": head("Content-Length: 7"),
    "two hosts": head("Host: b"),
    "a field twice": head("X-Odd: 1", "x-odd: 2"),
    "chunked": LINE + b"Host: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both framings": head("Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "a folded line": head("X-Odd: 1\r\n 2"),
    "a bare line feed": head("X-Odd: 1\nX-Other: 2"),
    "a NUL": head("X-Odd: a\0b"),
    "a control byte": head("X-Odd: a\x01b"),
    "a byte beyond ASCII": head("X-Odd: \xe9"),
    "a space before the colon": head("X-Odd : 1"),
    "no colon": head("X-Odd"),
    "no name": head(": 1"),
    "a leading zero": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: 07"),
    "a plus sign": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: +7"),
    "a negative length": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: -7"),
    "no length": request(body=b"").replace(b"Content-Length: 0\r\n", b""),
    "no host": request(body=BODY).replace(b"Host: test\r\n", b""),
    "the last on its connection": head("Connection: close"),
    "an upgrade": head("Connection: upgrade", "Upgrade: websocket"),
    "it wants to be told to go on": head("Expect: 100-nothing"),
    "compressed": head("Content-Encoding: gzip"),
    "HTTP/1.0": head(line=b"POST /v1/embeddings HTTP/1.0\r\n"),
    "a whole address": head(line=b"POST http://a/v1/embeddings HTTP/1.1\r\n"),
    "a query": head(line=b"POST /v1/embeddings?x=1 HTTP/1.1\r\n"),
    "two spaces": head(line=b"POST  /v1/embeddings HTTP/1.1\r\n"),
    "a method in small letters": head(line=b"post /v1/embeddings HTTP/1.1\r\n"),
    "another type": request(body=BODY, content_type="text/plain"),
    "no type": request(body=BODY, content_type=None),
    "another charset": request(body=BODY, content_type="application/json; charset=latin-1"),
    "many fields": head(*(f"X-{number}: 1" for number in range(70))),
    "a large body": request(body=b"a" * (module.BODY_BYTES_MAX + 1)),
    "a long line": head("X-Odd: " + "a" * 9_000),
    "half a head and then an end": head("X-Odd: 1")[:40] + b"\r\n\r\n",
}


@pytest.mark.parametrize("raw", OTHERS.values(), ids=OTHERS)
async def test_everything_else_is_answered_as_without_a_lane(raw: bytes) -> None:
    assert read_head(raw, LINE) is None
    taken, with_lane, without = await both(raw)
    assert not taken
    same(with_lane, without)


NAMES = st.sampled_from(
    ["X-Odd", "x-odd", "Host", "Content-Length", "Content-Type", "Connection", "TE", "", "a b", "é"]
)
VALUES = st.one_of(
    st.sampled_from(
        ["a", "7", "+7", "07", "keep-alive", "close", "application/json", "chunked", "", " ", "\t x", "\x7f"]
    ),
    st.text(alphabet=st.characters(max_codepoint=255), max_size=6),
)
COLONS = st.sampled_from([": ", ":", " : ", ":\t"])
ENDS = st.sampled_from(["\r\n", "\r\n", "\r\n", "\n", "\r"])


@given(st.lists(st.tuples(NAMES, COLONS, VALUES, ENDS), max_size=5), st.booleans())
def test_whatever_it_takes_the_general_parser_reads_alike(fields: list[tuple[str, str, str, str]], usual: bool) -> None:
    """The same fields, the same length, and the body at the same place."""
    lines = ["Host: a\r\n", "Content-Length: 7\r\n", "Content-Type: application/json\r\n"] if usual else []
    lines += ["".join(each) for each in fields]
    raw = LINE + "".join(lines).encode("latin-1") + b"\r\n" + BODY
    found = read_head(raw, LINE)
    if found is not None:
        names, length = asyncio.run(_as_aiohttp_reads(raw))
        assert (dict(found.fields), found.length) == (names, length)
        assert raw[found.end :] == BODY


async def _as_aiohttp_reads(raw: bytes) -> tuple[dict[str, str], int]:
    read: list[tuple[dict[str, str], int]] = []

    async def handler(asked: web.BaseRequest) -> web.StreamResponse:
        body = await asked.read()
        read.append(({name.lower(): value for name, value in asked.headers.items()}, len(body)))
        return web.Response(body=b"")

    async with serving(HttpServer({"/v1/embeddings": {"POST": handler}})) as port:
        assert (await send(port, raw)).status == 200
    return read[0]


# -- a connection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", ["one", "head and body", "byte by byte"])
async def test_a_body_may_come_in_pieces(pieces: str) -> None:
    service, raw = Service(), request(body=BODY)
    end = raw.index(b"\r\n\r\n") + 4
    cuts = {"one": [len(raw)], "head and body": [end, len(raw)], "byte by byte": [*range(end, len(raw) + 1)]}[pieces]
    async with connected(service) as (reader, writer):
        for _ in range(3):
            for start, stop in zip([0, *cuts], cuts, strict=False):
                writer.write(raw[start:stop])
                await writer.drain()
                await asyncio.sleep(0.003 if len(cuts) > 1 else 0)
            assert (await answer(reader)).body == BODY
    assert service.on_lane == 3


async def test_requests_that_are_sent_together_are_answered_in_order() -> None:
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(b"".join(request(body=b"%d" % number) for number in range(30)))
        assert [(await answer(reader)).body for _ in range(30)] == [b"%d" % number for number in range(30)]
    assert service.on_lane == 30


async def test_other_requests_may_follow_on_its_connection() -> None:
    """From then on the connection is the general server's."""
    service = Service()
    async with connected(service) as (reader, writer):
        for raw, body in (
            (request(body=b"1"), b"1"),
            (request("GET", "/health"), b"well"),
            (request(body=b"2"), b"2"),
        ):
            writer.write(raw)
            assert (await answer(reader)).body == body
    assert service.on_lane == 1


async def test_many_bytes_behind_a_request_are_not_taken_in() -> None:
    service = Service()
    service.hold = asyncio.Event()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"first"))
        await until(lambda: service.on_lane)
        more = request(body=b"b" * 50_000)
        for _ in range(40):
            writer.write(more)
        await asyncio.sleep(0.1)
        assert writer.transport.get_write_buffer_size() > 0 or len(more) * 40 < 4_000_000
        service.hold.set()
        for _ in range(41):
            assert (await answer(reader)).status == 200


async def test_who_hangs_up_is_worked_for_no_more() -> None:
    service = Service()
    service.hold = asyncio.Event()
    async with connected(service) as (_, writer):
        writer.write(request(body=BODY))
        await until(lambda: service.on_lane)
        assert service.free() == len(BODY)
        writer.close()
        await until(lambda: service.cancelled)
        assert service.free() == 0


async def test_who_hangs_up_in_the_middle_of_a_body() -> None:
    service = Service()
    async with connected(service) as (_, writer):
        writer.write(request(body=BODY)[:-3])
        await until(lambda: service.on_lane)
        writer.close()
        await until(lambda: service.cancelled)
        assert service.free() == 0


async def test_a_body_that_is_late_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_S", 0.1)
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=BODY)[:-3])
        late = await answer(reader)
        assert (late.status, late.error["code"], late.headers["connection"]) == (408, "request_timeout", "close")
        assert await reader.read() == b""
    assert service.free() == 0


async def test_a_refusal_does_not_wait_for_the_body() -> None:
    """The rest is read, and the connection is good for the next request."""
    service, raw = Service(), request(body=BODY, key="wrong")
    async with connected(service) as (reader, writer):
        writer.write(raw[:-3])
        assert (await answer(reader)).error["code"] == "invalid_api_key"
        writer.write(raw[-3:] + request(body=b"next"))
        assert (await answer(reader)).body == b"next"
    assert (service.on_lane, service.free()) == (2, 0)


async def test_a_rest_that_never_comes_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_S", 0.1)
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=BODY, key="wrong")[:-3])
        assert (await answer(reader)).status == 401
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await answer(reader)
    assert service.free() == 0


async def test_a_reply_that_is_not_read_is_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_REPLY_S", 0.2)
    service = Service()
    async with connected(service) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request(body=b"large%d" % 30_000_000))
        await until(lambda: service.broken or service.cancelled)
    assert (service.bugs, service.free()) == (0, 0)


async def test_a_large_reply_that_is_read_is_delivered() -> None:
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"large%d" % 8_000_000))
        assert len((await answer(reader)).body) > 8_000_000
        writer.write(request(body=b"next"))
        assert (await answer(reader)).body == b"next"
    assert service.on_lane == 2


async def test_a_bug_is_told_as_one_and_counted() -> None:
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"bug") + request(body=b"next"))
        failed = await answer(reader)
        assert (failed.status, failed.error["code"]) == (500, "internal_error")
        assert b"secret" not in failed.body
        assert (await answer(reader)).body == b"next"
    assert (service.bugs, service.free()) == (1, 0)


async def test_without_room_for_its_body_the_general_server_says_so() -> None:
    service = Service()
    service.bodies.take(ROOM)
    async with connected(service) as (reader, writer):
        writer.write(request(body=BODY))
        assert (await answer(reader)).error["code"] == "overloaded"
    assert service.on_lane == 0


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "KEEP_ALIVE_S", 0.3)
    service = Service()
    service.hold = asyncio.Event()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"busy"))
        await asyncio.sleep(0.8)
        service.hold.set()
        assert (await answer(reader)).body == b"busy"
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(3):
            assert await reader.read() == b""
        assert asyncio.get_running_loop().time() - began >= 0.25


async def test_draining_ends_what_runs_and_closes_what_is_idle() -> None:
    service = Service()
    service.hold = asyncio.Event()
    async with serving(service.server) as port:
        idle, _ = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(body=b"runs"))
        await until(lambda: service.on_lane)
        draining = asyncio.create_task(service.server.drain(3))
        await asyncio.sleep(0.05)
        service.hold.set()
        assert (await answer(reader)).body == b"runs"
        await draining
        assert await reader.read() == b""
        assert await idle.read() == b""


async def test_what_takes_too_long_is_broken_off_by_draining() -> None:
    service = Service()
    service.hold = asyncio.Event()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"runs"))
        await until(lambda: service.on_lane)
        async with asyncio.timeout(2):
            await service.server.drain(0.1)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await answer(reader)
        await until(lambda: service.cancelled)
    assert service.free() == 0
