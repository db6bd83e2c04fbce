"""What a speaking node says when nothing is wrong: texts, tool calls and images that a bench knows beforehand.

Pure. One token is one event. A number of tokens always has the same text, whose characters have one to four bytes.
"""

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

WORDS = (
    "Plain",
    " words",
    " gr\u00fc\u00dfen",
    " \u20ac5",
    " \u4f60\u597d",
    " \U0001f600",
    ' "quoted"',
    "\nline",
    " \\",
    ".",
)
TOKENS = 12  # where an order does not say how many
PROMPT_TOKENS = 7  # that it claims to have read
CREATED = 1_700_000_000
FINGERPRINT = "fp_scripted"
DONE = b"data: [DONE]\n\n"

Event = dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, as it is after assembling."""

    id: str
    name: str
    arguments: str

    @property
    def pieces(self) -> list[str]:
        """Its arguments, as a stream has them: a few characters a piece."""
        return [self.arguments[at : at + 5] for at in range(0, len(self.arguments), 5)]

    def whole(self, index: int) -> Event:
        return {
            "index": index,
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


CALLS = (
    ToolCall("call_a1", "get_weather", '{"city": "Z\u00fcrich", "days": 3}'),
    ToolCall("call_b2", "get_time", '{"zone": "Europe/\u00c5land"}'),
)


@dataclass(frozen=True)
class Asked:
    """One request, as much of it as decides the answer."""

    path: str  # below /v1/
    body: dict[str, Any]
    tokens: int = TOKENS

    @property
    def chat(self) -> bool:
        return self.path == "chat/completions"

    @property
    def model(self) -> str:
        return str(self.body.get("model"))

    @property
    def choices(self) -> int:
        """Answers: of completions, for each prompt."""
        prompts = self.body.get("prompt")
        several = len(prompts) if isinstance(prompts, list) and not isinstance(prompts[0], int) else 1
        return several * int(self.body.get("n") or 1)

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def says(self) -> int:
        """Tokens of one answer: no more than the request allows."""
        limit = self.body.get("max_completion_tokens") or self.body.get("max_tokens") or self.tokens
        return min(self.tokens, int(limit))

    @property
    def finish(self) -> str:
        return "length" if self.says < self.tokens else "stop"


def tokens(count: int) -> list[str]:
    """The text of that many tokens, token by token."""
    return [WORDS[at % len(WORDS)] for at in range(count)]


def text(count: int) -> str:
    return "".join(tokens(count))


def usage(asked: Asked) -> Event:
    """What it has used, truly."""
    made = asked.says * asked.choices
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": made, "total_tokens": PROMPT_TOKENS + made}


def event(asked: Asked, choices: list[Event], **more: Any) -> Event:
    """One event of a stream."""
    kind = "chat.completion.chunk" if asked.chat else "text_completion"
    head = {"id": "cmpl-scripted-1", "object": kind, "created": CREATED, "model": asked.model}
    return head | {"system_fingerprint": FINGERPRINT, "choices": choices} | more


def delta(index: int, finish: str | None = None, **members: Any) -> Event:
    """One choice of a chat's event."""
    return {"index": index, "delta": members, "logprobs": None, "finish_reason": finish}


def events(asked: Asked) -> list[Event]:
    """A whole stream in order, `[DONE]` aside: the choices in turns, then their ends, then the usage if wanted."""
    found, every = [], range(asked.choices)
    if asked.chat:
        found += [event(asked, [delta(at, role="assistant", content="")]) for at in every]
    for token in tokens(asked.says):
        found += [event(asked, [_said(asked, at, token, None)]) for at in every]
    found += [event(asked, [_said(asked, at, "", asked.finish)]) for at in every]
    if asked.wants_usage:
        found.append(event(asked, [], usage=usage(asked)))
    return found


def _said(asked: Asked, index: int, token: str, finish: str | None) -> Event:
    if asked.chat:
        return delta(index, finish, content=token) if token else delta(index, finish)
    return {"index": index, "text": token, "logprobs": None, "finish_reason": finish}


def called(asked: Asked, deltas: list[list[Event]], **first: Any) -> list[Event]:
    """A chat's stream of tool calls, from what each event has of them."""
    opening = {"role": "assistant", "content": None} | first
    found = [event(asked, [delta(0, **opening)])]
    found += [event(asked, [delta(0, tool_calls=calls)]) for calls in deltas]
    found.append(event(asked, [delta(0, "tool_calls")]))
    if asked.wants_usage:
        found.append(event(asked, [], usage=usage(asked)))
    return found


def whole(asked: Asked) -> Event:
    """A reply that is no stream."""
    if asked.path == "images/generations":
        return images(asked)
    said, every = text(asked.says), range(asked.choices)
    if asked.chat:
        message = {"role": "assistant", "content": said, "refusal": None}
        choices = [{"index": at, "message": message, "logprobs": None, "finish_reason": asked.finish} for at in every]
    else:
        choices = [{"index": at, "text": said, "logprobs": None, "finish_reason": asked.finish} for at in every]
    kind = "chat.completion" if asked.chat else "text_completion"
    return event(asked, choices, object=kind, usage=usage(asked))


def images(asked: Asked) -> Event:
    """As many images as wanted, of the size wanted, each a PNG of one colour."""
    width, height = (int(side) for side in str(asked.body.get("size") or "64x64").split("x"))
    pictures = [base64.b64encode(png(width, height, shade)).decode() for shade in range(asked.choices)]
    return {"created": CREATED, "data": [{"b64_json": picture, "revised_prompt": "As asked."} for picture in pictures]}


def png(width: int, height: int, shade: int) -> bytes:
    """A grey PNG."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes([shade % 256]) * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows, 9)) + part(b"IEND", b"")


def frame(data: Event | str) -> bytes:
    """One event on the wire."""
    written = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {written}\n\n".encode()


def frames(found: list[Event]) -> Iterator[bytes]:
    """A whole stream on the wire, event by event."""
    yield from map(frame, found)
    yield DONE
