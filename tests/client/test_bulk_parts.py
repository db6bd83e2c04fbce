"""What decides in a bulk run: how texts are cut, how many requests are in flight, what a reply's bytes say."""

import asyncio
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.client.bulk.connection import REPLY_HEAD_BYTES_MAX, Broke, BulkConnection
from embedmesh.client.bulk.packing import UNIT_TOKENS, Packing, size_of
from embedmesh.client.bulk.posting import Posted
from embedmesh.client.bulk.replies import read_vectors
from embedmesh.client.bulk.window import AUTO_CONCURRENCY_MAX, CongestionWindow, Gate
from embedmesh.rules.limits import REQUEST_INPUTS_MAX

# -- packing -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=40) | st.lists(st.integers(0, 9), max_size=9)), st.integers(1, 9), st.integers(1, 90))
def test_every_text_is_in_one_request_in_order(texts: list[Any], inputs: int, size: int) -> None:
    """No request has more than it may; but a text is never cut."""
    packing = Packing(inputs)
    packing.too_much(2 * size)
    units = list(packing.units(texts, start=5))
    assert [text for unit in units for text in unit.texts] == texts
    starts = [unit.start for unit in units]
    assert starts == [5 + sum(len(unit.texts) for unit in units[:at]) for at in range(len(units))]
    for unit in units:
        assert unit.size == sum(map(size_of, unit.texts))
        assert 1 <= len(unit.texts) <= inputs and (unit.size <= size or len(unit.texts) == 1)


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 90))
def test_what_was_refused_does_not_fit(texts: list[str], inputs: int, size: int) -> None:
    packing = Packing()
    packing.too_many(2 * inputs)
    packing.too_much(2 * size)
    fits = packing.fits(texts, sum(map(size_of, texts)))
    assert fits >= 1
    if fits > 1:
        assert fits <= inputs and sum(map(size_of, texts[:fits])) <= size
    if fits < len(texts):
        assert fits == inputs or sum(map(size_of, texts[: fits + 1])) > size


def test_requests_follow_what_replies_tell() -> None:
    """Texts that have more tokens than their bytes say make smaller requests; wide vectors make fewer a request."""
    packing = Packing()
    assert packing.size == 4 * UNIT_TOKENS
    assert packing.inputs == 512
    for _ in range(60):
        packing.replied(384, size=1_000, tokens=1_000)
    assert packing.size == pytest.approx(UNIT_TOKENS, rel=0.01)
    assert packing.inputs == REQUEST_INPUTS_MAX
    packing.replied(16_384, size=1_000, tokens=1_000)
    assert packing.inputs == 48 and packing.reply_bytes <= 4 * 1024 * 1024


# -- how many in flight ------------------------------------------------------------------------------------------------


def served(window: CongestionWindow, requests: int, *, at_one_time: int, refused_above: int = 10_000) -> list[int]:
    """A server that does `at_one_time` in a tenth of a second, and refuses those above; the window at each reply.

    All that are in flight are answered in turns.
    """
    now, sizes = 0.0, []
    for _ in range(requests):
        in_flight = window.size
        now += 0.1 / min(in_flight, at_one_time)
        if in_flight > refused_above:
            window.refused(now - 0.1, 0.2, now)
            now = max(now, window.not_before)
        else:
            window.replied(1_000, True, now)
        sizes.append(window.size)
    return sizes


