"""The OpenAI dialect of text completions: `POST /v1/completions`. Implements the port `GenerationDialect`."""

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from embedmesh.dialects.openai.logprobs import TextLogprobsReply, text_logprobs
from embedmesh.dialects.openai.members import COMPLETIONS, COMPLETIONS_REQUIRED
from embedmesh.dialects.openai.replies import (
    ENCODE,
    Created,
    FinishReason,
    GenerationUsageReply,
    Index,
    NamedModel,
    check_no_error,
    decoded,
    finish_reason_of,
    place_of,
    places_of,
    text_of,
    usage_of,
    usage_reply,
    with_usage_member,
)
from embedmesh.dialects.openai.requests import check_stream, read, wants_usage
from embedmesh.rules.errors import InvalidValue, WrongAnswer
from embedmesh.rules.generation import Piece, Prompt, StreamState, TokenCounts, Whole
from embedmesh.rules.limits import GENERATED_CHOICES_MAX
from embedmesh.rules.models import Model

PREFIX = "cmpl-"


class TextChoiceReply(msgspec.Struct):
    """One of the answers; of a stream, what is new of it. Those to the first prompt come first."""

    index: Index
    text: str
    logprobs: TextLogprobsReply | None
    finish_reason: FinishReason | None


class TextCompletionReply(msgspec.Struct, tag_field="object", tag="text_completion"):
    """As many answers as prompts times `n`. A stream's events have the same form."""

    id: str
    created: Created
    model: NamedModel
    choices: list[TextChoiceReply]
    usage: GenerationUsageReply | UnsetType | None = UNSET


class _Written(msgspec.Struct):
    index: Any = None
    text: Any = None
    finish_reason: Any = None
    logprobs: Any = None


class _WrittenReply(msgspec.Struct):
    choices: list[_Written] | None = None
    usage: Any = None
    error: Any = None
    object: Any = None


_decode = msgspec.json.Decoder(_WrittenReply).decode


class Completions:
    """What `POST /v1/completions` takes and gives."""

    def parse(self, body: bytes, find: Callable[[str], Model]) -> tuple[Prompt, Model]:
        """The request, and the catalogue's model for it. `find` raises ModelNotFound. Raises a CallerFailure."""
        given = read(body, find, "completions", COMPLETIONS, COMPLETIONS_REQUIRED)
        says = given.says
        check_stream(says)
        prompts, ids = _counted(says["prompt"])
        if ids and given.model.token_ids != "native":
            raise InvalidValue(
                f"{given.model.id} takes text only: nobody has said of which vocabulary its token ids are.",
                param="prompt",
            )
        kept = says.get("n", 1)
        made = says.get("best_of", kept)
        _check_choices(says, prompts, kept, made)
        prompt = Prompt(
            modality="completions",
            model=says["model"],
            body=given.sent,
            texts=given.texts,
            ids=ids,
            choices=prompts * kept,
            generated=prompts * made,
            output_max=says.get("max_tokens"),
            stream=says.get("stream", False),
            wants_usage=wants_usage(says),
            user=says.get("user"),
            ignored=given.ignored,
        )
        return prompt, given.model

    def whole(self, prompt: Prompt, model: Model, reply: bytes, request_id: str, created: int) -> Whole:
        """A node's reply by an allow-list. Raises NodeBroke, WrongAnswer."""
        said = decoded(_decode, reply)
        check_no_error(said.error, said.object)
        written = said.choices or []
        places = places_of([choice.index for choice in written], prompt)
        choices = [_choice(choice, place, prompt) for place, choice in zip(places, written, strict=True)]
        choices.sort(key=lambda choice: choice.index)
        for choice in choices:
            choice.finish_reason = choice.finish_reason or "stop"
        usage = usage_of(said.usage)
        told = UNSET if usage is None else usage_reply(usage)
        body = TextCompletionReply(PREFIX + request_id, created, prompt.model, choices, told)
        text = "".join(_new(choice, prompt) for choice in choices)
        return Whole(ENCODE(body), text, usage)

    def piece(self, prompt: Prompt, model: Model, data: bytes, state: StreamState) -> Piece:
        """One event of a node's stream by an allow-list. Raises NodeBroke, WrongAnswer."""
        said = decoded(_decode, data)
        check_no_error(said.error, said.object)
        state.events += 1
        usage = usage_of(said.usage) if said.usage is not None else None
        if not said.choices:
            return Piece(None, usage=usage)
        choices = [_choice(choice, place_of(choice.index, prompt), prompt) for choice in said.choices]
        if len({choice.index for choice in choices}) < len(choices):
            raise WrongAnswer("An event has two pieces of one answer.")
        text, finished = "", False
        for choice in choices:
            first = choice.index not in state.begun
            state.begun.add(choice.index)
            text += _new(choice, prompt) if first else choice.text
            if choice.index in state.ended:
                choice.finish_reason = None
            elif choice.finish_reason is not None:
                finished = True
                state.ended.add(choice.index)
        told = None if prompt.wants_usage else UNSET
        body = TextCompletionReply(PREFIX + state.request_id, state.created, prompt.model, choices, told)
        return Piece(ENCODE(body), text, usage, finished)

    def usage_event(self, prompt: Prompt, model: Model, usage: TokenCounts, state: StreamState) -> bytes:
        """The last data event of a stream whose caller wants `usage`."""
        told = usage_reply(usage)
        return ENCODE(TextCompletionReply(PREFIX + state.request_id, state.created, prompt.model, [], told))

    def with_usage(self, whole: Whole, usage: TokenCounts) -> bytes:
        """The same reply with this usage."""
        return with_usage_member(whole.data, usage)


def _counted(said: str | list[Any]) -> tuple[int, int]:
    """How many prompts, and token ids in them."""
    if isinstance(said, str):
        return 1, 0
    match said[0]:
        case str():
            return len(said), 0
        case int():
            return 1, len(said)
        case _:
            return len(said), sum(map(len, said))


def _check_choices(says: dict[str, Any], prompts: int, kept: int, made: int) -> None:
    if made < kept:
        raise InvalidValue("`best_of` must be at least `n`.", param="best_of")
    if made > kept and says.get("stream"):
        raise InvalidValue("The best of several answers cannot be streamed: leave `best_of` out.", param="best_of")
    if prompts * made > GENERATED_CHOICES_MAX:
        raise InvalidValue(
            f"The request makes {prompts * made:,} answers; one makes at most {GENERATED_CHOICES_MAX}.",
            param="best_of" if made > kept else "n" if kept > 1 else "prompt",
        )


def _choice(said: _Written, place: int, prompt: Prompt) -> TextChoiceReply:
    asked = prompt.body.get("logprobs") is not None
    return TextChoiceReply(
        place,
        text_of(said.text, "The text") or "",
        text_logprobs(said.logprobs) if asked and said.logprobs is not None else None,
        _reason(said.finish_reason),
    )


def _reason(said: object) -> FinishReason | None:
    """A completion knows three reasons."""
    reason = finish_reason_of(said)
    return "stop" if reason in ("tool_calls", "function_call") else reason


def _new(choice: TextChoiceReply, prompt: Prompt) -> str:
    """What the model has made of a text that may begin with the prompt."""
    if not prompt.body.get("echo"):
        return choice.text
    sent = prompt.body["prompt"]
    if isinstance(sent, list):
        sent = sent[choice.index // prompt.body.get("n", 1)] if isinstance(sent[0], str) else ""
    return choice.text.removeprefix(sent)
