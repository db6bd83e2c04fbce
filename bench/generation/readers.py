"""Callers of streams that note when each event came, and what was late."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from bench.generation.node import Spoken
from bench.rig.figures import percentile
from bench.rig.http import http_request
from bench.rig.processes import HOST

MOMENTS = re.compile(rb"T(\d{10}\.\d{6}),(\d{10}\.\d{6})T")
LAST = b"0\r\n\r\n"
STREAM_S = 60.0
PAUSE_S = 0.03  # of a caller that asks one thing after another: what it owed is written meanwhile
BEGUN_S = 1.0  # until all streams have begun: each has its money written to disk first
END_S = 0.2  # before the first of them ends


class Target(NamedTuple):
    """Where streams are asked for, and how: the model's name there, and the key."""

    port: int
    model: str
    key: str | None = None

    def request(self, spoken: Spoken) -> bytes:
        """One stream."""
        message = {"role": "user", "content": f"Say it. {spoken.asking}"}
        body = {"model": self.model, "messages": [message], "stream": True, "max_tokens": spoken.events + 8}
        return http_request("POST", "/v1/chat/completions", msgspec.json.encode(body), key=self.key)


class Reader(asyncio.Protocol):
    """One connection, and a stream on it.

    In seconds, of each event: `delays` from the moment it was meant for to its coming, `ways` from that of its writing.
    """

    def __init__(self) -> None:
        self.delays: list[float] = []
        self.ways: list[float] = []
        self.first_s = 0.0  # from the request to the first event
        self.head = b""
        self._tail = b""
        self._asked_at = 0.0
        self._ended: asyncio.Future[None]

    async def ask(self, request: bytes) -> None:
        """Until its end. Raises RuntimeError where it is no stream with an end."""
        self.delays, self.ways, self.head, self._tail = [], [], b"", b""
        self._ended = asyncio.get_running_loop().create_future()
        self.first_s = 0.0
        self._asked_at = time.monotonic()
        self._transport.write(request)
        async with asyncio.timeout(STREAM_S):
            await self._ended
        if not self.head.startswith(b"HTTP/1.1 200") or b"[DONE]" not in self._tail:
            raise RuntimeError(f"no whole stream: {self.head[:200]!r} … {self._tail[-200:]!r}")

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self.head:
            self.head = data[:512]
        data = self._tail + data
        end = 0
        for found in MOMENTS.finditer(data):
            self.delays.append(now - float(found[1]))
            self.ways.append(now - float(found[2]))
            end = found.end()
        if end and not self.first_s:
            self.first_s = now - self._asked_at
        self._tail = data[end:]
        if data.endswith(LAST) and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


async def connected(port: int) -> Reader:
    """A new connection."""
    _, reader = await asyncio.get_running_loop().create_connection(Reader, HOST, port)
    return reader


class Alone(NamedTuple):
    """Streams one after another, in ms: to the first event, and the way of later ones from the node to their reader."""

    first_p50_ms: float
    event_p50_ms: float
    event_p99_ms: float


class Together(NamedTuple):
    """Many streams at one time, once all have begun.

    Delays are from the moments that events were meant for; `in_time` is the share that came before the next one's.
    """

    delay_p50_ms: float
    delay_p99_ms: float
    in_time: float
    cpu_us: float  # of an event
    core: float  # the share of a core


async def alone(target: Target, streams: int, spoken: Spoken) -> Alone:
    """On one connection, which is there already, as an SDK's is. Raises RuntimeError."""
    first: list[float] = []
    ways: list[float] = []
    reader = await connected(target.port)
    try:
        for _ in range(streams):
            await reader.ask(target.request(spoken))
            first.append(1e3 * reader.first_s)
            ways += [1e3 * way for way in reader.ways[1:]]
            await asyncio.sleep(PAUSE_S)
    finally:
        reader.close()
    return Alone(percentile(first, 50), percentile(ways, 50), percentile(ways, 99))


async def together(target: Target, streams: int, spoken: Spoken, cpu_s: Callable[[], float]) -> Together:
    """All at one time; `cpu_s` says what the other side has used until now. Raises RuntimeError."""
    readers = [await connected(target.port) for _ in range(streams)]
    request = target.request(spoken)
    begun = int(BEGUN_S / spoken.pace_s)

    async def one(reader: Reader, at: int) -> None:
        await asyncio.sleep(at * spoken.pace_s / streams)  # or all would be due at one moment
        await reader.ask(request)

    async def used() -> tuple[float, float]:
        """CPU seconds of an event, and of a second."""
        await asyncio.sleep(BEGUN_S)
        before, at, events = cpu_s(), time.monotonic(), sum(len(reader.delays) for reader in readers)
        await asyncio.sleep(spoken.events * spoken.pace_s - BEGUN_S - END_S)
        spent, took = cpu_s() - before, time.monotonic() - at
        return spent / (sum(len(reader.delays) for reader in readers) - events), spent / took

    try:
        async with asyncio.TaskGroup() as group:
            using = group.create_task(used())
            for at, reader in enumerate(readers):
                group.create_task(one(reader, at))
    finally:
        for reader in readers:
            reader.close()
    if wrong := [len(reader.delays) for reader in readers if len(reader.delays) != spoken.events]:
        raise RuntimeError(f"{wrong[0]} events instead of {spoken.events}")
    delays = [1e3 * delay for reader in readers for delay in reader.delays[begun:]]
    in_time = sum(delay < 1e3 * spoken.pace_s for delay in delays) / len(delays)
    an_event, a_second = using.result()
    return Together(percentile(delays, 50), percentile(delays, 99), in_time, 1e6 * an_event, a_second)
