"""What goes straight is read as the fast path reads it, and answered on the connection as by the fast path."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.http.exchange import Exchange
from embedmesh.http.fast_path import FastPath, read_head
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.http.straight import LAST_HEAD_BYTES_MAX, STRAIGHT_BODY_BYTES_MAX, StraightConnection, StraightPath
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.exchange import Deliver, Reply
from embedmesh.rules.ids import new_id
from embedmesh.rules.request_record import RequestRecord
from embedmesh.rules.straight import ToCaller
from tests.http.raw import Raw, read_reply, request, serving

LINE = b"POST /v1/embeddings HTTP/1.1\r\n"
GOOD = request(body=b"0123456789", key="good", accept="*/*")


class Asked:
    """Ends when the test says so."""

    def __init__(self, body: bytes, to_caller: ToCaller) -> None:
        self.request_id = new_id("req", SystemClock())
        self.body = body
        self.left = False
        self._to_caller = to_caller

    def answer(self) -> None:
        """With the body that was sent."""
        reply = Reply({"x-way": "straight", "x-embedmesh-request": self.request_id}, self.body)
        rest = self._to_caller.deliver(reply)
        if rest is None:
            self._to_caller.end()
        else:
            self._to_caller.go_on(self._handle, rest)

    def record(self) -> RequestRecord:
        return RequestRecord(self.request_id, account="local", model="m", bytes_in=len(self.body), tokens=3)

    def fail(self) -> None:
        self._to_caller.go_on(self.go_on())

    def go_on(self) -> Callable[[Deliver], Awaitable[None]]:
        return self._handle

    async def _handle(self, deliver: Deliver) -> None:
        self.delivery = await deliver(Reply({"x-way": "gone on"}, self.body))

    def caller_left(self) -> None:
        self.left = True


class Desk:
    """Answers at once, unless `hold`; a body that begins with `-` is not ordinary."""

    def __init__(self, *, hold: bool = False, logged: bool = False) -> None:
        self.records: list[RequestRecord] = []
        self.asked: list[Asked] = []
        self.hold = hold
        self.bugs = 0
        fast_path = FastPath(LINE, self._handle, BodyBudget(10**6), access=self if logged else None)
        straight = StraightPath(fast_path, self)
        self.server = HttpServer({}, on_internal_error=self._bug, fast_path=straight, access=fast_path.access)

    def client_of(self, peer: object, forwarded: str | None) -> str:
        return f"{isinstance(peer, tuple)} {forwarded}"

    def ended(self, record: RequestRecord) -> None:
        self.records.append(record)

    def _bug(self) -> None:
        self.bugs += 1

    def knows(self, headers: Mapping[str, str]) -> Any:
        return None if headers.get("authorization") == "Bearer odd" else dict(headers)

    def ask(self, head: Any, body: bytes, to_caller: ToCaller) -> Asked | None:
        if body.startswith(b"bug"):
            raise KeyError("the secret value")
        if body.startswith(b"-"):
            return None
        asked = Asked(body, to_caller)
        self.asked.append(asked)
        if not self.hold:
            asyncio.get_running_loop().call_soon(asked.answer)
        return asked

    async def _handle(self, exchange: Exchange) -> None:
        await exchange.deliver(Reply({"x-way": "fast path"}, await exchange.body("a")))


@asynccontextmanager
async def connected(desk: Desk) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with serving(desk.server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.close()


def way(reply: Raw) -> tuple[int, str, bytes]:
    return reply.status, reply.headers.get("x-way", ""), reply.body


async def test_one_after_another_on_one_connection() -> None:
    """Lengths differ; what is not ordinary takes the fast path between them."""
    async with connected(Desk()) as (reader, writer):
        for body in (
            b"a",
            b"b" * 300,
            b"-c",
            b"d",
            b"e" * STRAIGHT_BODY_BYTES_MAX,
            b"f" * (STRAIGHT_BODY_BYTES_MAX + 1),
        ):
            writer.write(request(body=body, key="good"))
            straight = not body.startswith(b"-") and len(body) <= STRAIGHT_BODY_BYTES_MAX
            assert way(await read_reply(reader)) == (200, "straight" if straight else "fast path", body)


@pytest.mark.parametrize(
    ("raw", "how"),
    [
        (request(body=b"a", key="odd"), "fast path"),
        (request(body=b"a", key="good", x_long="y" * LAST_HEAD_BYTES_MAX), "fast path"),
        (request(body=b"a", key="good", te="trailers"), ""),
        (request(body=b"a", key="good"), "straight"),
    ],
    ids=["a head that the handler does not know", "a long head", "for the general server", "ordinary"],
)
async def test_which_way(raw: bytes, how: str) -> None:
    async with connected(Desk()) as (reader, writer):
        writer.write(raw)
        assert (await read_reply(reader)).headers.get("x-way", "") == how


async def test_requests_in_one_write_are_answered_in_order() -> None:
    async with connected(Desk()) as (reader, writer):
        bodies = [b"one", b"two", b"three"]
        writer.write(request(body=b"zero", key="good"))
        await read_reply(reader)
        writer.write(b"".join(request(body=body, key="good") for body in bodies))
        assert [(await read_reply(reader)).body for _ in bodies] == bodies


async def test_a_request_in_pieces_takes_the_fast_path() -> None:
    async with connected(Desk()) as (reader, writer):
        raw = request(body=b"abcdef", key="good")
        writer.write(raw[:-3])
        await asyncio.sleep(0.05)
        writer.write(raw[-3:])
        assert way(await read_reply(reader)) == (200, "fast path", b"abcdef")


async def test_request_ids_are_the_callers_or_ours() -> None:
    async with connected(Desk()) as (reader, writer):
        ids = []
        for more in ({}, {}, {"x_request_id": "mine-1"}, {"x_request_id": "mine-2"}, {"x_request_id": "not sane"}):
            writer.write(request(body=b"a", key="good", **more))
            ids.append((await read_reply(reader)).headers["x-request-id"])
        assert ids[2:4] == ["mine-1", "mine-2"]
        assert all(each.startswith("req_") for each in (*ids[:2], ids[4]))
        assert len(set(ids)) == 5


async def test_what_stops_being_ordinary_goes_on_and_then_the_next_is_straight_again() -> None:
    desk = Desk(hold=True)
    async with connected(desk) as (reader, writer):
        for expected in ("gone on", "straight"):
            writer.write(request(body=b"a", key="good"))
            await until(lambda: desk.asked)
            asked = desk.asked.pop()
            asked.fail() if expected == "gone on" else asked.answer()
            assert way(await read_reply(reader)) == (200, expected, b"a")


async def test_who_hangs_up_is_told_to_the_handler() -> None:
    desk = Desk(hold=True)
    async with connected(desk) as (_, writer):
        writer.write(request(body=b"a", key="good"))
        await until(lambda: desk.asked)
        writer.close()
        await until(lambda: desk.asked[0].left)


async def test_a_stop_lets_it_end() -> None:
    desk = Desk(hold=True)
    async with connected(desk) as (reader, writer):
        writer.write(request(body=b"a", key="good"))
        await until(lambda: desk.asked)
        await desk.server.drain(5.0)
        assert way(await read_reply(reader)) == (200, "gone on", b"a")
        assert await reader.read() == b""


async def test_a_bug_is_explained_and_counted() -> None:
    desk = Desk()
    async with connected(desk) as (reader, writer):
        writer.write(request(body=b"bug", key="good"))
        reply = await read_reply(reader)
    assert (reply.status, reply.error["code"], desk.bugs) == (500, "internal_error", 1)
    assert b"secret" not in reply.body


@given(
    first=st.sampled_from([GOOD, request(body=b"1", key="good", x_request_id="mine"), b"", b"GET / HTTP/1.1\r\n\r\n"]),
    data=st.data(),
)
def test_a_known_head_is_the_one_that_was_read(first: bytes, data: st.DataObject) -> None:
    """Whatever bytes come: where a body is found, the fast path reads the same head and the same body."""
    asked: list[tuple[Any, bytes]] = []

    class Knows:
        def knows(self, headers: Mapping[str, str]) -> Any:
            return dict(headers)

        def ask(self, head: Any, body: bytes, to_caller: ToCaller) -> Any:
            asked.append((head, body))

    class NoFastPath(FastPath):
        def begin(self, *_: Any) -> None:
            """What is not asked for straight is left."""

    connection = StraightConnection(
        NoFastPath(LINE, _never, BodyBudget(1)),
        Knows(),
        transport := None,  # type: ignore[arg-type]  # nothing is written
    )
    connection.begin(transport, first, _never, _never)  # type: ignore[arg-type]
    asked.clear()
    raw = bytearray(request(body=data.draw(st.binary(max_size=20)), key="good", accept="*/*"))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from([b"", b"0", b"1", b" ", b"\r\n", b"x"]))
    sent = bytes(raw)
    connection.begin(transport, sent, _never, _never)  # type: ignore[arg-type]
    if not asked:
        return
    [(known, body)] = asked
    head = read_head(sent, LINE)
    assert head is not None
    assert body == sent[head.end :]
    assert head.length == len(body)
    assert dict(head.headers) | {"content-length": ""} == known | {"content-length": ""}


async def _never(exchange: Exchange) -> None:
    raise AssertionError


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.005)


async def test_the_access_log_hears_of_each_request_once_whatever_its_way() -> None:
    """Straight, gone on, on the fast path, on the general server, refused by its parser, left by its caller."""
    desk = Desk(logged=True)
    async with connected(desk) as (reader, writer):
        for body in (b"a", b"-c", b"bug", b"d" * 9):
            writer.write(request(body=body, key="good", x_request_id="mine", x_forwarded_for="1.2.3.4"))
            await read_reply(reader)
        desk.hold = True
        writer.write(request(body=b"gone on", key="good"))
        await until(lambda: len(desk.asked) == 3)
        desk.asked[-1].fail()
        assert (await read_reply(reader)).headers["x-way"] == "gone on"
        writer.write(request(path="/nothing-here?secret", key="good"))
        await read_reply(reader)
    async with connected(desk) as (reader, writer):
        writer.write(GOOD)
        await until(lambda: len(desk.asked) == 4)
        writer.close()
        await until(lambda: desk.asked[-1].left)
    async with connected(desk) as (reader, writer):
        writer.write(b"SECRET / HTTP/9.9\r\n\r\n")
        await read_reply(reader)
    await until(lambda: len(desk.records) == 8)
    told = [(each.method, each.route, each.status, each.outcome, each.bytes_in) for each in desk.records]
    path = "/v1/embeddings"
    assert told == [
        ("POST", path, 200, "ok", 1),
        ("POST", path, 200, "ok", 2),
        ("POST", path, 500, "internal_error", 3),
        ("POST", path, 200, "ok", 9),
        ("POST", path, 200, "ok", 7),
        ("POST", "", 404, "not_found", 0),
        ("POST", path, 0, "dropped", 10),
        ("", "", 400, "invalid_value", 0),
    ]
    first, fast, *_ = desk.records
    assert (first.request_id, first.own_id, first.bytes_out) == ("mine", desk.asked[0].request_id, 1)
    assert (first.account, first.model, first.tokens, first.client) == ("local", "m", 3, "True 1.2.3.4")
    assert (fast.request_id, fast.bytes_out, fast.client) == ("mine", 2, "True 1.2.3.4")
    assert all(each.seconds >= 0 for each in desk.records) and desk.records[4].request_id == desk.asked[2].request_id
