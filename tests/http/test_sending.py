"""When a reply has begun to be delivered, over a socket that takes what it is told to: never guessed, to the byte."""

import asyncio
from collections.abc import Callable

import pytest

from embedmesh.http.sending import SINGLE_WRITE_BYTES_MAX, TLS_PIECE_BYTES, Sending
from embedmesh.rules.ports import Delivery

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
SMALL, LARGE = b"s" * 1_000, b"l" * (SINGLE_WRITE_BYTES_MAX + 1)
WITHIN_S = 60.0
TLS, PLAIN = True, False


class Transport:
    """Takes so many bytes, the rest waits in its buffer; `takes` None: it fails."""

    def __init__(self, takes: int | None, *, tls: bool = False) -> None:
        self.takes, self.tls = takes, tls
        self.told = bytearray()
        self.buffered = 0
        self.closing = self.aborted = False
        self.writes = 0

    def get_extra_info(self, name: str) -> object:
        assert name == "ssl_object"
        return object() if self.tls else None

    def write(self, data: bytes | memoryview) -> None:
        assert not self.buffered, "what was written before is not in the kernel yet"
        self.writes += 1
        self.told += data
        if self.takes is None:
            self.closing = True
            return
        taken = min(len(data), self.takes)
        self.takes -= taken
        self.buffered = len(data) - taken

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = self.aborted = True
        self.buffered = 0


async def end(transport: Transport, body: bytes, then: Callable[[Sending], None] = Sending.lost) -> Delivery | None:
    """How it ends, None for not delivered, where `then` happens once it waits."""
    sending = Sending(transport, WITHIN_S)  # type: ignore[arg-type]
    task = asyncio.ensure_future(sending.send(HEAD, body))
    for _ in range(10):
        await asyncio.sleep(0)
    if not task.done():
        transport.closing, transport.buffered = True, 0
        then(sending)
    try:
        return await task
    except ConnectionResetError:
        return None


@pytest.mark.parametrize("tls", [PLAIN, TLS])
@pytest.mark.parametrize("body", [SMALL, LARGE, LARGE * 20], ids=["small", "large", "huge"])
async def test_what_is_taken_at_once_is_whole(body: bytes, tls: bool) -> None:
    transport = Transport(10**9, tls=tls)
    assert await end(transport, body) is Delivery.WHOLE
    assert transport.told == HEAD + body


TAKEN = [
    # how much the socket takes, of which body, and what it is when the caller goes then
    (0, SMALL, None),
    (len(HEAD) - 1, SMALL, None),
    (len(HEAD), SMALL, None),
    (len(HEAD) + 1, SMALL, Delivery.BROKEN_OFF),
    (len(HEAD) + len(SMALL) - 1, SMALL, Delivery.BROKEN_OFF),
    (0, LARGE, None),
    (len(HEAD), LARGE, None),
    (len(HEAD) + 1, LARGE, Delivery.BROKEN_OFF),
    (len(HEAD) + len(LARGE) - 1, LARGE, Delivery.BROKEN_OFF),
]


@pytest.mark.parametrize("tls", [PLAIN, TLS])
@pytest.mark.parametrize(("taken", "body", "ends"), TAKEN)
async def test_it_has_begun_with_the_first_byte_of_its_body(
    taken: int, body: bytes, ends: Delivery | None, tls: bool
) -> None:
    assert await end(Transport(taken, tls=tls), body) is ends


@pytest.mark.parametrize("tls", [PLAIN, TLS])
@pytest.mark.parametrize("body", [SMALL, LARGE])
async def test_a_write_that_fails_has_handed_over_nothing(body: bytes, tls: bool) -> None:
    assert await end(Transport(None, tls=tls), body) is None


@pytest.mark.parametrize("body", [SMALL, LARGE])
async def test_a_connection_that_was_closing_is_written_nothing(body: bytes) -> None:
    transport = Transport(10**9)
    transport.closing = True
    assert await end(transport, body) is None
    assert not transport.writes


async def test_what_came_to_the_kernel_while_we_waited_counts() -> None:
    """Its socket was full; then it took the first byte, and a part of the rest; then the caller reset."""
    transport = Transport(0)
    sending = Sending(transport, WITHIN_S)  # type: ignore[arg-type]
    task = asyncio.ensure_future(sending.send(HEAD, LARGE))
    await asyncio.sleep(0)
    transport.buffered, transport.takes = 0, 100
    sending.resume_writing()
    for _ in range(3):
        await asyncio.sleep(0)
    assert transport.buffered == len(LARGE) - 1 - 100
    transport.closing, transport.buffered = True, 0
    sending.lost()
    assert await task is Delivery.BROKEN_OFF


async def test_what_is_read_in_the_end_is_whole() -> None:
    transport = Transport(10)
    sending = Sending(transport, WITHIN_S)  # type: ignore[arg-type]
    task = asyncio.ensure_future(sending.send(HEAD, LARGE))
    while not task.done():
        await asyncio.sleep(0)
        transport.buffered, transport.takes = 0, 10
        sending.resume_writing()
    assert await task is Delivery.WHOLE
    assert transport.told == HEAD + LARGE


@pytest.mark.parametrize(("taken", "ends"), [(0, None), (len(HEAD) + 1, Delivery.BROKEN_OFF)])
async def test_the_deadline_is_for_all_of_it(taken: int, ends: Delivery | None) -> None:
    """The connection is broken off then; what that means for money depends on the first byte alone."""
    transport = Transport(taken)
    sending = Sending(transport, 0.01)  # type: ignore[arg-type]
    try:
        assert await sending.send(HEAD, LARGE) is ends
    except ConnectionResetError:
        assert ends is None
    assert transport.aborted


@pytest.mark.parametrize("taken", [0, len(HEAD) + 1, len(HEAD) + 100])
async def test_whoever_is_cancelled_has_not_delivered(taken: int) -> None:
    task = asyncio.ensure_future(Sending(Transport(taken), WITHIN_S).send(HEAD, LARGE))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_over_tls_a_failed_write_is_waited_for() -> None:
    """TLS takes the bytes, and says some turns of the loop later that its socket did not."""
    transport = Transport(10**9, tls=True)
    sending = Sending(transport, WITHIN_S)  # type: ignore[arg-type]
    task = asyncio.ensure_future(sending.send(HEAD, SMALL))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(sending.lost))
    with pytest.raises(ConnectionResetError):
        await task


async def test_over_tls_no_more_than_a_piece_waits_in_memory() -> None:
    transport = Transport(len(HEAD) + 1 + TLS_PIECE_BYTES, tls=True)
    await end(transport, b"x" * 10**6)
    assert len(transport.told) <= len(HEAD) + 1 + 2 * TLS_PIECE_BYTES
