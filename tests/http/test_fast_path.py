"""The fast path takes ordinary requests and reads them as the general server does; all else is the general server's."""

import asyncio
import functools
import inspect
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import uvloop
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embedmesh.http import fast_path as module
from embedmesh.http.exchange import Exchange, GeneralExchange
from embedmesh.http.fast_path import FastExchange, FastPath, read_head
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.rules import limits
from embedmesh.rules.errors import InvalidApiKey
from embedmesh.rules.exchange import Delivery, Reply
from embedmesh.rules.limits import WRITE_REPLY_S
from embedmesh.rules.shares import Room
from embedmesh.rules.traces import asking_as, traceparent_line, traceparent_of
from tests.data import quick_or
from tests.http.raw import Raw, read_reply, request, send, serving

LINE = b"POST /v1/embeddings HTTP/1.1\r\n"
ROOM = 1_000_000
SHOWN = ("authorization", "idempotency-key", "x-stainless-retry-count", "x-request-id", "user-agent", "x-odd")


def on_each_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    """The test holds on the loop that the gateway runs on, and on the standard one."""

    @functools.wraps(test)
    def run(loop: Callable[[], asyncio.AbstractEventLoop], **others: Any) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(test(**others))

    of_test = inspect.signature(test)
    own = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    vars(run)["__signature__"] = of_test.replace(parameters=[*of_test.parameters.values(), own])
    del vars(run)["__wrapped__"]
    loops = (asyncio.new_event_loop, uvloop.new_event_loop)
    return pytest.mark.parametrize("loop", loops, ids=["asyncio", "uvloop"])(run)


class Service:
    """One handler behind both ways: it says what it was asked. `fast_path` counts how often the fast path was taken."""

    def __init__(self, *, with_fast_path: bool = True, head_s: float = 10.0, write_s: float = WRITE_REPLY_S) -> None:
        self.bodies = BodyBudget(ROOM)
        self.on_fast_path = self.bugs = self.cancelled = self.broken = 0
        self.delivered: list[Delivery] = []
        self._write_s = write_s
        self.hold: asyncio.Event | None = None
        self.known = asyncio.Event()  # who asks
        self.known.set()
        self.before_reply: Callable[[], object] = lambda: None
        self.after_reply: Callable[[], object] = lambda: None
        fast_path = FastPath(LINE, self._by_fast_path, self.bodies, write_s=write_s) if with_fast_path else None
        routes = {"/v1/embeddings": {"POST": self._general}, "/health": {"GET": self._health}}
        self.server = HttpServer(routes, on_internal_error=self._bug, fast_path=fast_path, head_s=head_s)

    def taken(self) -> int:
        """Bytes of bodies that are in memory."""
        return self.bodies.taken

    def _bug(self) -> None:
        self.bugs += 1

    async def _by_fast_path(self, exchange: Exchange) -> None:
        self.on_fast_path += 1
        await self._handle(exchange)

    async def _general(self, asked: web.BaseRequest) -> web.StreamResponse:
        response = web.Response(headers={"Content-Type": "application/json"})
        exchange = GeneralExchange(asked, self.bodies, response, self._write_s)
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
            await self.known.wait()
            if exchange.header("authorization") == "Bearer unknown":
                raise InvalidApiKey("no")
            body = await exchange.body("a")
            if body == b"bug":
                raise KeyError("the secret value")
            if self.hold is not None:
                await self.hold.wait()
            large = int(body[5:]) if body.startswith(b"large") else 0
            said = {name: exchange.header(name) for name in SHOWN}
            self.before_reply()
            self.delivered.append(await exchange.deliver(Reply({"x-said": repr(said)}, body + b"x" * large)))
            self.after_reply()
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
    """Whether the fast path took it, and what is said with and without one."""
    service, plain = Service(), Service(with_fast_path=False)
    async with serving(service.server) as port, serving(plain.server) as general:
        replies = await asyncio.gather(send(port, raw), send(general, raw))
    assert service.bugs == plain.bugs
    assert (service.taken(), plain.taken()) == (0, 0)
    return bool(service.on_fast_path), *replies


