"""Log probabilities of an answer's tokens. Where a node says them otherwise, they are left out: no answer is spoilt."""

from itertools import accumulate
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType


class TopLogprobReply(msgspec.Struct):
    """A token that was likely at that place."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprobReply(msgspec.Struct):
    """A token of the answer, and the likely ones at its place."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprobReply] = []


class ChatLogprobsReply(msgspec.Struct):
    """Of a chat's answer."""

    content: list[TokenLogprobReply] | None = None
    refusal: list[TokenLogprobReply] | None = None


class TextLogprobsReply(msgspec.Struct):
    """Of a completion: arrays with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | UnsetType = UNSET


Known = TypeVar("Known", ChatLogprobsReply, TextLogprobsReply)


def chat_logprobs(said: object) -> ChatLogprobsReply | None:
    """Those of a chat's answer; None where they are not in OpenAI's form."""
    return _converted(said, ChatLogprobsReply)


def text_logprobs(said: Any) -> TextLogprobsReply | None:
    """Those of a completion; None where they are in no known form. llama.cpp has the form of a chat for both."""
    if isinstance(said, dict) and "tokens" not in said and said.get("content"):
        chat = _converted(said, ChatLogprobsReply)
        return _as_text(chat.content) if chat is not None and chat.content else None
    return _converted(said, TextLogprobsReply)


def _as_text(tokens: list[TokenLogprobReply]) -> TextLogprobsReply:
    return TextLogprobsReply(
        [each.token for each in tokens],
        [each.logprob for each in tokens],
        [{top.token: top.logprob for top in each.top_logprobs} for each in tokens],
        list(accumulate((len(each.token) for each in tokens[:-1]), initial=0)),
    )


def _converted(said: object, kind: type[Known]) -> Known | None:
    if not isinstance(said, dict):
        return None
    try:
        return msgspec.convert(said, kind)
    except (msgspec.ValidationError, RecursionError):
        return None
