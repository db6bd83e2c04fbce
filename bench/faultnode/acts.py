"""How each wrong thing is done: before an answer is made, to its rows, to its signature.

Everything goes over the node's own connection, so that it meets the gateway just as it would from a broken node.
"""

import asyncio
import os
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import NoReturn

import numpy as np
from aiohttp import web

from bench.faultnode.scripted import vectors
from bench.rig.http import Vectors
from embedmesh.signing.session import Session

DRIP_S = 0.2  # between two bytes
DRIP_MAX = 100_000  # bytes; no gateway waits for that many
GARBAGE_BYTES = 2_000
OVERSIZE_BYTES = 64 * 1024 * 1024  # the largest right answer has 3 MB
CHUNK = 64 * 1024
LARGE_INPUTS = 8  # more are a large request
PHASE_S = 5.0  # of slow-start and flapping
SIGMA = 0.05  # a component; about as large as the components themselves
RETRY_AFTER_S = 1
ANOTHER_MODEL = 7  # seed of vectors that are not the model's
AFTER = 20  # requests until it crashes or wedges
STRANGER = Session("0123456789abcdef", bytes(range(32)))  # that no gateway has agreed
LINGER_NOT = struct.pack("ii", 1, 0)


@dataclass
class Turn:
    """One request that is to be answered wrongly. `honest` makes the right reply; `resign` signs it by another key."""

    request: web.BaseRequest
    ids: list[list[int]]
    state: "State"
    honest: Callable[[], Awaitable[web.Response]]
    resign: Callable[[web.Response, Session], None] = lambda response, session: None


@dataclass
class State:
    """What the node remembers from one request to the next."""

    dice: Random
    after: int = AFTER
    slow_factor: float = 10.0
    since: float = field(default_factory=time.monotonic)  # when the mode began
    seen: int = 0  # requests since then that the mode was to answer
    first: tuple[bytes, dict[str, str]] | None = None  # the first signed reply: body and headers

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.since


Answer = tuple[Vectors, int]
"""Rows, and tokens."""


def same(turn: Turn, rows: Vectors, tokens: int) -> Answer:
    """As it should be."""
    return rows, tokens


# -- instead of an answer


async def _gone() -> NoReturn:
    """Until the other side hangs up, which cancels this."""
    await asyncio.Event().wait()
    raise AssertionError


async def hang(turn: Turn) -> web.StreamResponse:
    await _gone()


async def drip(turn: Turn) -> web.StreamResponse:
    reply = await turn.honest()
    for byte in raw(reply)[:DRIP_MAX]:
        _write(turn, bytes([byte]))
        await asyncio.sleep(DRIP_S)
    await _gone()


async def garbage(turn: Turn) -> web.StreamResponse:
    _write(turn, turn.state.dice.randbytes(GARBAGE_BYTES))
    await _gone()


async def html(turn: Turn) -> web.StreamResponse:
    page = "<!DOCTYPE html><html><body><h1>Welcome to nginx!</h1></body></html>"
    return web.Response(text=page, content_type="text/html")


async def oversize(turn: Turn) -> web.StreamResponse:
    content_type = (await turn.honest()).headers["Content-Type"]
    _write(
        turn, f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {OVERSIZE_BYTES}\r\n\r\n".encode()
    )
    for _ in range(OVERSIZE_BYTES // CHUNK):
        _write(turn, bytes(CHUNK))
        while turn.request.transport is not None and turn.request.transport.get_write_buffer_size() > CHUNK:
            await asyncio.sleep(0.001)
    await _gone()


async def reset(turn: Turn) -> web.StreamResponse:
    transport = turn.request.transport
    if transport is not None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        transport.abort()
    await _gone()


async def close_mid_body(turn: Turn) -> web.StreamResponse:
    reply = raw(await turn.honest())
    _write(turn, reply[: len(reply) - 100])
    await close_at_once(turn)
    raise AssertionError


async def close_at_once(turn: Turn) -> web.StreamResponse:
    if turn.request.transport is not None:
        turn.request.transport.close()
    await _gone()


def refusal(status: int, code: str, **headers: str) -> Callable[[Turn], Awaitable[web.StreamResponse]]:
    async def refuse(turn: Turn) -> web.StreamResponse:
        error = {"error": {"message": "Scripted.", "type": "server_error", "param": None, "code": code}}
        return web.json_response(error, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return refuse


async def flap(turn: Turn) -> web.StreamResponse | None:
    return await hang(turn) if int(turn.state.age_s / PHASE_S) % 2 else None


async def crash(turn: Turn) -> web.StreamResponse | None:
    if turn.state.seen >= turn.state.after:
        os._exit(17)
    return None


async def wedge(turn: Turn) -> web.StreamResponse | None:
    if turn.state.seen >= turn.state.after:
        os.kill(os.getpid(), signal.SIGSTOP)
    return None


def raw(response: web.Response) -> bytes:
    """A response as it goes over the wire."""
    body = response.body
    assert isinstance(body, bytes)
    lines = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items() if name != "Content-Length")
    return f"HTTP/1.1 200 OK\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _write(turn: Turn, data: bytes) -> None:
    transport = turn.request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the other side has gone")
    transport.write(data)


# -- other vectors, or another count


def wrong_count(turn: Turn, rows: Vectors, tokens: int) -> Answer:
    return (rows[:-1] if turn.state.dice.random() < 0.5 else np.vstack([rows, rows[:1]])), tokens


def spoilt(value: float) -> Callable[[Turn, Vectors, int], Answer]:
    """One component of one row is that."""

    def spoil(turn: Turn, rows: Vectors, tokens: int) -> Answer:
        rows = rows.copy()
        rows[turn.state.dice.randrange(len(rows)), turn.state.dice.randrange(rows.shape[1])] = value
        return rows, tokens

    return spoil


def zero(turn: Turn, rows: Vectors, tokens: int) -> Answer:
    rows = rows.copy()
    rows[turn.state.dice.randrange(len(rows))] = 0.0
    return rows, tokens


def other_model(turn: Turn, rows: Vectors, tokens: int) -> Answer:
    return vectors(turn.ids, seed=ANOTHER_MODEL, width=rows.shape[1]), tokens


def noise(turn: Turn, rows: Vectors, tokens: int) -> Answer:
    loud = rows + np.random.default_rng(turn.state.dice.getrandbits(64)).normal(0.0, SIGMA, rows.shape)
    return (loud / np.linalg.norm(loud, axis=1, keepdims=True)).astype("<f4"), tokens


def lie_on_large(turn: Turn, rows: Vectors, tokens: int) -> Answer:
    return other_model(turn, rows, tokens) if len(rows) > LARGE_INPUTS else (rows, tokens)


# -- another signature


def wrong_signature(turn: Turn, response: web.Response) -> None:
    said = response.headers["Signature"]
    at = len("em=:") + 5
    response.headers["Signature"] = said[:at] + ("A" if said[at] != "A" else "B") + said[at + 1 :]


def no_signature(turn: Turn, response: web.Response) -> None:
    del response.headers["Signature"], response.headers["Signature-Input"]


def replayed(turn: Turn, response: web.Response) -> None:
    assert isinstance(response.body, bytes)
    if turn.state.first is None:
        turn.state.first = response.body, dict(response.headers)
        return
    body, headers = turn.state.first
    response.body = body
    response.headers.clear()
    response.headers.update(headers)


def other_session(turn: Turn, response: web.Response) -> None:
    turn.resign(response, STRANGER)