OWN = re.compile(rb"(?<=\r\n)(Date: [^\r]*|x-request-id: req_[0-9a-f]+)(?=\r\n)", re.IGNORECASE)


async def transcript(port: int, raw: bytes) -> bytes:
    """All that comes back to these bytes, and then to one request more; without dates and ids of the server's own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = b""
    try:
        async with asyncio.timeout(5):
            writer.write(raw)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: ([0-9]+)", head.lower())
            said = head + await reader.readexactly(int(length[1]) if length else 0)
            writer.write(request("GET", "/health", Connection="close"))
            said += await reader.read()
    except ConnectionError:
        pass  # it had closed
    finally:
        writer.close()
    return OWN.sub(b"", said)


# -- what it takes, and what it means ----------------------------------------------------------------------------------

BODY = b'{"a":1}'


def head(*lines: str, body: bytes = BODY, line: bytes = LINE) -> bytes:
    usual = ["Host: a", f"Content-Length: {len(body)}", "Content-Type: application/json"]
    return line + "\r\n".join([*usual, *lines]).encode("latin-1") + b"\r\n\r\n" + body


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
    "white space around the length": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length:\t 7 \t"),
    "an empty host": request(body=BODY).replace(b"Host: test", b"Host:"),
    "as many fields as it takes": request(body=BODY, **{f"x_{number}": "1" for number in range(60)}),
    "the largest body that it takes": request(body=b"a" * module.FAST_BODY_BYTES_MAX),
    "a charset in capitals": request(body=BODY, content_type="APPLICATION/JSON;charset=UTF-8"),
    "a name of odd characters": head("!#$%&'*+-.^_`|~09Az: 1"),
}


@pytest.mark.parametrize("raw", ORDINARY.values(), ids=ORDINARY)
async def test_what_is_ordinary_takes_the_fast_path_and_means_the_same(raw: bytes) -> None:
    taken, by_fast_path, general = await both(raw)
    assert taken
    same(by_fast_path, general)
    kept = "mine-1" if b"mine-1" in raw else None
    assert (by_fast_path.headers["x-request-id"] == kept) == (kept is not None)


OTHERS = {
    "two lengths": head("Content-Length: 7"),
    "two hosts": head("Host: b"),
    "a field twice": head("X-Odd: 1", "x-odd: 2"),
    "chunked": LINE + b"Host: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both framings": head("Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "a folded line": head("X-Odd: 1\r\n 2"),
    "a folded line at the top": LINE + b" " + head("X-Odd: 1")[len(LINE) :],
    "chunks in a coding of another case": head("transfer-encoding: CHUNKED", body=b"0\r\n\r\n"),
    "another coding": head("Transfer-Encoding: identity"),
    "a trailer": head("Trailer: X-Odd"),
    "te": head("TE: trailers"),
    "a bare line feed": head("X-Odd: 1\nX-Other: 2"),
    "a carriage return alone": head("X-Odd: 1\rX-Other: 2"),
    "a carriage return twice": head("X-Odd: 1\r"),
    "a NUL": head("X-Odd: a\0b"),
    "a control byte": head("X-Odd: a\x01b"),
    "a deleted byte": head("X-Odd: a\x7fb"),
    "a NUL in a name": head("X-O\0dd: a"),
    "a control byte in the length": head("X-Odd: 1").replace(b"h: 7", b"h: 7\x0b"),
    "a byte beyond ASCII": head("X-Odd: \xe9"),
    "a space before the colon": head("X-Odd : 1"),
    "no colon": head("X-Odd"),
    "no name": head(": 1"),
    "a leading zero": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: 07"),
    "a plus sign": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: +7"),
    "a negative length": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: -7"),
    "a length in hexadecimal": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: 0x7"),
    "a length in two": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: 7, 7"),
    "a length with a space in it": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: 0 7"),
    "an empty length": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: "),
    "a length of many digits": request(body=BODY).replace(b"Content-Length: 7", b"Content-Length: " + b"9" * 30),
    "a length in other digits": head().replace(b"h: 7", b"h: \xd9\xa7"),
    "two same lengths": head("content-length: 7", "X-Odd: 1"),
    "no length": request(body=b"").replace(b"Content-Length: 0\r\n", b""),
    "no host": request(body=BODY).replace(b"Host: test\r\n", b""),
    "the last on its connection": head("Connection: close"),
    "the last among others": head("Connection: keep-alive, close"),
    "connection twice": head("Connection: keep-alive", "Connection: close"),
    "an upgrade without its word": head("Upgrade: h2c"),
    "an upgrade": head("Connection: upgrade", "Upgrade: websocket"),
    "the last, as old clients tell a proxy": head("Proxy-Connection: close"),
    "a field that the general server refuses": head("Sec-WebSocket-Key1: a"),
    "it wants to be told to go on": head("Expect: 100-nothing"),
    "compressed": head("Content-Encoding: gzip"),
    "HTTP/1.2": head(line=b"POST /v1/embeddings HTTP/1.2\r\n"),
    "HTTP/2": head(line=b"POST /v1/embeddings HTTP/2\r\n"),
    "a line that ends in a line feed": head(line=b"POST /v1/embeddings HTTP/1.1\n"),
    "an empty line first": b"\r\n" + head("X-Odd: 1"),
    "a path that means the same": head(line=b"POST /v1/%65mbeddings HTTP/1.1\r\n"),
    "a fragment": head(line=b"POST /v1/embeddings#x HTTP/1.1\r\n"),
    "HTTP/1.0": head(line=b"POST /v1/embeddings HTTP/1.0\r\n"),
    "a whole address": head(line=b"POST http://a/v1/embeddings HTTP/1.1\r\n"),
    "a query": head(line=b"POST /v1/embeddings?x=1 HTTP/1.1\r\n"),
    "two spaces": head(line=b"POST  /v1/embeddings HTTP/1.1\r\n"),
    "a method in small letters": head(line=b"post /v1/embeddings HTTP/1.1\r\n"),
    "types in two": request(body=BODY, content_type="application/json, text/plain"),
    "a type with another parameter": request(body=BODY, content_type="application/json; boundary=x"),
    "a quoted charset": request(body=BODY, content_type='application/json; charset="utf-8"'),
    "a type twice": head("content-type: text/plain"),
    "an empty type": request(body=BODY, content_type=""),
    "JSON of another kind": request(body=BODY, content_type="application/json-patch+json"),
    "another type": request(body=BODY, content_type="text/plain"),
    "no type": request(body=BODY, content_type=None),
    "another charset": request(body=BODY, content_type="application/json; charset=latin-1"),
    "one field too many": head(*(f"X-{number}: 1" for number in range(62))),
    "many fields": head(*(f"X-{number}: 1" for number in range(70))),
    "a large body": request(body=b"a" * (module.FAST_BODY_BYTES_MAX + 1)),
    "a long line": head("X-Odd: " + "a" * 9_000),
    "half a head and then an end": head("X-Odd: 1")[:40] + b"\r\n\r\n",
}


@pytest.mark.parametrize("raw", OTHERS.values(), ids=OTHERS)
async def test_everything_else_is_answered_as_without_a_fast_path(raw: bytes) -> None:
    assert read_head(raw, LINE) is None
    service, plain = Service(head_s=0.2), Service(with_fast_path=False, head_s=0.2)
    async with serving(service.server) as port, serving(plain.server) as general:
        with_fast_path, without = await asyncio.gather(transcript(port, raw), transcript(general, raw))
    assert (service.on_fast_path, service.taken()) == (0, 0)
    assert without.startswith(b"HTTP/1.")
    assert with_fast_path == without


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
        assert (dict(found.headers), found.length) == (names, length)
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


class Parser:
    """aiohttp's own, as its server uses it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self._loop.close()

    def read(self, raw: bytes) -> tuple[dict[str, str], bytes, list[str]]:
        """Fields and body of the first request, and the paths of all that it finds in these bytes."""
        parser = HttpRequestParser(
            BaseProtocol(self._loop), self._loop, 2**16, max_line_size=8_190, max_field_size=8_190, max_headers=128
        )
        messages, upgraded, _ = parser.feed_data(raw)
        assert not upgraded
        first, body = messages[0]
        assert (first.method, first.version, first.should_close) == ("POST", (1, 1), False)
        assert not (first.chunked or first.compression)
        fields = {name.lower(): value for name, value in first.headers.items()}
        assert len(fields) == len(first.headers)
        return fields, body.read_nowait() if body.total_bytes else b"", [each.path for each, _ in messages]


