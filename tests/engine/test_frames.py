"""Messages between node and worker: whole, bounded, or refused."""

import socket

import msgspec
import pytest

from embedmesh.engine import frames
from embedmesh.engine.frames import Failed, FrameError, FromWorker, LoadModel, LoadRefused, Ready, RunBatch, Vectors

BATCH = RunBatch(number=3, rows=4, length=8, sequences=[[1, 2], [30_521]])
LOADS, BATCHES = msgspec.msgpack.Decoder(LoadModel), msgspec.msgpack.Decoder(RunBatch)


@pytest.mark.parametrize("message", [Ready(5), LoadRefused("no"), Vectors(1, bytes(8)), Failed(2, "ValueError")])
def test_what_a_worker_says_arrives(message: FromWorker) -> None:
    frame = frames.encode(message)
    assert frames.body_bytes(frame[:4]) == len(frame) - 4
    assert frames.decode_from_worker(frame[4:]) == message


def test_messages_arrive_one_by_one_and_then_the_end() -> None:
    ours, theirs = socket.socketpair()
    with theirs, theirs.makefile("rb") as stream:
        load = LoadModel("folder", "digest", 384, 256, 2)
        ours.sendall(frames.encode(load) + frames.encode(BATCH))
        ours.close()
        assert frames.receive(stream, LOADS) == load
        assert frames.receive(stream, BATCHES) == BATCH
        assert frames.receive(stream, BATCHES) is None


@pytest.mark.parametrize("cut", [1, 3, 4, 10])
def test_a_message_cut_short_is_the_end(cut: int) -> None:
    """The other side died in the middle of it."""
    ours, theirs = socket.socketpair()
    with theirs, theirs.makefile("rb") as stream:
        ours.sendall(frames.encode(BATCH)[:cut])
        ours.close()
        assert frames.receive(stream, BATCHES) is None


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x91" * 5_000, frames.encode(BATCH)[4:], b"\x80"])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode_from_worker(body)


def test_a_frame_is_bounded() -> None:
    """Before a byte of it is read into memory."""
    with pytest.raises(FrameError, match="too long"):
        frames.body_bytes(b"\xff\xff\xff\xff")
