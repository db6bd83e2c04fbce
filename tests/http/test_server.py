"""The HTTP server alone: deadlines for slow senders, one envelope for every refusal, no values in logs."""

import asyncio
import logging
import time
from collections.abc import Callable

import pytest
from aiohttp import web

from embedmesh.http.aiohttp_connection import READ_AHEAD_BYTES, deliver
from embedmesh.http.failures import hint_headers
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.routing import PATH_REMAINDER
from embedmesh.http.server import HttpServer
from embedmesh.rules.errors import Failure, RateLimited
from embedmesh.rules.ports import Delivery
from tests.http.raw import Raw, read_reply, request, send, serving

LIMIT = 10_000
SHORT_S = 0.3


class Echo:
    """Routes for the tests: echo a body, fail in a bug, take long."""

    def __init__(self, *, body_s: float = SHORT_S) -> None:
        self.body_s = body_s
        self.budget = BodyBudget(3 * LIMIT)
        self.bugs = 0
        self.cancelled = asyncio.Event()
        self.server = HttpServer(
            {
                "/echo": {"POST": self.echo},
                "/bug": {"GET": self.bug},
                "/long": {"GET": self.long},
                "/things/*": {"GET": self.thing},
            },
            on_internal_error=self.count_bug,
            head_s=SHORT_S,
        )

    def count_bug(self) -> None:
        self.bugs += 1

    async def echo(self, asked: web.BaseRequest) -> web.StreamResponse:
        whose = asked.headers.get("x-account", "")
        body = await read_body(asked, LIMIT, self.budget, whose, body_s=self.body_s)
        self.budget.give_back(whose, len(body))
        return web.Response(body=body, headers={"Content-Type": "application/json"})

    async def bug(self, asked: web.BaseRequest) -> web.StreamResponse:
        raise KeyError("the secret value")

    async def long(self, asked: web.BaseRequest) -> web.StreamResponse:
        try:
            await asyncio.sleep(30)
        finally:
            self.cancelled.set()
        return web.Response()

    async def thing(self, asked: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=asked[PATH_REMAINDER].encode(), content_type="text/plain")


async def until(what: Callable[[], bool], *, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not what():
            await asyncio.sleep(0.005)


def assert_enveloped(reply: Raw, status: int, code: str) -> None:
    assert (reply.status, reply.error["code"]) == (status, code)
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]


async def test_a_body_comes_back() -> None:
    async with serving(Echo().server) as port:
        reply = await send(port, request(path="/echo", body=b'{"a":1}'))
        assert (reply.status, reply.body) == (200, b'{"a":1}')


MALFORMED = {
    "rubbish": b"GARBAGE\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
    "two lengths": b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "length and chunks": b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "another coding": (
        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    ),
    "two hosts": b"GET /echo HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "bare line feeds": b"GET /echo HTTP/1.1\nHost: a\n\n",
    "a space before the colon": b"GET /echo HTTP/1.1\r\nHost : a\r\n\r\n",
    "a folded header": b"GET /echo HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
    "a negative length": b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /echo HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a coding in HTTP/1.0": b"POST /echo HTTP/1.0\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}",
    **{
        f"{name} twice": request(path="/echo", body=b"{}", key=None, content_type=None)[:-4]
        + f"{name}: {one}\r\n{name.lower()}: {other}\r\n\r\n{{}}".encode()
        for name in ("Authorization", "api-key", "Idempotency-Key", "Content-Type")
        for one, other in (("application/json", "application/json"), ("a", "b"))
    },
}