@pytest.fixture(scope="module")
def parser() -> Iterator[Parser]:
    made = Parser()
    yield made
    made.close()


NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"


def check_alike(raw: bytes, parser: Parser) -> bool:
    """Whether it takes these bytes; then the parser has to find the same fields and body, and what follows them."""
    found = read_head(raw, LINE)
    if found is None or len(raw) < found.end + found.length:
        return False
    whole = raw[: found.end + found.length]
    paths = ["/v1/embeddings", "/next"]
    assert parser.read(whole + NEXT) == (dict(found.headers), whole[found.end :], paths), raw
    return True


def test_each_byte_in_each_place_is_read_alike(parser: Parser) -> None:
    """Every byte there is, at the beginning, in the middle and at the end of a name and of a value."""
    places = ["X%sdd: 1", "%sOdd: 1", "X-Od%s: 1", "X-Odd%s 1", "X-Odd:%s1", "X-Odd: %sa", "X-Odd: a%sb", "X-Odd: a%s"]
    taken = [
        check_alike(head(place % chr(byte)), parser)
        for place in [*places, "X-Odd: 1%sX-Other: 2", "X-Odd: 1\r%s", "X-Odd: 1\r\n%sX-Other: 2"]
        for byte in range(256)
    ]
    assert 500 < sum(taken) < len(taken) / 2


