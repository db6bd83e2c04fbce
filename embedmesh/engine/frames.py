"""The messages between a node and its worker process: four bytes of little-endian length, then MessagePack.

Every message is one typed struct. Anything that does not decode to it is a FrameError, and the worker is replaced.
"""

from typing import BinaryIO, Literal, TypeVar

import msgspec

from embedmesh.rules.models import Tier

WORKER_FRAME_BYTES_MAX = 16 * 1024 * 1024  # a batch of 128 vectors of 16,384 components is 8 MiB; ids are far less
FRAME_LENGTH_BYTES = 4


Step = Literal["checks its files", "reads its weights", "compiles it", "packs its weights"]
"""What a worker does while it loads a model, in this order, in words that continue "the engine"."""


class FrameError(Exception):
    """The other side sent something that is no message."""


class LoadModel(msgspec.Struct, frozen=True):
    """Node to worker, once, first: what the catalogue says of the model. `threads` 0: see `engine.threads`."""

    folder: str
    digest: str
    width: int
    max_tokens: int
    threads: int
    tier: Tier = "exact"


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker to node, once: the folder was what the catalogue says, and a first text was really embedded."""

    load_ms: int


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Worker to node, any number of times before Ready: what it does now, and how much of the time is over by then."""

    step: Step
    percent: int


class LoadRefused(msgspec.Struct, frozen=True, tag="refused"):
    """Worker to node, instead of Ready: one line that says what must be corrected. The worker then exits."""

    message: str


class RunBatch(msgspec.Struct, frozen=True):
    """Node to worker: token ids with special tokens. The model sees `rows` x `length`; the remainder is padding."""

    number: int
    rows: int
    length: int
    sequences: list[list[int]]


class Vectors(msgspec.Struct, frozen=True, tag="vectors"):
    """Worker to node: little-endian float32, [len(sequences), width]. `bad` are the rows that are not finite, or, of
    vectors, all zero.

    `cpu_s` is the CPU time of all threads.
    """

    number: int
    data: bytes
    bad: list[int] = []
    cpu_s: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Worker to node: the batch gave no vectors. `why` is a word of ours or an exception's type, never a value."""

    number: int
    why: str


FromWorker = Loading | Ready | LoadRefused | Vectors | Failed
T = TypeVar("T")

_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: LoadModel | RunBatch | FromWorker) -> bytes:
    """The frame of a message."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(FRAME_LENGTH_BYTES, "little") + body


def body_bytes(prefix: bytes) -> int:
    """How many bytes follow the prefix. Raises FrameError when that is more than any message has."""
    length = int.from_bytes(prefix, "little")
    if length > WORKER_FRAME_BYTES_MAX:
        raise FrameError("a frame is too long")
    return length


def decode_from_worker(body: bytes | memoryview) -> FromWorker:
    """A message of the worker. Raises FrameError."""
    return _decode(body, _from_worker)


def receive(stream: BinaryIO, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """Wait for one message; None when the other side has gone, even in mid-message. Raises FrameError."""
    try:
        if len(prefix := stream.read(FRAME_LENGTH_BYTES)) < FRAME_LENGTH_BYTES:
            return None
        length = body_bytes(prefix)
        body = stream.read(length)
    except ConnectionResetError:  # killed while there was something unread
        return None
    return _decode(body, decoder) if len(body) == length else None


def _decode(body: bytes | memoryview, decoder: msgspec.msgpack.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"a frame is no message: {type(error).__name__}") from None
