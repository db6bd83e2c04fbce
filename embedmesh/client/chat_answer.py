"""Answers of chats, with the names that the openai package has for them."""

from typing import Any, Literal

import msgspec


class ChatMessage(msgspec.Struct, frozen=True):
    """What the model says."""

    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One of several answers."""

    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatDelta(msgspec.Struct, frozen=True):
    """What one event adds to an answer."""

    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """One event of one of several answers."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatUsage(msgspec.Struct, frozen=True):
    """Tokens: what is paid."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(msgspec.Struct, frozen=True):
    """A whole reply. `node_id` is that of the node that has signed it."""

    id: str
    choices: list[ChatChoice]
    created: int
    model: str
    object: Literal["chat.completion"]
    usage: ChatUsage | None = None
    request_id: str | None = None
    node_id: str | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """One event of a stream. The last one has the `usage` that the node has signed."""

    id: str
    choices: list[ChatChunkChoice]
    created: int
    model: str
    object: Literal["chat.completion.chunk"]
    usage: ChatUsage | None = None