@settings(max_examples=quick_or(300, quick=100), deadline=None)
@given(st.data())
def test_a_head_with_a_few_bytes_changed_is_read_alike_or_not_taken(parser: Parser, data: st.DataObject) -> None:
    raw = bytearray(ORDINARY["an SDK's"])
    bits = st.sampled_from(
        [b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b"0", b"7", b",", b";", b"\x80", b"a", b""]
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.one_of(bits, st.binary(max_size=2)))
    check_alike(bytes(raw), parser)


def test_what_is_declined_is_answered_as_without_a_fast_path_whatever_it_is() -> None:
    """And what is taken, apart from the order of the reply's fields."""

    def lines(answered: bytes) -> list[bytes]:
        return sorted(answered.split(b"\r\n"))

    async def compare(raw: bytes) -> None:
        before = service.on_fast_path
        with_fast_path, without = await asyncio.gather(*(transcript(port, raw) for port in ports))
        if service.on_fast_path == before:
            assert with_fast_path == without
        else:
            assert lines(with_fast_path) == lines(without)

    @settings(max_examples=quick_or(80, quick=30), deadline=None)
    @given(st.lists(st.tuples(NAMES, COLONS, VALUES, ENDS), max_size=3), st.booleans())
    def check(fields: list[tuple[str, str, str, str]], usual: bool) -> None:
        lengths = [value.strip() for name, _, value, _ in fields if name == "Content-Length"]
        assume(not any(value.isdigit() and value != "7" for value in lengths))  # a body that would not come
        first = ["Host: a\r\n", "Content-Length: 7\r\n", "Content-Type: application/json\r\n"] if usual else []
        runner.run(compare(LINE + "".join([*first, *map("".join, fields)]).encode("latin-1") + b"\r\n" + BODY))

    async def serve() -> tuple[Service, Service, list[int]]:
        services = Service(head_s=0.2), Service(with_fast_path=False, head_s=0.2)
        return *services, [await until_closed.enter_async_context(serving(each.server)) for each in services]

    with asyncio.Runner() as runner:
        until_closed = AsyncExitStack()
        service, plain, ports = runner.run(serve())
        try:
            check()
        finally:
            runner.run(until_closed.aclose())
    assert service.on_fast_path
    assert (service.taken(), plain.taken()) == (0, 0)


