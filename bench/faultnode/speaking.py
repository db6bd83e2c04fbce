"""A node that speaks: chat, completions and images over plain HTTP/1.1, whole and streamed, right or wrong on command.

A request is answered by an order. A text anywhere in it gives one, as `<<cut at=17 tokens=40 pace=0.01>>`; else it is
the standing one, which `POST /control` sets with an Order in JSON. `GET /control` tells what was asked and heard.

    python -m bench.faultnode.speaking --port 9000 --mode bytewise --tokens 40
"""

import argparse
import asyncio
import json
import re
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import uvloop

from bench.faultnode.speech import Asked, whole
from bench.faultnode.speech_acts import End, Order, Reply
from bench.faultnode.speech_modes import SPEECH_MODES, SpeechMode, speech_listed
from bench.rig.command import check_names, given, options_of
from bench.rig.processes import HOST

PATHS = ("chat/completions", "completions", "images/generations")
TOLD = re.compile(r"<<([a-z0-9-]+)((?: [a-z_]+=[0-9.]+)*)>>")
HEARD_MAX = 10_000  # requests that are remembered
BODY_BYTES_MAX = 64 * 1024 * 1024
LINGER_NOT = struct.pack("ii", 1, 0)
SEND_BYTES = 64 * 1024  # in the kernel, of what nobody reads: on loopback it would take four megabytes
RETRY_AFTER = "Retry-After: 1\r\n"

JsonObject = dict[str, Any]


@dataclass
class Heard:
    """One request, and what became of its answer. Times are on the monotonic clock."""

    path: str
    body: JsonObject
    order: Order
    began_at: float = field(default_factory=time.monotonic)
    written: int = 0  # pieces of a stream: events, if none is cut or joined
    ended_at: float | None = None
    left: bool = False  # its client has closed before the end


