"""How each wrong thing is said: other events, other writes, another whole reply, or something else instead."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bench.faultnode import speech
from bench.faultnode.speech import CALLS, DONE, Asked, Event, called, frame, frames

DRIP_S = 0.02  # between two bytes
LARGE_BYTES = 1_200_000  # of one event; a gateway takes a mebibyte
ABSURD = 10**12
PATH_OF_MODEL = "/srv/models/secret-name.gguf"
PAGE = b"<!DOCTYPE html><html><body><h1>Welcome to nginx!</h1></body></html>"


class End(Enum):
    """How a reply is broken off."""

    CLOSE = "close"  # without the body's own end
    RESET = "reset"
    HANG = "hang"  # until the other side goes


Write = bytes | float | End
"""What goes out at one time; seconds of a pause; or an end."""


@dataclass(frozen=True)
class Order:
    """How one request is answered. `at` is a byte or an event, as the mode has it; `pace_s` is between two writes."""

    mode: str = "honest"
    at: int = 3
    tokens: int = speech.TOKENS
    pace_s: float = 0.0


@dataclass(frozen=True)
class Reply:
    """A reply instead of an answer."""

    status: int
    body: bytes
    content_type: str = "application/json"
    retry_after: bool = False


# -- other events


def usage_is(*found: object) -> Callable[[Asked, Order], list[Event]]:
    """The stream ends with these usages, wanted or not; "true" stands for the right one."""

    def events(asked: Asked, order: Order) -> list[Event]:
        kept = [each for each in speech.events(asked) if each["choices"]]
        said = [speech.usage(asked) if each == "true" else each for each in found]
        return kept + [speech.event(asked, [], usage=each) for each in said]

    return events


def usage_in_whole(found: object) -> Callable[[Asked], Any]:
    """The reply has that usage; None for none at all."""
    return lambda asked: {k: v for k, v in (speech.whole(asked) | {"usage": found}).items() if v is not None}


def usage_in_each(asked: Asked, order: Order) -> list[Event]:
    found = speech.events(asked)
    for at, each in enumerate(found):
        made = min(at, asked.says * asked.choices)
        each["usage"] = {"prompt_tokens": speech.PROMPT_TOKENS, "completion_tokens": made}
        each["usage"]["total_tokens"] = speech.PROMPT_TOKENS + made
    return found


def usage_on_finish(asked: Asked, order: Order) -> list[Event]:
    found = [each for each in speech.events(asked) if each["choices"]]
    return [*found[:-1], found[-1] | {"usage": speech.usage(asked)}]


def changed(**members: object) -> Callable[[Asked, Order], list[Event]]:
    """Every event has other members; a callable makes one from the event's number."""

    def events(asked: Asked, order: Order) -> list[Event]:
        return [
            each | {name: value(at) if callable(value) else value for name, value in members.items()}
            for at, each in enumerate(speech.events(asked))
        ]

    return events


def without_finish(asked: Asked, order: Order) -> list[Event]:
    return [each for each in speech.events(asked) if all(c["finish_reason"] is None for c in each["choices"])]


def with_logprobs(asked: Asked, order: Order) -> list[Event]:
    """Each token has its log probability, and what else was likely."""
    found = speech.events(asked)
    for choice in (choice for each in found for choice in each["choices"]):
        said = choice.get("text") or choice.get("delta", {}).get("content")
        choice["logprobs"] = _logprobs(asked, [said]) if said else None
    return found


def logprobs_in_whole(asked: Asked) -> Any:
    reply = speech.whole(asked)
    for choice in reply.get("choices", ()):
        choice["logprobs"] = _logprobs(asked, speech.tokens(asked.says))
    return reply


def _logprobs(asked: Asked, said: list[str]) -> Event:
    if not asked.chat:
        offsets = [len("".join(said[:at])) for at in range(len(said))]
        return {"tokens": said, "token_logprobs": [-0.5] * len(said), "top_logprobs": None, "text_offset": offsets}
    top = [{"token": "other", "logprob": -1.5, "bytes": list(b"other")}]
    return {
        "content": [
            {"token": each, "logprob": -0.5, "bytes": list(each.encode()), "top_logprobs": top} for each in said
        ],
        "refusal": None,
    }


# -- tool calls in every known shape


def _named(index: int, **more: Any) -> Event:
    call = CALLS[index]
    return {"index": index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}} | more


def _argued(index: int, piece: str, **more: Any) -> Event:
    return {"index": index, "function": {"arguments": piece}} | more


def tools(asked: Asked, order: Order) -> list[Event]:
    return called(asked, [[_named(0)], *([_argued(0, piece)] for piece in CALLS[0].pieces)])


def tools_interleaved(asked: Asked, order: Order) -> list[Event]:
    pieces: list[list[Event]] = [[_named(0)], [_named(1)]]
    most = max(len(call.pieces) for call in CALLS)
    for at in range(most):
        pieces += [[_argued(index, call.pieces[at])] for index, call in enumerate(CALLS) if at < len(call.pieces)]
    return called(asked, pieces)