@pytest.mark.parametrize("filler", [" ", "\t", " \t", "a ", "a"])
@pytest.mark.parametrize("last", ["", "\x01"])
def test_a_long_line_is_read_in_no_time(filler: str, last: str) -> None:
    """Before anyone has said who they are: a line that took a second would stop everyone else for that long."""
    raw = head("X-Odd:" + filler * (7_900 // len(filler)) + last)
    began = time.perf_counter()
    assert (read_head(raw, LINE) is None) == bool(last)
    assert time.perf_counter() - began < 0.1


# -- a connection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", ["one", "head and body", "byte by byte"])
@on_each_loop
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
    assert service.on_fast_path == 3


@on_each_loop
async def test_requests_that_are_sent_together_are_answered_in_order() -> None:
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(b"".join(request(body=b"%d" % number) for number in range(30)))
        assert [(await answer(reader)).body for _ in range(30)] == [b"%d" % number for number in range(30)]
    assert service.on_fast_path == 30


@on_each_loop
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
    assert service.on_fast_path == 1


@on_each_loop
async def test_what_follows_in_the_same_write_is_for_whom_it_is_for() -> None:
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"1") + request("GET", "/health") + request(body=b"2") + request("GET", "/nowhere"))
        assert [(await answer(reader)).body for _ in range(3)] == [b"1", b"well", b"2"]
        assert (await answer(reader)).status == 404
    assert service.on_fast_path == 1


@on_each_loop
async def test_after_another_request_a_connection_is_the_general_servers() -> None:
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request("GET", "/health"))
        assert (await answer(reader)).body == b"well"
        for _ in range(2):
            writer.write(request(body=BODY))
            assert (await answer(reader)).body == BODY
    assert service.on_fast_path == 0


@on_each_loop
@pytest.mark.parametrize("cut", [1, len(LINE) - 1, len(LINE), -len(BODY) - 2])
async def test_a_head_in_two_pieces_is_answered_all_the_same(cut: int) -> None:
    service, raw = Service(), request(body=BODY)
    async with connected(service) as (reader, writer):
        writer.write(raw[:cut])
        await asyncio.sleep(0.01)
        writer.write(raw[cut:])
        assert (await answer(reader)).body == BODY
    assert (service.on_fast_path, service.taken()) == (0, 0)


@on_each_loop
async def test_many_bytes_behind_a_request_are_not_taken_in() -> None:
    service = Service()
    service.hold = asyncio.Event()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"first"))
        await until(lambda: service.on_fast_path)
        more = request(body=b"b" * 50_000)
        for _ in range(40):
            writer.write(more)
        await asyncio.sleep(0.1)
        assert writer.transport.get_write_buffer_size() > 0 or len(more) * 40 < 4_000_000
        service.hold.set()
        for _ in range(41):
            assert (await answer(reader)).status == 200


@on_each_loop
async def test_who_hangs_up_is_worked_for_no_more() -> None:
    service = Service()
    service.hold = asyncio.Event()
    async with connected(service) as (_, writer):
        writer.write(request(body=BODY))
        await until(lambda: service.on_fast_path)
        assert service.taken() == len(BODY)
        writer.close()
        await until(lambda: service.cancelled)
        assert service.taken() == 0


@on_each_loop
async def test_who_hangs_up_in_the_middle_of_a_body() -> None:
    service = Service()
    async with connected(service) as (_, writer):
        writer.write(request(body=BODY)[:-3])
        await until(lambda: service.on_fast_path)
        writer.close()
        await until(lambda: service.cancelled)
        assert service.taken() == 0


@on_each_loop
async def test_a_body_that_is_late_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_BODY_S", 0.1)
    monkeypatch.setattr(module, "REFUSED_BODY_S", 0.1)
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=BODY)[:-3])
        late = await answer(reader)
        assert (late.status, late.error["code"], late.headers["connection"]) == (408, "request_timeout", "close")
        assert await reader.read() == b""
    assert service.taken() == 0


@on_each_loop
async def test_the_rest_of_a_late_body_is_read_so_that_its_sender_sees_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "REQUEST_BODY_S", 0.1)
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=BODY)[:-3])
        await asyncio.sleep(0.2)
        writer.write(BODY[-3:-1])
        await asyncio.sleep(0.02)
        assert service.taken() == 0
        writer.write(BODY[-1:] + request(body=b"not read"))
        assert (await answer(reader)).status == 408
        assert await reader.read() == b""
    assert service.on_fast_path == 1


