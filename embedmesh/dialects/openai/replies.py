"""What all replies to requests to generate share: how a node's JSON is read, and the words that are ours.

Replies are written anew from structs of ours, so that nothing passes that is not named here: no path of a model's file,
no timings, no echo of a prompt.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from embedmesh.rules.errors import NodeBroke, NotAsAsked, WrongAnswer
from embedmesh.rules.generation import Prompt, TokenCounts

Struct = TypeVar("Struct", bound=msgspec.Struct)
FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "function_call": "function_call",
    "max_tokens": "length",
    "max_length": "length",
    "model_length": "length",
    "tool_use": "tool_calls",
    "tool_call": "tool_calls",
    "safety": "content_filter",
    "recitation": "content_filter",
    "blocklist": "content_filter",
    "prohibited_content": "content_filter",
}
"""What nodes of other makes say of an answer's end, in lower case. Any other word (`eos_token`, `end_turn`,
`stop_sequence`) says that the model ended it: `stop`."""
BREAKS = frozenset(("abort", "aborted", "cancelled", "canceled", "error", "failed", "timeout"))
"""Of an answer's end: the node broke it off. It must not look like one that is whole."""
TOKENS_MAX = 2**53  # of a usage; above it, JSON readers differ
ENCODE = msgspec.json.Encoder().encode

Index = Annotated[int, Meta(ge=0)]
TokenCount = Annotated[int, Meta(ge=0)]
Created = Annotated[int, Meta(description="When the answer began: Unix time in seconds.")]
NamedModel = Annotated[str, Meta(description="As the request names it.")]


class PromptTokensReply(msgspec.Struct):
    """Of the prompt's tokens."""

    cached_tokens: TokenCount


class CompletionTokensReply(msgspec.Struct):
    """Of the answers' tokens."""

    reasoning_tokens: TokenCount


class GenerationUsageReply(msgspec.Struct):
    """What is charged for, in tokens."""

    prompt_tokens: TokenCount
    completion_tokens: TokenCount
    total_tokens: TokenCount
    prompt_tokens_details: PromptTokensReply | UnsetType = UNSET
    completion_tokens_details: CompletionTokensReply | UnsetType = UNSET


def usage_reply(usage: TokenCounts) -> GenerationUsageReply:
    """In OpenAI's words."""
    return GenerationUsageReply(
        usage.input,
        usage.output,
        usage.input + usage.output,
        PromptTokensReply(usage.cached) if usage.cached else UNSET,
        CompletionTokensReply(usage.reasoning) if usage.reasoning else UNSET,
    )


def usage_of(said: object) -> TokenCounts | None:
    """What a node says it has used; None where that cannot be: no counts, or counts that contradict each other."""
    if not isinstance(said, dict):
        return None
    prompt, completion = said.get("prompt_tokens"), said.get("completion_tokens")
    if not _is_count(prompt) or not _is_count(completion):
        return None
    total = said.get("total_tokens")
    if total is not None and (not _is_count(total) or total != prompt + completion):
        return None
    cached = _detail(said.get("prompt_tokens_details"), "cached_tokens")
    reasoning = _detail(said.get("completion_tokens_details"), "reasoning_tokens")
    if cached > prompt:
        return None
    return TokenCounts(prompt, completion, cached, reasoning if reasoning <= completion else 0)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= TOKENS_MAX


def _detail(details: object, name: str) -> int:
    value = details.get(name) if isinstance(details, dict) else None
    return value if type(value) is int and 0 < value <= TOKENS_MAX else 0


def decoded(decode: Callable[[bytes], Struct], reply: bytes) -> Struct:
    """What a node has sent, or WrongAnswer."""
    try:
        return decode(reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise WrongAnswer("The answer is not JSON of the form of the API.") from None


def check_no_error(error: object, kind: object) -> None:
    """Raise NodeBroke where a node sends an error instead of an answer. Its words may be a caller's own."""
    if error not in (None, False, "") or kind == "error":
        raise NodeBroke("The node has sent an error instead of an answer.")


def finish_reason_of(said: object) -> FinishReason | None:
    """How an answer ended; None while it has not. Raises NodeBroke where the node broke it off."""
    if said is None or said == "":
        return None
    if type(said) is not str:
        raise WrongAnswer("The reason for an answer's end is no string.")
    if (known := FINISH_REASONS.get(said)) is not None:
        return known
    word = said.lower()
    if word in BREAKS:
        raise NodeBroke("The node has broken its answer off.")
    return FINISH_REASONS.get(word, "stop")


def text_of(said: object, what: str) -> str | None:
    """A string or nothing. Raises WrongAnswer for another type."""
    if said is None or type(said) is str:
        return said
    raise WrongAnswer(f"{what} of the answer is no string.")


def place_of(said: object, prompt: Prompt) -> int:
    """Which of the answers an event is of. One that does not say is of the only one. Raises NotAsAsked."""
    if said is None and prompt.choices == 1:
        return 0
    if type(said) is not int or not 0 <= said < prompt.choices:
        raise NotAsAsked("An event is of no answer that was asked for.")
    return said


def places_of(said: list[Any], prompt: Prompt) -> list[int]:
    """The index of each answer of a whole reply: as it says, else in order. Each must be there once."""
    if len(said) != prompt.choices:
        raise NotAsAsked(f"The reply has {len(said)} answers instead of {prompt.choices}.")
    if all(index is None for index in said):
        return list(range(prompt.choices))
    if any(type(index) is not int for index in said) or sorted(said) != list(range(prompt.choices)):
        raise WrongAnswer("The indices of the answers are not each there once.")
    return said


def with_usage_member(data: bytes, usage: TokenCounts) -> bytes:
    """The same reply, written by us, with this usage."""
    reply = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    return ENCODE(reply | {"usage": usage_reply(usage)})
