"""Streams of twelve makes and manners are read the same, however their bytes come and wherever they are cut."""

import json
from typing import Any

import pytest

from bench.faultnode.recorded import RECORDED, STREAMS, Recorded
from embedmesh.http.sse import SseParser
from embedmesh.rules.errors import NodeBroke, NodeFailure
from embedmesh.upstream.generating import UpstreamStream
from embedmesh.upstream.http1 import Connection
from embedmesh.upstream.http1_stream import READ_BYTES_MAX, BodyStream

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

every = pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)


class Silent:
    """A transport that is never full and sends nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def stream_of(pieces: list[bytes], *, ends: bool) -> UpstreamStream:
    """The stream of a reply whose body comes in these pieces, each a chunk and a read; then it ends, or is cut."""
    connection = Connection()
    connection.connection_made(Silent())  # type: ignore[arg-type]
    body = BodyStream(connection, 1 << 20, lambda connection: None)
    wire = [CHUNKED, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece)]
    for read in [*wire, b"0\r\n\r\n"] if ends else wire:
        for at in range(0, len(read), READ_BYTES_MAX):
            some = read[at : at + READ_BYTES_MAX]
            body.get_buffer(-1)[: len(some)] = some
            body.buffer_updated(len(some))
    if not ends:
        body.connection_lost(None)
    return UpstreamStream(body)


async def events_of(stream: UpstreamStream) -> tuple[list[bytes], NodeFailure | None]:
    """Its events, and the failure that ended them, if one did."""
    events: list[bytes] = []
    try:
        while (event := await stream.next()) is not None:
            events.append(event)
    except NodeFailure as failure:
        return events, failure
    return events, None


def test_every_file_is_in_the_table() -> None:
    assert sorted(path.stem for path in STREAMS.iterdir()) == sorted(recorded.name for recorded in RECORDED)


@every
async def test_what_a_stream_says(recorded: Recorded) -> None:
    """Put together by hand: text, reasoning, calls, usage, finish."""
    found, failure = await events_of(stream_of([recorded.body], ends=True))
    assert failure is None and len(found) == recorded.events
    events = [json.loads(event) for event in found]
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice.get("delta", {"content": choice.get("text")}) for choice in choices]
    assert "".join(delta.get("content") or "" for delta in deltas) == recorded.text
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == recorded.reasoning
    calls: dict[str, list[str]] = {}
    for delta in deltas:
        for call in delta.get("tool_calls") or ():
            key = str(call.get("index", call.get("id")))
            whole = calls.setdefault(key, ["", ""])
            whole[0] += call["function"].get("name") or ""
            whole[1] += call["function"].get("arguments") or ""
    assert tuple((name, arguments) for name, arguments in calls.values()) == recorded.calls
    told = [event["usage"] for event in events if event.get("usage")]
    last = (told[-1]["prompt_tokens"], told[-1]["completion_tokens"]) if told else None
    assert last == recorded.usage
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [recorded.finish]


@every
async def test_any_split_is_the_same_stream(recorded: Recorded) -> None:
    """In two pieces at every offset, byte by byte, and all at once: also inside of a character and of CR LF."""
    body = recorded.body
    whole = await events_of(stream_of([body], ends=True))
    assert await events_of(stream_of([bytes([byte]) for byte in body], ends=True)) == whole
    for at in range(1, len(body)):
        assert await events_of(stream_of([body[:at], body[at:]], ends=True)) == whole, at


@every
async def test_a_stream_that_is_cut_anywhere_is_known_to_be(recorded: Recorded) -> None:
    """Its events are those that were whole, and then NodeBroke, unless [DONE] had come."""
    body = recorded.body
    whole, _ = await events_of(stream_of([body], ends=True))
    done = body.index(b"[DONE]") + len(b"[DONE]")
    for at in range(len(body) + 1):
        stream = stream_of([body[:at]], ends=False)
        events, failure = await events_of(stream)
        assert events == whole[: len(events)]
        events_whole = len(SseParser().feed(body[:at]))
        assert len(events) == min(events_whole, len(whole))
        if events_whole > len(whole):
            assert at > done and (failure, stream.end) == (None, "done")
        else:
            assert isinstance(failure, NodeBroke) and stream.end is None