@pytest.mark.parametrize("raw", [MALFORMED["TLS"], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
async def test_who_speaks_another_protocol_is_told_so(raw: bytes) -> None:
    async with serving(Echo().server) as port:
        assert "Is the client speaking TLS or HTTP/2?" in (await send(port, raw)).error["message"]


@pytest.mark.parametrize("what", MALFORMED)
async def test_what_the_parser_refuses_gets_the_envelope_too(what: str) -> None:
    async with serving(Echo().server) as port:
        reply = await send(port, MALFORMED[what])
        assert_enveloped(reply, 400, "invalid_value")
        assert "Traceback" not in reply.body.decode()


SLOW = {
    "half a head": b"POST /echo HTTP/1.1\r\nHost: a\r\n",
    "nothing at all": b"",
    "half a body": b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    "half a chunked body": (
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
    ),
}


@pytest.mark.parametrize("what", SLOW)
async def test_who_sends_too_slowly_is_told_and_closed(what: str) -> None:
    async with serving(Echo().server) as port:
        began = time.monotonic()
        reply = await send(port, SLOW[what])
        assert_enveloped(reply, 408, "request_timeout")
        assert SHORT_S * 0.9 < time.monotonic() - began < SHORT_S + 2


async def test_dripping_bytes_do_not_move_the_deadline() -> None:
    """A byte every 50 ms keeps a per-read timeout happy for ever; the deadline is for the whole head."""
    async with serving(Echo().server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def drip() -> None:
            for byte in b"POST /echo HTTP/1.1\r\nX-Long: " + b"x" * 1000:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(SHORT_S + 2):
            assert (await read_reply(reader)).status == 408
        dripping.cancel()
        writer.close()


@pytest.mark.story
async def test_an_idle_connection_is_kept_and_a_second_slow_head_is_not() -> None:
    """Between requests there is no hurry; once a head has begun, there is."""
    async with serving(Echo().server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(request(path="/echo", body=b"{}"))
            assert (await read_reply(reader)).status == 200
            await asyncio.sleep(SHORT_S * 1.5)
        writer.write(b"POST /ec")
        async with asyncio.timeout(SHORT_S + 2):
            assert (await read_reply(reader)).status == 408
        writer.close()


PATH_OF_8_000 = "/echo?" + "x" * (8_000 - len("/echo?"))
BOUNDS = {
    # what is sent, its status, and the bound that it is told
    "an address": (request("POST", PATH_OF_8_000 + "x", b"{}"), 414, "8,000 bytes"),
    "a header": (request(path="/echo", body=b"{}", x="x" * 8_191), 431, "8,190 bytes"),
    "the name of a header": (request(path="/echo", body=b"{}", **{"x" * 9_000: "1"}), 431, "8,190 bytes"),
    "headers": (request(path="/echo", body=b"{}", **{f"x_{n}": "1" for n in range(125)}), 431, "128 headers"),
    "a body": (request(path="/echo", body=b"x" * (LIMIT + 1)), 413, "10,000 bytes"),
    "a body by its own word": (request(path="/echo").replace(b"Length: 0", b"Length: " + b"9" * 30), 413, "bytes"),
}


@pytest.mark.parametrize(("raw", "status", "bound"), BOUNDS.values(), ids=BOUNDS)
async def test_what_is_over_a_bound_has_https_status_for_it_and_is_told_the_bound(
    raw: bytes, status: int, bound: str
) -> None:
    async with serving(Echo().server) as port:
        reply = await send(port, raw)
        assert_enveloped(reply, status, "body_too_large" if status == 413 else "invalid_value")
        assert bound in reply.error["message"]
        assert reply.error["type"] == "invalid_request_error"


async def test_a_head_that_does_not_end_is_refused_before_it_fills_the_memory() -> None:
    """It may come in as many pieces as it likes, each header within its bound."""
    async with serving(Echo().server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /echo HTTP/1.1\r\nHost: a\r\n")
        sent = 0
        while not reader.at_eof() and sent < 2**20:
            writer.write(b"X-%d: " % sent + b"x" * 4_000 + b"\r\n")
            sent += 4_000
            await asyncio.sleep(0.001)
            if len(reader._buffer):
                break
        reply = await read_reply(reader)
        writer.close()
        assert_enveloped(reply, 431, "invalid_value")
        assert "65,536 bytes" in reply.error["message"]
        assert sent < 500_000


async def test_what_is_just_within_the_bounds_is_taken() -> None:
    async with serving(Echo().server) as port:
        for raw in (
            request("POST", PATH_OF_8_000, b"{}"),
            request(path="/echo", body=b"{}", x="x" * 8_190),
            request(path="/echo", body=b"{}", **{f"x_{n}": "1" for n in range(124)}),
        ):
            assert (await send(port, raw)).status == 200


REFUSED = [
    (request(path="/nowhere"), 404, "not_found"),
    (request(path="/%65cho%2F"), 404, "not_found"),
    (request("GET", "/things%2Fa"), 404, "not_found"),
    (request(path="/things/"), 404, "not_found"),
    (request("PUT", "/echo", b"{}"), 405, "method_not_allowed"),
    (request("OPTIONS", "/echo"), 405, "method_not_allowed"),
    (request("HEAD", "/echo"), 405, "method_not_allowed"),
    (request(path="/echo", body=b"{}", content_type=None), 415, "unsupported_media_type"),
    (request(path="/echo", body=b"{}", content_type="text/plain"), 415, "unsupported_media_type"),
    (request(path="/echo", body=b"{}", content_type="multipart/form-data"), 415, "unsupported_media_type"),
    (request(path="/echo", body=b"{}", Content_Encoding="gzip"), 415, "unsupported_media_type"),
    (request(path="/echo", body=b"x" * (LIMIT + 1)), 413, "body_too_large"),
    (
        request(path="/echo", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"")
        + b"2ee0\r\n" + b"x" * 12_000 + b"\r\n0\r\n\r\n",
        413,
        "body_too_large",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "status", "code"), REFUSED)
async def test_refusals(raw: bytes, status: int, code: str) -> None:
    async with serving(Echo().server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith(f"http/1.1 {status} ")
        if raw.startswith(b"HEAD"):
            return
        reply = await send(port, raw)
        assert_enveloped(reply, status, code)
        if status == 405:
            assert reply.headers["allow"] in ("POST", "GET, HEAD")
        writer.close()


NEAR = [
    ("POST", "/ech", " Did you mean POST /echo?"),
    ("GET", "/echos", " Did you mean POST /echo?"),
    ("GET", "/Echo", " Did you mean POST /echo?"),
    ("POST", "/echo/", " Did you mean POST /echo?"),
    ("HEAD", "/lon", None),
    ("DELETE", "/lng", " Did you mean GET /long?"),
    ("GET", "/" + "echo" * 1_000, " The API is described"),
    ("GET", "/zzzz", " The API is described"),
]


@pytest.mark.parametrize(("method", "path", "meant"), NEAR)
async def test_a_near_miss_is_told_what_was_meant(method: str, path: str, meant: str | None) -> None:
    async with serving(Echo().server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(method, path, Connection="close"))
        said = (await reader.read()).decode()
        writer.close()
        assert said.startswith("HTTP/1.1 404 ")
        assert meant is None or f"There is nothing at this path.{meant}" in said
        assert len(said) < 600


async def test_head_says_what_get_says_without_the_body_and_the_connection_goes_on() -> None:
    """Status, Content-Length and all: what a health check with `wget --spider` looks at."""
    async with serving(Echo().server) as port:
        for path in ("/things/abc", "/bug", "/nowhere"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            heads = []
            for method in ("HEAD", "GET"):
                writer.write(request(method, path, x_request_id="mine"))
                heads.append(await reader.readuntil(b"\r\n\r\n"))
            length = int(heads[1].lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            assert len(await reader.readexactly(length)) > 2  # the second one's: the first had none
            assert without_date(heads[0]) == without_date(heads[1])
            writer.close()


def without_date(head: bytes) -> list[bytes]:
    return [line for line in head.split(b"\r\n") if not line.startswith(b"Date:")]


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_json_by_any_of_its_names_is_taken(content_type: str) -> None:
    async with serving(Echo().server) as port:
        assert (await send(port, request(path="/echo", body=b"{}", content_type=content_type))).status == 200


async def test_a_large_body_is_asked_for_when_the_sender_waits_for_it() -> None:
    """curl sends `Expect: 100-continue` with larger bodies and waits a second without an answer."""
    async with serving(Echo().server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head, _, body = request(path="/echo", body=b"[]" * 100, Expect="100-continue").partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        async with asyncio.timeout(2):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await read_reply(reader)).status == 200
        writer.close()


async def test_a_path_keeps_what_is_behind_the_star_slashes_and_all() -> None:
    async with serving(Echo().server) as port:
        for path in ("/things/a/b", "/things/a%2Fb", "/things/a%2fb?x=1"):
            assert (await send(port, request("GET", path))).body == b"a/b"


async def test_request_ids_are_kept_when_sane_and_made_otherwise() -> None:
    async with serving(Echo().server) as port:
        for sent, kept in (("abc-1._Z", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("ä", False)):
            reply = await send(port, request(path="/echo", body=b"{}", x_request_id=sent))
            assert (reply.headers["x-request-id"] == sent) is kept
            assert reply.headers["x-request-id"].isascii()


async def test_a_bug_of_ours_is_told_briefly_logged_without_values_and_counted(caplog) -> None:
    echo = Echo()
    async with serving(echo.server) as port:
        with caplog.at_level(logging.ERROR):
            reply = await send(port, request("GET", "/bug"))
        assert_enveloped(reply, 500, "internal_error")
        assert echo.bugs == 1
        assert "KeyError at test_server.py:" in caplog.text
        assert "secret" not in caplog.text + reply.body.decode()


async def test_a_caller_that_hangs_up_cancels_its_request() -> None:
    echo = Echo()
    async with serving(echo.server) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("GET", "/long"))
        await asyncio.sleep(0.05)
        writer.close()
        async with asyncio.timeout(2):
            await echo.cancelled.wait()


async def test_bodies_in_memory_are_bounded_together_and_given_back() -> None:
    """Half bodies of one account keep out its own next one, not another's; when they are gone it is served."""
    echo = Echo(body_s=20.0)
    async with serving(echo.server) as port:
        stalled = []
        for _ in range(2):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(path="/echo", body=b"x" * LIMIT, x_account="a")[:-1])
            stalled.append(writer)
        await until(lambda: echo.budget.taken == 2 * (LIMIT - 1))
        reply = await send(port, request(path="/echo", body=b"x" * LIMIT, x_account="a"))
        assert_enveloped(reply, 503, "overloaded")
        assert "30,000 bytes" in str(reply.error["message"])
        assert int(reply.headers["retry-after"]) >= 1
        assert (await send(port, request(path="/echo", body=b"x" * (LIMIT // 2), x_account="b"))).status == 200
        for writer in stalled:
            writer.close()
        await until(lambda: echo.budget.taken == 0)
        assert (await send(port, request(path="/echo", body=b"x" * LIMIT, x_account="a"))).status == 200


async def test_half_bodies_of_one_account_are_few_enough_for_others_to_find_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However little has come of each."""
    monkeypatch.setattr("embedmesh.http.receive.AWAITED_BODIES_MAX", 5)
    echo = Echo(body_s=20.0)
    async with serving(echo.server) as port:
        stalled = []
        for _ in range(4):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(path="/echo", body=b"{}", x_account="a")[:-1])
            stalled.append(writer)
        await until(lambda: echo.budget.awaited.taken == 4)
        reply = await send(port, request(path="/echo", body=b"{}", x_account="a"))
        assert_enveloped(reply, 503, "overloaded")
        assert (await send(port, request(path="/echo", body=b"{}", x_account="b"))).status == 200
        for writer in stalled:
            writer.close()
        await until(lambda: (echo.budget.awaited.taken, echo.budget.taken) == (0, 0))


async def test_of_a_body_that_nobody_has_asked_for_little_is_read() -> None:
    """Whose it is may not be known yet: what is read ahead is in nobody's share."""
    asked: list[web.BaseRequest] = []
    gate = asyncio.Event()

    async def identify_first(request: web.BaseRequest) -> web.StreamResponse:
        asked.append(request)
        await gate.wait()
        return web.Response(body=str(sum([len(chunk) async for chunk in request.content.iter_any()])).encode())

    async with serving(HttpServer({"/slow": {"POST": identify_first}})) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(path="/slow", body=b"x" * 4_000_000))
        await until(lambda: bool(asked) and not asked[0].transport.is_reading())
        await asyncio.sleep(0.05)
        assert asked[0].content._size <= 2 * READ_AHEAD_BYTES + 256 * 1024
        gate.set()
        assert (await read_reply(reader)).body == b"4000000"
        writer.close()


@pytest.mark.story
async def test_a_reply_counts_as_whole_only_when_the_kernel_has_its_last_byte() -> None:
    """A caller that does not read breaks a large reply off; its deadline ends that, and the connection."""
    outcome: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
    within_s = [SHORT_S, 10.0]  # for who does not read, and for who does

    async def large(asked: web.BaseRequest) -> web.StreamResponse:
        response = web.Response(body=b"x" * 50_000_000)
        outcome.set_result(await deliver(asked, response, within_s.pop(0)))
        return response

    async with serving(HttpServer({"/large": {"GET": large}})) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(request("GET", "/large"))
        async with asyncio.timeout(5):
            assert await outcome is Delivery.BROKEN_OFF
        writer.close()

        outcome = asyncio.get_running_loop().create_future()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("GET", "/large"))
        async with asyncio.timeout(10):
            assert len((await read_reply(reader)).body) == 50_000_000
            assert await outcome is Delivery.WHOLE
        writer.close()


async def test_a_caller_that_does_not_read_is_no_bug_of_ours(caplog) -> None:
    bugs = 0

    def count() -> None:
        nonlocal bugs
        bugs += 1

    ended = asyncio.Event()

    async def large(asked: web.BaseRequest) -> web.StreamResponse:
        response = web.Response(body=b"x" * 50_000_000)
        try:
            await deliver(asked, response, SHORT_S)
        finally:
            ended.set()
        return response

    async with serving(HttpServer({"/large": {"GET": large}}, on_internal_error=count)) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(request("GET", "/large"))
        async with asyncio.timeout(5):
            await ended.wait()
        await asyncio.sleep(0.05)
        writer.close()
    assert bugs == 0
    assert "internal error" not in caplog.text


async def test_draining_lets_a_running_request_end_and_takes_no_new_one() -> None:
    entered = asyncio.Event()

    async def short(asked: web.BaseRequest) -> web.StreamResponse:
        entered.set()
        await asyncio.sleep(0.3)
        return web.Response(body=b"done")

    server = HttpServer({"/short": {"GET": short}})
    async with serving(server) as port:
        running = asyncio.create_task(send(port, request("GET", "/short")))
        await entered.wait()
        draining = asyncio.create_task(server.drain(5))
        await asyncio.sleep(0.05)
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        assert (await running).body == b"done"
        await draining


async def test_draining_for_no_time_ends_at_once() -> None:
    """The way out after a failed fsync: nothing more may be acknowledged, so nothing is waited for."""
    echo = Echo()
    async with serving(echo.server) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("GET", "/long"))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(2):
            await echo.server.drain(0.0)
        assert echo.cancelled.is_set()
        writer.close()


def test_what_waiting_does_not_mend_says_so_to_sdks() -> None:
    """They try again whatever comes with 429, unless told not to."""
    never = hint_headers(RateLimited("larger than its limit", retry_after_s=None))
    assert never == {"x-should-retry": "false"}
    assert set(hint_headers(RateLimited("too many", retry_after_s=2.0))) == {"Retry-After", "retry-after-ms"}


def test_every_failure_has_a_row_in_the_table() -> None:
    """A failure that a caller can see and that is not in the table would leave as a 500."""
    from embedmesh.http.failures import TABLE
    from embedmesh.rules import errors

    def leaves(kind: type[Failure]) -> list[type[Failure]]:
        return [kind] if not kind.__subclasses__() else [leaf for sub in kind.__subclasses__() for leaf in leaves(sub)]

    seen_by_callers = {kind for kind in leaves(Failure) if not issubclass(kind, errors.NodeFailure)}
    assert seen_by_callers == set(TABLE)