class SpeakingNode:
    """Its answers, and what it has heard. `order` is the standing one."""

    def __init__(self, order: Order | None = None, models: tuple[str, ...] = ("scripted",)) -> None:
        self.order = order or Order()
        self.models = models
        self.heard: deque[Heard] = deque(maxlen=HEARD_MAX)
        self.connections = 0
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> int:
        """Listen; the port."""
        self._server = await asyncio.start_server(self._serve, HOST, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening, and drop what is under way."""
        if self._server is not None:
            self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def told(self) -> JsonObject:
        """What `GET /control` says."""
        last = self.heard[-1] if self.heard else None
        return {
            "requests": len(self.heard),
            "connections": self.connections,
            "open": sum(each.ended_at is None for each in self.heard),
            "left": sum(each.left for each in self.heard),
            "written": sum(each.written for each in self.heard),
            "order": asdict(self.order),
            "last": None if last is None else {"path": last.path, "body": last.body, "written": last.written},
        }

    # -- HTTP

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self.connections += 1
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        try:
            early: bytes | None = b""
            while early is not None:
                method, path, body = await _request(early, reader)
                early = await self._answered(method, path, body, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError, ValueError):
            pass
        finally:
            self._serving.discard(task)
            writer.close()

    async def _answered(
        self, method: str, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | None:
        """Answer one request; as `_speak`."""
        below = path.removeprefix("/v1/")
        if method == "POST" and below in PATHS:
            asked = json.loads(body)
            heard = Heard(below, asked, ordered(body.decode(), self.order))
            self.heard.append(heard)
            return await self._speak(heard, reader, writer)
        if path == "/control":
            if method == "POST":
                self.order = replace(Order(), **json.loads(body))
            reply = Reply(200, json.dumps(self.told()).encode())
        elif path == "/v1/models":
            listed = [{"id": name, "object": "model", "created": 0, "owned_by": "scripted"} for name in self.models]
            reply = Reply(200, json.dumps({"object": "list", "data": listed}).encode())
        else:
            reply = Reply(200 if path == "/health" else 404, b"{}")
        _write_reply(writer, reply)
        return b""

    async def _speak(self, heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
        """Answer by the order, unless the client goes first. What has come of the next request; None if there is none.

        The client's end is noticed by reading.
        """
        speaking: asyncio.Future[Any] = asyncio.ensure_future(_spoken(heard, writer))
        reading: asyncio.Future[Any] = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({speaking, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not speaking.done() and reading.exception() is None and reading.result():
                await asyncio.wait({speaking})  # it sends the next request already
            heard.left = not speaking.done() or isinstance(speaking.exception(), ConnectionError)
            good = not heard.left and await speaking
        finally:
            heard.ended_at = time.monotonic()
            for each in (speaking, reading):
                each.cancel()
            await asyncio.gather(speaking, reading, return_exceptions=True)
        if not good or reading.cancelled():
            return b"" if good else None
        return bytes(reading.result()) or None


async def _spoken(heard: Heard, writer: asyncio.StreamWriter) -> bool:
    """The whole answer is written; whether the connection is still good."""
    asked, mode = Asked(heard.path, heard.body, heard.order.tokens), SPEECH_MODES[heard.order.mode]
    instead = mode.instead(asked)
    if isinstance(instead, End):
        return await _ended(instead, writer)
    if instead is not None:
        _write_reply(writer, instead)
    elif asked.streams and asked.path != "images/generations":
        return await _streamed(heard, asked, mode, writer)
    else:
        made = mode.whole(asked) if mode.whole is not whole else whole(asked)
        _write_reply(writer, Reply(200, json.dumps(made, ensure_ascii=False).encode()))
    await writer.drain()
    return True


async def _streamed(heard: Heard, asked: Asked, mode: SpeechMode, writer: asyncio.StreamWriter) -> bool:
    writes = mode.writes(asked, heard.order, mode.events(asked, heard.order))
    chunked = mode.framing == "chunked"
    framing = "Transfer-Encoding: chunked\r\n" if chunked else "Connection: close\r\n"
    if mode.framing == "length":
        kept = list(writes)
        framing, writes = (
            f"Content-Length: {sum(len(each) for each in kept if isinstance(each, bytes))}\r\n",
            iter(kept),
        )
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n{framing}\r\n".encode())
    next_at = time.monotonic()
    for each in writes:
        if isinstance(each, End):
            return await _ended(each, writer)
        if isinstance(each, bytes):
            writer.write(b"%x\r\n%b\r\n" % (len(each), each) if chunked and each else each)
            heard.written += 1
            await writer.drain()
        next_at += each if isinstance(each, float) else heard.order.pace_s
        await asyncio.sleep(max(0.0, next_at - time.monotonic()))
    if chunked:
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    return mode.framing != "closing"


async def _ended(end: End, writer: asyncio.StreamWriter) -> bool:
    if end is End.HANG:
        await asyncio.Event().wait()
    await writer.drain()
    if end is End.RESET:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        writer.transport.abort()
    return False


def ordered(text: str, standing: Order) -> Order:
    """The order in a request's text, or the standing one. Raises ValueError for one that nobody understands."""
    found = TOLD.search(text)
    if found is None:
        return standing
    mode, told = found[1], dict(each.split("=") for each in found[2].split())
    if mode not in SPEECH_MODES or not told.keys() <= {"at", "tokens", "pace"}:
        raise ValueError(found[0])
    return Order(mode, int(told.get("at", Order.at)), int(told.get("tokens", Order.tokens)), float(told.get("pace", 0)))


async def _request(early: bytes, reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """Method, path and body of the next request, of which something may have been read already."""
    head = (early + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
    size = int(headers.get("content-length", 0))
    if size > BODY_BYTES_MAX:
        raise ValueError("too large")
    return method, path, await reader.readexactly(size)


def _write_reply(writer: asyncio.StreamWriter, reply: Reply) -> None:
    more = RETRY_AFTER if reply.retry_after else ""
    head = f"HTTP/1.1 {reply.status} Scripted\r\nContent-Type: {reply.content_type}\r\n{more}"
    writer.write(f"{head}Content-Length: {len(reply.body)}\r\n\r\n".encode() + reply.body)


@asynccontextmanager
async def speaking(order: Order | None = None) -> AsyncIterator[tuple[SpeakingNode, int]]:
    """A speaking node in this process, and its port."""
    node = SpeakingNode(order)
    port = await node.start()
    try:
        yield node, port
    finally:
        with suppress(asyncio.CancelledError):
            await node.stop()


async def serve(
    port: int = 0, mode: str = "honest", at: int = Order.at, tokens: int = Order.tokens, pace_s: float = Order.pace_s
) -> None:
    """Its life as a process. It says its port in a line of JSON."""
    check_names([mode], list(SPEECH_MODES))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    node = SpeakingNode(Order(mode, at, tokens, pace_s))
    print(json.dumps({"ready": True, "port": await node.start(port)}), flush=True)
    await stop.wait()
    await node.stop()


if __name__ == "__main__":
    made = options_of(serve, {"port": "to listen at; 0 for any", "mode": "see below", "at": "byte or event"})
    made.epilog, made.formatter_class = "modes:\n" + speech_listed(), argparse.RawDescriptionHelpFormatter
    uvloop.run(serve(**given(made)))
