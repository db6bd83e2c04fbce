"""What a speaking node can do wrong: one table. Each mode says what it does in one sentence.

A mode may act on the `events` before they are written, on the `writes` (what goes out at one time, pauses and ends
among them), on a `whole` reply, or `instead` of any answer. What it has no hook for is honest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.faultnode import speech
from bench.faultnode import speech_acts as acts
from bench.faultnode.recorded import RECORDED
from bench.faultnode.speech import DONE, Asked, Event, frame, frames
from bench.faultnode.speech_acts import End, Order, Reply, Write


@dataclass(frozen=True)
class SpeechMode:
    """One way to be wrong, or merely odd: `odd` ones must be read as if they were honest."""

    says: str
    events: Callable[[Asked, Order], list[Event]] = lambda asked, order: speech.events(asked)
    writes: Callable[[Asked, Order, list[Event]], Iterator[Write]] = lambda asked, order, events: frames(events)
    whole: Callable[[Asked], Any] = speech.whole
    instead: Callable[[Asked], Reply | End | None] = lambda asked: None
    framing: str = "chunked"  # or "length", or "closing"
    odd: bool = False


SPEECH_MODES: dict[str, SpeechMode] = {
    "honest": SpeechMode("answers right", odd=True),
    # odd, and yet right
    "bytewise": SpeechMode("each byte of the stream is written by itself", writes=acts.bytewise, odd=True),
    "drip": SpeechMode("one byte every 0.02 s (pace)", writes=acts.drip, odd=True),
    "late": SpeechMode("the first event comes after `at` seconds", writes=acts.late),
    "at-once": SpeechMode("the whole stream in one write", writes=acts.at_once, odd=True),
    "crlf": SpeechMode("lines end in CR LF", writes=acts.respelled(lambda f: f.replace(b"\n", b"\r\n")), odd=True),
    "cr": SpeechMode("lines end in CR", writes=acts.respelled(lambda f: f.replace(b"\n", b"\r")), odd=True),
    "no-space": SpeechMode(
        "`data:` without a blank", writes=acts.respelled(lambda f: f.replace(b": ", b":", 1)), odd=True
    ),
    "mark": SpeechMode("a byte order mark first", writes=acts.respelled(lambda f: f, b"\xef\xbb\xbf"), odd=True),
    "comments": SpeechMode(
        "comments, names and ids between events",
        writes=acts.respelled(lambda f: b": ping\n\nevent: x\nid: 7\nretry: 9\n" + f),
        odd=True,
    ),
    "blank-events": SpeechMode(
        "events with empty data between", writes=acts.respelled(lambda f: b"data:\n\n" + f), odd=True
    ),
    "length": SpeechMode("the stream has a Content-Length", framing="length", odd=True),
    "closing": SpeechMode("only the connection's end ends the stream", framing="closing", odd=True),
    "no-done": SpeechMode("no [DONE]", writes=acts.respelled(lambda f: f, done=False), odd=True),
    "refuses-options": SpeechMode("400 where the request has `stream_options`", instead=acts.refuses_options, odd=True),
    # usage
    "no-usage": SpeechMode("no usage", events=acts.usage_is(), whole=acts.usage_in_whole(None)),
    "usage-twice": SpeechMode(
        "usage in two events, the first is too small",
        events=acts.usage_is({"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, "true"),
    ),
    "usage-absurd": SpeechMode(
        "a usage of 10^12 tokens, whose sum is wrong",
        events=acts.usage_is(acts.ABSURD_USAGE),
        whole=acts.usage_in_whole(acts.ABSURD_USAGE),
    ),
    "usage-negative": SpeechMode(
        "a usage below zero", events=acts.usage_is(acts.NEGATIVE_USAGE), whole=acts.usage_in_whole(acts.NEGATIVE_USAGE)
    ),
    "usage-text": SpeechMode("usage is a text", events=acts.usage_is("many"), whole=acts.usage_in_whole("many")),
    "usage-in-each": SpeechMode("every event has the usage until then", events=acts.usage_in_each),
    "usage-on-finish": SpeechMode("the usage is on the last choice's event", events=acts.usage_on_finish),
    "usage-unasked": SpeechMode("the usage comes though nobody wants it", events=acts.usage_is("true")),
    # what names the answer
    "wrong-ids": SpeechMode(
        "each event has another id and time", events=acts.changed(id=lambda at: f"x{at}", created=int)
    ),
    "wrong-model": SpeechMode(
        "`model` is a path of the server",
        events=acts.changed(model=acts.PATH_OF_MODEL),
        whole=lambda asked: speech.whole(asked) | {"model": acts.PATH_OF_MODEL},
    ),
    "bare": SpeechMode(
        "events have `choices` only",
        events=lambda asked, order: [{"choices": each["choices"]} for each in speech.events(asked)],
    ),
    "logprobs": SpeechMode("tokens have log probabilities", events=acts.with_logprobs, whole=acts.logprobs_in_whole),
    # tool calls
    "tools": SpeechMode("calls a tool, in pieces", events=acts.tools, whole=acts.tools_in_whole),
    "tools-interleaved": SpeechMode(
        "two calls, whose pieces come in turns", events=acts.tools_interleaved, whole=acts.tools_in_whole
    ),
    "tools-no-index": SpeechMode(
        "two calls without `index`", events=acts.tools_without_index, whole=acts.tools_in_whole
    ),
    "tools-split-name": SpeechMode(
        "a tool's name in two pieces", events=acts.tools_split_name, whole=acts.tools_in_whole
    ),
    "tools-nulls": SpeechMode(
        "later pieces have id, type and name of null", events=acts.tools_with_nulls, whole=acts.tools_in_whole
    ),
    "tools-ids": SpeechMode("every piece has the call's id", events=acts.tools_with_ids, whole=acts.tools_in_whole),
    "tools-at-once": SpeechMode("two whole calls in one event", events=acts.tools_at_once, whole=acts.tools_in_whole),
    # broken
    "cut": SpeechMode("hangs up after byte `at` of the stream", writes=acts.cut),
    "dies": SpeechMode("hangs up after `at` events", writes=acts.broken_off(End.CLOSE)),
    "resets": SpeechMode("a TCP reset after `at` events", writes=acts.broken_off(End.RESET)),
    "stalls": SpeechMode("says no more after `at` events", writes=acts.broken_off(End.HANG)),
    "errs": SpeechMode("an error event after `at` events, and then [DONE]", writes=acts.broken_off(acts.ERROR, DONE)),
    "errs-first": SpeechMode("an error is the first event", writes=acts.errs_first),
    "too-long-first": SpeechMode(
        "an error about the context is the first event",
        writes=lambda asked, order, events: iter((frame(acts.TOO_LONG), DONE)),
    ),
    "empty": SpeechMode("a stream without events", writes=lambda asked, order, events: iter(())),
    "done-only": SpeechMode("a stream of [DONE]", writes=lambda asked, order, events: iter((DONE,))),
    "no-finish": SpeechMode("[DONE], and no choice has finished", events=acts.without_finish),
    "no-end": SpeechMode(
        "no choice has finished, and no [DONE]",
        events=acts.without_finish,
        writes=acts.respelled(lambda f: f, done=False),
    ),
    "after-done": SpeechMode(
        "more events after [DONE]", writes=lambda asked, order, events: iter([*frames(events), *frames(events)])
    ),
    "endless": SpeechMode("never stops", writes=acts.endless),
    "large-event": SpeechMode("an event of more than a mebibyte", writes=acts.too_large),
    "no-json": SpeechMode(
        "an event that is no JSON", writes=lambda asked, order, events: iter((frame(events[0]), frame("{"), DONE))
    ),
    # instead
    "hang": SpeechMode("takes the request and never answers", instead=lambda asked: End.HANG),
    "close-at-once": SpeechMode("hangs up without a byte", instead=lambda asked: End.CLOSE),
    "reset-at-once": SpeechMode("a TCP reset when the request has come", instead=lambda asked: End.RESET),
    "html": SpeechMode("a web page with status 200", instead=lambda asked: Reply(200, acts.PAGE, "text/html")),
    "error-200": SpeechMode("an error object with status 200", instead=acts.refusal(200, acts.ERROR)),
    "busy-429": SpeechMode("429 with Retry-After", instead=acts.refusal(429, acts.ERROR, retry_after=True)),
    "busy-503": SpeechMode("503 with Retry-After", instead=acts.refusal(503, acts.ERROR, retry_after=True)),
    "error-500": SpeechMode("500 at once", instead=acts.refusal(500, acts.ERROR)),
    "refuse-400": SpeechMode("400 at once", instead=acts.refusal(400, acts.REFUSAL)),
    "refuse-401": SpeechMode("401 at once", instead=acts.refusal(401, acts.REFUSAL)),
    "refuse-404": SpeechMode("404 at once", instead=acts.refusal(404, acts.REFUSAL)),
    "too-long": SpeechMode("400: the context does not suffice", instead=acts.refusal(400, acts.TOO_LONG)),
    # images
    "image-url": SpeechMode(
        "images are URLs of the server", whole=acts.image_data(lambda each: {"url": "http://10.0.0.1/secret.png"})
    ),
    "image-text": SpeechMode("images are no base64", whole=acts.image_data(lambda each: {"b64_json": "not base64!"})),
    "image-few": SpeechMode(
        "one image too few", whole=lambda asked: {"created": speech.CREATED, "data": speech.images(asked)["data"][1:]}
    ),
}


SPEECH_MODES |= {
    f"as-{one.name.replace('_', '-')}": SpeechMode(
        f"a recorded stream, `at` bytes a write: {one.says}", writes=acts.replayed(one.body)
    )
    for one in RECORDED
}


def speech_listed() -> str:
    """The table, for `--help`."""
    return "\n".join(f"  {name:25}{mode.says}" for name, mode in SPEECH_MODES.items())