@on_each_loop
async def test_a_refusal_does_not_wait_for_the_body() -> None:
    """The rest is read, and the connection is good for the next request."""
    service, raw = Service(), request(body=BODY, key="wrong")
    async with connected(service) as (reader, writer):
        writer.write(raw[:-3])
        assert (await answer(reader)).error["code"] == "invalid_api_key"
        await until(lambda: not service.taken())  # nothing is kept of what is not wanted
        writer.write(raw[-3:] + request(body=b"next"))
        assert (await answer(reader)).body == b"next"
    assert (service.on_fast_path, service.taken()) == (2, 0)


@on_each_loop
async def test_a_rest_that_never_comes_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFUSED_BODY_S", 0.1)
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=BODY, key="wrong")[:-3])
        assert (await answer(reader)).status == 401
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await answer(reader)
    assert service.taken() == 0


@on_each_loop
@pytest.mark.parametrize("with_fast_path", [True, False])
async def test_a_reply_that_is_not_read_is_broken_off(with_fast_path: bool) -> None:
    service = Service(with_fast_path=with_fast_path, write_s=0.2)
    async with connected(service) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request(body=b"large%d" % 30_000_000))
        await until(lambda: service.delivered)
        assert (service.delivered, service.broken, service.cancelled) == ([Delivery.BROKEN_OFF], 0, 0)
        await until(lambda: not service.taken())
        assert service.bugs == 0


@on_each_loop
@pytest.mark.parametrize("with_fast_path", [True, False])
async def test_a_reply_whose_write_fails_is_not_delivered(with_fast_path: bool) -> None:
    """The caller has gone and we do not know yet: the kernel says so when we write. Nobody may be charged for it."""
    service = Service(with_fast_path=with_fast_path)
    async with serving(service.server) as port:
        caller = socket.create_connection(("127.0.0.1", port))

        def reset() -> None:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.close()

        service.before_reply = reset
        caller.sendall(request(body=BODY))
        await until(lambda: service.broken)
        await until(lambda: not service.taken())
    assert (service.on_fast_path, service.broken, service.cancelled, service.bugs) == (int(with_fast_path), 1, 0, 0)


@on_each_loop
@pytest.mark.parametrize("with_fast_path", [True, False])
async def test_who_hangs_up_before_all_of_a_reply_is_sent_broke_it_off(with_fast_path: bool) -> None:
    service = Service(with_fast_path=with_fast_path)
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"large%d" % 30_000_000))
        await reader.readexactly(1_000)
        writer.transport.abort()
        await until(lambda: service.delivered)
        assert (service.delivered, service.broken, service.cancelled) == ([Delivery.BROKEN_OFF], 0, 0)
        await until(lambda: not service.taken())
        assert service.bugs == 0


@on_each_loop
@pytest.mark.parametrize("with_fast_path", [True, False])
async def test_what_draining_breaks_off_is_not_delivered(with_fast_path: bool) -> None:
    """Though it had begun: that was us, and not the caller."""
    service = Service(with_fast_path=with_fast_path)
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"large%d" % 30_000_000))
        await reader.readexactly(1_000)
        await service.server.drain(0.05)
        await until(lambda: service.cancelled)
        assert (service.delivered, service.broken) == ([], 0)


@on_each_loop
async def test_a_large_reply_that_is_read_is_delivered() -> None:
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"large%d" % 8_000_000))
        assert len((await answer(reader)).body) > 8_000_000
        writer.write(request(body=b"next"))
        assert (await answer(reader)).body == b"next"
    assert (service.on_fast_path, service.delivered) == (2, [Delivery.WHOLE] * 2)


@on_each_loop
async def test_a_bug_is_told_as_one_and_counted() -> None:
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"bug") + request(body=b"next"))
        failed = await answer(reader)
        assert (failed.status, failed.error["code"]) == (500, "internal_error")
        assert b"secret" not in failed.body
        assert (await answer(reader)).body == b"next"
    assert (service.bugs, service.taken()) == (1, 0)