@pytest.mark.parametrize("at_one_time", [1, 3, 8, 20, 50])
def test_the_window_grows_while_that_brings_more(at_one_time: int) -> None:
    """It settles where another request in flight brings nothing; now and then it tries one step more."""
    sizes = served(CongestionWindow(), 20_000, at_one_time=at_one_time)[10_000:]
    settled = sorted(sizes)[len(sizes) // 2]
    assert max(4, at_one_time) * 0.95 <= settled <= max(4, 1.6 * at_one_time)
    assert max(sizes) <= AUTO_CONCURRENCY_MAX


@pytest.mark.parametrize("refused_above", [1, 2, 5, 12])
@pytest.mark.parametrize("fixed", [None, 32])
def test_the_window_stays_below_what_is_refused(fixed: int | None, refused_above: int) -> None:
    window = CongestionWindow(fixed)
    sizes = served(window, 5_000, at_one_time=50, refused_above=refused_above)
    assert sum(size > refused_above for size in sizes[100:]) < 0.02 * len(sizes)
    assert min(sizes) >= 1 and max(sizes[2_500:]) > refused_above // 2


def test_a_crowd_that_is_refused_cuts_once() -> None:
    window = CongestionWindow(16)
    for number in range(16):
        window.refused(0.0, 1.0, 0.1 + number / 1_000)
    assert window.size == 8 and window.not_before == pytest.approx(1.115)
    window.refused(1.2, 0.0, 1.3)
    assert window.size == 4


def test_a_slow_source_of_texts_tells_nothing() -> None:
    window = CongestionWindow()
    for number in range(1_000):
        window.replied(1_000, False, number / 10)
    assert window.size == 4


def test_wide_vectors_make_it_smaller() -> None:
    window = CongestionWindow(64)
    window.bound(10)
    window.bound(100)
    assert window.size == 10
    window.bound(0)
    assert window.size == 1


def test_who_is_cancelled_at_the_gate_takes_no_place() -> None:
    """Whether it still waits or was let pass in that moment; those that are sent again go first."""

    async def run() -> None:
        gate = Gate(CongestionWindow(1), asyncio.get_running_loop().time, asyncio.sleep)
        passed: list[str] = []
        ends = asyncio.Event()

        async def go(name: str, *, again: bool = False) -> None:
            async with gate.passed(again=again):
                passed.append(name)
                await ends.wait()

        tasks = [asyncio.ensure_future(go(name, again=name == "again")) for name in ("a", "b", "c", "again", "d")]
        await asyncio.sleep(0)
        tasks[1].cancel()
        ends.set()
        await asyncio.sleep(0)
        tasks[3].cancel()  # it was let pass just now
        await asyncio.gather(*tasks, return_exceptions=True)
        assert passed in (["a", "again", "c", "d"], ["a", "c", "d"]) and gate.running == 0

    asyncio.run(run())


# -- replies -----------------------------------------------------------------------------------------------------------


class Transport(asyncio.Transport):
    """The scripted edge: what a connection writes and that it closes."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        self.closed = True


BODY = json.dumps({"data": [{"index": 0, "embedding": "AACAPw=="}], "usage": {"total_tokens": 3}}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"".join(b"%x\r\n%b\r\n" % (len(BODY[at : at + 9]), BODY[at : at + 9]) for at in range(0, len(BODY), 9))
GOOD = {
    "length": b"HTTP/1.1 200 OK\r\nX-Request-Id: a: b \r\n" + LENGTH + b"\r\n" + BODY,
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED + b"0\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + LENGTH + b"\r\n" + BODY,
    "ends": b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
    "no words": b"HTTP/1.0 200\r\n" + LENGTH + b"\r\n" + BODY,
}


async def read(parts: list[bytes], bytes_max: int = 10_000) -> tuple[Posted, BulkConnection]:
    """The reply that comes in these parts, after which the other side ends. Raises Broke."""
    connection, transport = BulkConnection(), Transport()
    connection.connection_made(transport)
    waiting = asyncio.ensure_future(connection.exchange(b"", bytes_max))
    await asyncio.sleep(0)
    for part in parts:
        while part and not transport.closed:
            buffer = connection.get_buffer(-1)
            size = min(len(buffer), len(part))
            buffer[:size] = part[:size]
            connection.buffer_updated(size)
            part = part[size:]
    for _ in range(3):
        await asyncio.sleep(0)
    if not waiting.done():
        connection.eof_received()
        connection.connection_lost(None)
    return await waiting, connection


KEPT = {"length", "chunks", "interim"}  # the others end with their connection


@pytest.mark.parametrize("name", GOOD)
@given(st.lists(st.integers(1, 400), max_size=6))
def test_a_reply_is_the_same_however_it_is_cut(name: str, cuts: list[int]) -> None:
    reply = GOOD[name]
    ends = [0, *sorted(cuts), len(reply)]
    parts = [reply[begin:end] for begin, end in itertools.pairwise(ends)]
    posted, connection = asyncio.run(read(parts))
    assert (posted.status, bytes(posted.body)) == (200, BODY)
    assert connection.usable == (name in KEPT)
    vectors = read_vectors(posted.body, 1)
    rows = np.empty((1, 1), "<f4")
    vectors.write(rows)
    assert rows.tolist() == [[1.0]] and vectors.tokens == 3


@pytest.mark.parametrize("cut", range(1, len(GOOD["length"])), ids=str)
def test_a_reply_that_is_cut_off_is_none(cut: int) -> None:
    with pytest.raises(Broke) as broke:
        asyncio.run(read([GOOD["length"][:cut]]))
    assert broke.value.heard


@pytest.mark.parametrize(
    "reply",
    [
        b"SMTP ready\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n" + b"x" * 0xFFFF + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * REPLY_HEAD_BYTES_MAX + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 20_000,
    ],
    ids=lambda reply: repr(reply[:60]),
)
def test_what_is_no_reply_closes_the_connection(reply: bytes) -> None:
    with pytest.raises(Broke):
        asyncio.run(read([reply]))