def tools_without_index(asked: Asked, order: Order) -> list[Event]:
    whole = [call.whole(index) for index, call in enumerate(CALLS)]
    return called(asked, [[{k: v for k, v in call.items() if k != "index"}] for call in whole], content="")


def tools_split_name(asked: Asked, order: Order) -> list[Event]:
    name = CALLS[0].name
    first = _named(0, function={"name": name[:4], "arguments": ""})
    second = {"index": 0, "function": {"name": name[4:]}}
    return called(asked, [[first], [second], *([_argued(0, piece)] for piece in CALLS[0].pieces)])


def tools_with_nulls(asked: Asked, order: Order) -> list[Event]:
    rest = [
        [_argued(0, piece, id=None, type=None, function={"name": None, "arguments": piece})]
        for piece in CALLS[0].pieces
    ]
    return called(asked, [[_named(0, function={"name": CALLS[0].name, "arguments": None})], *rest])


def tools_with_ids(asked: Asked, order: Order) -> list[Event]:
    return called(asked, [[_named(0)], *([_argued(0, piece, id=CALLS[0].id)] for piece in CALLS[0].pieces)])


def tools_at_once(asked: Asked, order: Order) -> list[Event]:
    return called(asked, [[call.whole(index) for index, call in enumerate(CALLS)]], content="")


def tools_in_whole(asked: Asked) -> Any:
    """A whole reply of tool calls, whose content is null."""
    calls = [{k: v for k, v in call.whole(index).items() if k != "index"} for index, call in enumerate(CALLS)]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
    return speech.event(asked, [choice], object="chat.completion", usage=speech.usage(asked))


# -- other writes


def bytewise(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
    for each in frames(events):
        yield from (bytes([byte]) for byte in each)


def drip(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
    for byte in bytewise(asked, order, events):
        yield byte
        yield order.pace_s or DRIP_S


def late(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
    yield float(order.at)
    yield from frames(events)


def at_once(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
    yield b"".join(frames(events))


def cut(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
    """After byte `at` of the body; of one that is shorter, nothing is cut but the last chunk."""
    yield b"".join(frames(events))[: order.at]
    yield End.CLOSE


def broken_off(end: Write | Event, *more: Write | Event) -> Callable[[Asked, Order, list[Event]], Iterator[Write]]:
    """`at` events, and then this."""

    def writes(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
        yield from map(frame, events[: order.at])
        for each in (end, *more):
            yield frame(each) if isinstance(each, dict) else each

    return writes


def errs_first(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
    yield frame(ERROR)
    yield DONE


def endless(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
    while True:
        for token in speech.tokens(len(speech.WORDS)):
            yield frame(speech.event(asked, [speech._said(asked, 0, token, None)]))


def too_large(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
    yield frame(events[0])
    yield frame(speech.event(asked, [speech._said(asked, 0, "x" * LARGE_BYTES, None)]))
    yield DONE


def respelled(
    spell: Callable[[bytes], bytes], before: bytes = b"", done: bool = True
) -> Callable[[Asked, Order, list[Event]], Iterator[Write]]:
    """Each event spelled in another way; `before` all of them."""

    def writes(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
        if before:
            yield before
        yield from map(spell, map(frame, events))
        if done:
            yield spell(DONE)

    return writes


def replayed(body: bytes) -> Callable[[Asked, Order, list[Event]], Iterator[Write]]:
    """This, whatever was asked; all at once where `at` is 0."""

    def writes(asked: Asked, order: Order, events: list[Event]) -> Iterator[Write]:
        size = order.at or len(body)
        yield from (body[at : at + size] for at in range(0, len(body), size))

    return writes


ERROR: Event = {
    "error": {"message": "CUDA out of memory: scripted", "type": "internal_error", "param": None, "code": 500}
}
REFUSAL = {"error": {"message": "Scripted: the request is wrong.", "type": "invalid_request_error", "code": None}}
TOO_LONG = {
    "error": {
        "message": "This model's maximum context length is 128 tokens. Scripted.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
}


def refusal(status: int, error: object, *, retry_after: bool = False) -> Callable[[Asked], Reply]:
    return lambda asked: Reply(status, json.dumps(error).encode(), retry_after=retry_after)


def refuses_options(asked: Asked) -> Reply | None:
    if "stream_options" not in asked.body:
        return None
    error = {"object": "error", "message": "Extra inputs are not permitted: stream_options", "code": 400}
    return Reply(400, json.dumps(error).encode())


def image_data(make: Callable[[Event], Event]) -> Callable[[Asked], Any]:
    """Each image is another object; other replies are honest."""

    def whole(asked: Asked) -> Any:
        said = speech.whole(asked)
        return said | {"data": [make(each) for each in said["data"]]} if "data" in said else said

    return whole


ABSURD_USAGE = {"prompt_tokens": ABSURD, "completion_tokens": ABSURD, "total_tokens": 1}
NEGATIVE_USAGE = {"prompt_tokens": -5, "completion_tokens": -5, "total_tokens": -10}