@on_each_loop
async def test_a_bug_after_the_reply_is_counted_and_adds_nothing_to_it() -> None:
    """What came after a whole reply would be taken for the answer to the next request."""
    service = Service()

    def bug() -> None:
        raise KeyError("the secret value")

    service.after_reply = bug
    async with connected(service) as (reader, writer):
        writer.write(request(body=BODY))
        assert (await answer(reader)).body == BODY
        async with asyncio.timeout(3):
            assert await reader.read() == b""
    assert (service.bugs, service.taken()) == (1, 0)


def crowd(bodies: BodyBudget, free: int) -> dict[str, int]:
    """Accounts that take all but so many bytes, and how many each has."""
    has: dict[str, int] = {}
    while left := ROOM - bodies.taken - free:
        has[f"other {len(has)}"] = size = min(left, max(1, (left + free) * 4 // 5))
        bodies.take(f"other {len(has) - 1}", size)
    return has


@on_each_loop
@pytest.mark.parametrize(("apart", "free"), [(0, 0), (1, 1), (len(BODY) - 1, len(BODY))])
async def test_without_room_for_its_body_it_is_told_so(apart: int, free: int) -> None:
    """As long as others have so much of the room that its own share of what is free is too small."""
    service = Service()
    others = crowd(service.bodies, free)
    whole = request(body=BODY)
    async with connected(service) as (reader, writer):
        writer.write(whole[: len(whole) - len(BODY) + apart])
        await asyncio.sleep(0.02)
        writer.write(whole[len(whole) - len(BODY) + apart :])
        refused = await answer(reader)
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        await until(lambda: service.taken() == ROOM - free)
        for other, size in others.items():
            service.bodies.give_back(other, size)
        writer.write(whole)
        assert (await answer(reader)).body == BODY
    assert (service.on_fast_path, service.taken()) == (2, 0)


@on_each_loop
async def test_only_what_has_come_of_a_body_takes_room() -> None:
    service = Service()
    async with connected(service) as (_, writer):
        writer.write(request(body=b"x" * 100_000)[: 200 - 100_000])
        await until(lambda: service.on_fast_path == 1 and service.taken() > 0)
        assert service.taken() == 200
    await until(lambda: service.taken() == 0)


@on_each_loop
@pytest.mark.parametrize(("key", "status"), [("good", 200), ("unknown", 401)])
async def test_until_it_is_known_who_asks_a_body_takes_no_room_and_is_not_read_on(key: str, status: int) -> None:
    """But for what came with the head, and one read more. Whoever it is, the connection's next request is heard."""
    service = Service()
    service.known.clear()
    whole = request(body=b"x" * 100_000, key=key)
    start = len(whole) - 100_000
    async with connected(service) as (reader, writer):
        writer.write(whole[: start + 10])
        await until(lambda: service.on_fast_path == 1)
        exchange: FastExchange = vars(next(iter(service.server._aiohttp.connections)))["_exchange"]
        for end, missing in ((20, 99_980), (30, 99_980), (40, 99_980)):
            writer.write(whole[start + end - 10 : start + end])
            await until(lambda missing=missing: exchange._missing == missing)
            await asyncio.sleep(0.01)
        assert (exchange._missing, service.taken()) == (99_980, 0)
        service.known.set()
        writer.write(whole[start + 40 :])
        assert (await answer(reader)).status == status
        writer.write(request(body=BODY))
        assert (await answer(reader)).body == BODY
    await until(lambda: service.taken() == 0)


@on_each_loop
async def test_half_bodies_of_one_account_are_few_enough_for_others_to_find_connections() -> None:
    """However little has come of each; whole ones wait for nothing."""
    service = Service()
    service.bodies.awaited = Room(2, "full")
    half = request(body=BODY)[:-1]
    async with connected(service) as (_, one), connected(service) as (reader, other):
        one.write(half)
        await until(lambda: service.bodies.awaited.taken == 1)
        service.bodies.awaited.take("another")
        other.write(half)
        assert (await answer(reader)).status == 503
        other.write(b"}" + request(body=BODY))
        assert (await answer(reader)).body == BODY
    await until(lambda: (service.taken(), service.bodies.awaited.taken) == (0, 1))


HEAD_S = 0.15


@on_each_loop
@pytest.mark.parametrize("sent", [b"", LINE, LINE + b"Host: a\r\n", LINE[:3]])
async def test_a_head_that_is_late_is_told_so(sent: bytes) -> None:
    service = Service(head_s=HEAD_S)
    async with connected(service) as (reader, writer):
        began = time.monotonic()
        writer.write(sent)
        late = await answer(reader)
        assert (late.status, late.error["code"], late.headers["connection"]) == (408, "request_timeout", "close")
        assert time.monotonic() - began >= HEAD_S * 0.9
        assert await reader.read() == b""


@on_each_loop
async def test_the_deadline_is_for_a_head_and_for_nothing_else() -> None:
    """Neither for what takes long, nor for who has nothing to ask now; again for the second head, once it begins."""
    service = Service(head_s=HEAD_S)
    service.hold = asyncio.Event()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"slow"))
        await asyncio.sleep(HEAD_S * 1.5)
        service.hold.set()
        assert (await answer(reader)).body == b"slow"
        await asyncio.sleep(HEAD_S * 1.5)
        writer.write(request(body=b"next"))
        assert (await answer(reader)).body == b"next"
        writer.write(LINE)
        assert (await answer(reader)).status == 408
    assert service.on_fast_path == 2


