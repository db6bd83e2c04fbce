"""What a node and its worker process say to each other: four bytes of little-endian length, then MessagePack.

Every message is one typed struct; what does not decode to it is a FrameError, and the worker is replaced.
"""

import socket
from collections.abc import Callable
from typing import TypeVar

import msgspec

from embedmesh.rules.models import Tier

FRAME_BYTES_MAX = 16 * 1024 * 1024  # a batch of 128 vectors of 16,384 components is 8 MiB; ids are far less
LENGTH_BYTES = 4


class FrameError(Exception):
    """The other side said something that is no message."""


class Load(msgspec.Struct, frozen=True):
    """Node to worker, once, first: what the catalogue says of the model. `threads` 0 leaves that to OpenVINO."""

    folder: str
    digest: str
    width: int
    max_tokens: int
    threads: int
    tier: Tier = "exact"


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker to node, once: the folder was what the catalogue says, and a first text was really embedded."""

    load_ms: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Worker to node, instead of Ready: one line that says what must be mended. The worker then exits."""

    message: str


class Batch(msgspec.Struct, frozen=True):
    """Node to worker: token ids with special tokens. The model sees `rows` x `length`; what is missing is padding."""

    number: int
    rows: int
    length: int
    sequences: list[list[int]]


class Vectors(msgspec.Struct, frozen=True, tag="vectors"):
    """Worker to node: little-endian float32, [len(sequences), width]. `bad` are the rows not finite or all zero.

    `cpu_s` is the CPU time that it took, of all threads.
    """

    number: int
    data: bytes
    bad: list[int] = []
    cpu_s: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Worker to node: the batch gave no vectors. `why` is a word of ours or an exception's type, never a value."""

    number: int
    why: str


FromWorker = Ready | Refused | Vectors | Failed
Message = Load | Batch | FromWorker
T = TypeVar("T")

_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: Message) -> bytes:
    """The frame of a message."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def body_bytes(prefix: bytes) -> int:
    """How many bytes follow the prefix. Raises FrameError when that is more than any message has."""
    length = int.from_bytes(prefix, "little")
    if length > FRAME_BYTES_MAX:
        raise FrameError("a frame is too long")
    return length


def decode_from_worker(body: bytes) -> FromWorker:
    """What the worker said. Raises FrameError."""
    return _decoded(body, _from_worker.decode)


def _decoded(body: bytes, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"a frame is no message: {type(error).__name__}") from None


def receive(sock: socket.socket, kind: type[T]) -> T | None:
    """Wait for one message on a blocking socket; None when the other side has gone, even in mid-message."""
    prefix = _receive_exactly(sock, LENGTH_BYTES)
    body = prefix and _receive_exactly(sock, body_bytes(prefix))
    return _decoded(body, msgspec.msgpack.Decoder(kind).decode) if body else None


def _receive_exactly(sock: socket.socket, count: int) -> bytes | None:
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        try:
            got = sock.recv_into(view)
        except ConnectionResetError:  # killed while there was something unread
            return None
        if got == 0:
            return None
        view = view[got:]
    return bytes(buffer)
