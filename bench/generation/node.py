"""A server of chats that costs nearly nothing: `python -m bench.generation.node PORT`.

Each event of a stream is one write, and tells its moments, on the clock that all processes share. What is asked for
stands in a request's text: see `Spoken.asking`. It stops writing where its client does not read.
"""

import asyncio
import json
import re
import sys
import time
from typing import Any, NamedTuple

import uvloop

from bench.rig.processes import HOST

TOLD = re.compile(rb"<<events=(\d+) pace=([\d.]+) size=(\d+)>>")
MOMENTS = b"T%017.6f,%017.6fT"
"""Of an event: what it was meant for, and when it was written, in seconds of `time.monotonic`."""
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n"
)
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
NAMES = '"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"scripted",'
PROMPT_TOKENS = 7
BURST = 16  # events without a pause, until others have their turn


class Spoken(NamedTuple):
    """One stream: events, seconds from one to the next (0: as fast as they are read), bytes of text in each."""

    events: int
    pace_s: float = 0.0
    text_bytes: int = 37

    @property
    def asking(self) -> str:
        """The text that asks for it."""
        return f"<<events={self.events} pace={self.pace_s} size={self.text_bytes}>>"

    @classmethod
    def told(cls, body: bytes) -> "Spoken":
        """What a request asks for; one event where it says nothing."""
        found = TOLD.search(body)
        return cls(1) if found is None else cls(int(found[1]), float(found[2]), int(found[3]))


def event(**members: Any) -> bytes:
    """One of a stream, as a chunk of HTTP."""
    rest = json.dumps(members, separators=(",", ":"))[1:]
    data = b"data: {%b%b\n\n" % (NAMES.encode(), rest.encode())
    return b"%x\r\n%b\r\n" % (len(data), data)


def said(text: str, finish: str | None = None) -> dict[str, Any]:
    """The choices of an event."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}]}


def ending(events: int) -> bytes:
    """What follows the last event."""
    told = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": events, "total_tokens": PROMPT_TOKENS + events}
    return event(**said("", "stop")) + event(choices=[], usage=told) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class CheapNode(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._data = b""
        self._begun = 0.0
        self._at = 0
        self._spoken = Spoken(0)
        self._template = b""
        self._paused = False
        self._next: asyncio.Handle | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport
        self._loop = asyncio.get_running_loop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._spoken.events and self._next is None:
            self._speak()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, mark, rest = self._data.partition(HEAD_END)
        length = LENGTH.search(head)
        size = int(length[1]) if length else 0
        if not mark or len(rest) < size:
            return
        self._data = rest[size:]
        self._answer(head, rest[:size])

    def _answer(self, head: bytes, body: bytes) -> None:
        if b'"stream":true' in body.replace(b": ", b":"):
            self._spoken, self._at, self._begun = Spoken.told(body), 0, time.monotonic()
            text = MOMENTS % (0.0, 0.0)
            filled = text.decode() + "x" * (self._spoken.text_bytes - len(text))
            self._template = event(**said(filled)).replace(text, MOMENTS)
            self._transport.write(HEAD)
            self._speak()
        elif head.startswith(b"POST"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
            usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 1, "total_tokens": PROMPT_TOKENS + 1}
            self._say({"object": "chat.completion", "choices": [choice], "usage": usage})
        else:
            self._say(
                {"object": "list", "data": [{"id": "scripted", "object": "model", "created": 0, "owned_by": "x"}]}
            )

    def _say(self, reply: dict[str, Any]) -> None:
        encoded = json.dumps(reply).encode()
        self._transport.write(JSON % (len(encoded), encoded))

    def _speak(self) -> None:
        """Write what is due, and come again."""
        self._next = None
        events, pace_s, _ = self._spoken
        for _ in range(BURST):
            if self._paused:
                return
            if self._at >= events:
                self._transport.write(ending(events))
                self._spoken = Spoken(0)
                return
            now = time.monotonic()
            due = self._begun + self._at * pace_s if pace_s else now
            if due > now:
                self._next = self._loop.call_later(due - now, self._speak)
                return
            self._at += 1
            self._transport.write(self._template % (due, now))
        self._next = self._loop.call_soon(self._speak)

    def _stop(self) -> None:
        self._spoken = Spoken(0)
        if self._next is not None:
            self._next.cancel()


async def serve(port: int) -> None:
    """Until it is killed."""
    server = await asyncio.get_running_loop().create_server(CheapNode, HOST, port, backlog=1_024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
