"""What a worker says, however its bytes are cut, and whatever they are."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from embedmesh.engine import frames
from embedmesh.engine.frames import FrameError, FromWorker, Vectors
from embedmesh.engine.process import AnswerSocket
from tests.gateway.mesh import until

ANSWERS = [Vectors(number, bytes([number]) * size) for number, size in enumerate((0, 1, 5_000, 300_000))]
STREAM = b"".join(map(frames.encode, ANSWERS))


@asynccontextmanager
async def hearing() -> AsyncIterator[tuple[list[FromWorker | FrameError], AnswerSocket, socket.socket]]:
    heard: list[FromWorker | FrameError] = []
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_unix_connection(lambda: AnswerSocket(heard.append, lambda: None), sock=ours)
    try:
        yield heard, protocol, theirs
    finally:
        protocol.close()
        theirs.close()


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1_000, len(STREAM)])
async def test_every_answer_is_heard_once(size: int) -> None:
    """Fed as a socket may cut it."""
    heard: list[FromWorker | FrameError] = []
    protocol = AnswerSocket(heard.append, lambda: None)
    stream = STREAM if size > 5 else STREAM[:6_000]
    for start in range(0, len(stream), size):
        protocol.data_received(stream[start : start + size])
    assert heard == ANSWERS[: 4 if size > 5 else 3]


async def test_over_a_real_socket() -> None:
    async with hearing() as (heard, protocol, theirs):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(theirs, STREAM)
        await until("all were heard", lambda: len(heard) == len(ANSWERS))
        assert heard == ANSWERS
        assert protocol.write(b"abc")
        assert await loop.sock_recv(theirs, 10) == b"abc"
        theirs.close()
        await until("it is closed", lambda: not protocol.write(b""))


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        (frames.WORKER_FRAME_BYTES_MAX + 1).to_bytes(4, "little") + b"x" * 100,
    ],
)
def test_nonsense_is_told_as_such(nonsense: bytes) -> None:
    heard: list[FromWorker | FrameError] = []
    AnswerSocket(heard.append, lambda: None).data_received(nonsense + STREAM)
    assert isinstance(heard[0], FrameError)