@on_each_loop
async def test_who_drips_a_body_is_told_that_it_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for the whole body."""
    monkeypatch.setattr(module, "REQUEST_BODY_S", 0.15)
    service, raw = Service(), request(body=b"a" * 1_000)
    async with connected(service) as (reader, writer):
        writer.write(raw[:-999])
        replying = asyncio.create_task(answer(reader))
        for byte in raw[-999:]:
            if replying.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
        assert (await replying).status == 408
    assert service.taken() == 0


@on_each_loop
async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEEP_ALIVE_S", 0.3)
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


@on_each_loop
async def test_draining_ends_what_runs_and_closes_what_is_idle() -> None:
    service = Service()
    service.hold = asyncio.Event()
    async with serving(service.server) as port:
        idle, silent = await asyncio.open_connection("127.0.0.1", port)
        used, asks = await asyncio.open_connection("127.0.0.1", port)
        service.hold.set()
        asks.write(request(body=b"before"))
        assert (await answer(used)).body == b"before"
        service.hold.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(body=b"runs"))
        await until(lambda: service.on_fast_path == 2)
        draining = asyncio.create_task(service.server.drain(3))
        await asyncio.sleep(0.05)
        service.hold.set()
        assert (await answer(reader)).body == b"runs"
        await draining
        assert await reader.read() == b""
        assert await idle.read() == b""
        assert await used.read() == b""
        for each in (silent, asks, writer):
            each.close()


@on_each_loop
@pytest.mark.parametrize("key", ["em_good", "wrong"])
async def test_draining_does_not_wait_for_a_body_for_ever(key: str) -> None:
    """Nor for the rest of one that was refused."""
    service = Service()
    async with connected(service) as (reader, writer):
        writer.write(request(body=BODY, key=key)[:-3])
        await until(lambda: service.on_fast_path)
        if key == "wrong":
            assert (await answer(reader)).status == 401
        async with asyncio.timeout(2):
            await service.server.drain(0.1)
            assert await reader.read() == b""
        assert (service.taken(), service.cancelled) == (0, int(key != "wrong"))


@on_each_loop
async def test_what_takes_too_long_is_broken_off_by_draining() -> None:
    service = Service()
    service.hold = asyncio.Event()
    async with connected(service) as (reader, writer):
        writer.write(request(body=b"runs"))
        await until(lambda: service.on_fast_path)
        async with asyncio.timeout(2):
            await service.server.drain(0.1)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await answer(reader)
        await until(lambda: service.cancelled)
    assert service.taken() == 0


@on_each_loop
async def test_a_request_knows_nothing_of_the_context_that_its_connection_was_made_in() -> None:
    """Such as the trace of a request that was under way then."""
    service, found = Service(), list[bytes]()
    service.before_reply = lambda: found.append(traceparent_line())
    with asking_as("req_1", traceparent_of(1, 2)):
        async with serving(service.server) as port:
            await send(port, request(body=BODY))
    assert (service.on_fast_path, found) == (1, [b""])
