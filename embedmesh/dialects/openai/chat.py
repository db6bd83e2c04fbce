"""The OpenAI dialect of chats: `POST /v1/chat/completions`. Implements the port `GenerationDialect`."""

from collections.abc import Callable
from typing import Any

from embedmesh.dialects.openai import chat_replies
from embedmesh.dialects.openai.functions import to_tools
from embedmesh.dialects.openai.members import CHAT, CHAT_REQUIRED
from embedmesh.dialects.openai.replies import with_usage_member
from embedmesh.dialects.openai.requests import check_stream, read, wants_usage
from embedmesh.dialects.openai.tools import check_tools
from embedmesh.rules.errors import InvalidValue
from embedmesh.rules.generation import Piece, Prompt, StreamState, TokenCounts, Whole
from embedmesh.rules.models import Model


class Chat:
    """What `POST /v1/chat/completions` takes and gives.

    A node gets its output limit as `max_tokens`, whichever word the caller has: vLLM, SGLang, llama.cpp, Ollama and TGI
    all read that, not all read `max_completion_tokens`, and some servers refuse a request that has both.
    """

    def parse(self, body: bytes, find: Callable[[str], Model]) -> tuple[Prompt, Model]:
        """The request, and the catalogue's model for it. `find` raises ModelNotFound. Raises a CallerFailure."""
        given = read(body, find, "chat", CHAT, CHAT_REQUIRED)
        says, sent = given.says, given.sent
        check_stream(says)
        check_tools(sent)
        reply_form = to_tools(sent)
        if "top_logprobs" in says and not says.get("logprobs"):
            raise InvalidValue("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        choices = says.get("n", 1)
        prompt = Prompt(
            modality="chat",
            model=says["model"],
            body=sent,
            texts=given.texts,
            messages=len(says["messages"]),
            images=given.images,
            choices=choices,
            generated=choices,
            output_max=_output_max(says),
            stream=says.get("stream", False),
            wants_usage=wants_usage(says),
            reply_form=reply_form,
            user=says.get("user"),
            ignored=given.ignored,
        )
        return prompt, given.model

    def whole(self, prompt: Prompt, model: Model, reply: bytes, request_id: str, created: int) -> Whole:
        """A node's reply by an allow-list. Raises NodeBroke, WrongAnswer."""
        return chat_replies.whole(prompt, reply, request_id, created)

    def piece(self, prompt: Prompt, model: Model, data: bytes, state: StreamState) -> Piece:
        """One event of a node's stream by an allow-list. Raises NodeBroke, WrongAnswer."""
        return chat_replies.piece(prompt, data, state)

    def usage_event(self, prompt: Prompt, model: Model, usage: TokenCounts, state: StreamState) -> bytes:
        """The last data event of a stream whose caller wants `usage`."""
        return chat_replies.usage_event(prompt, usage, state)

    def with_usage(self, whole: Whole, usage: TokenCounts) -> bytes:
        """The same reply with this usage."""
        return with_usage_member(whole.data, usage)


def _output_max(says: dict[str, Any]) -> int | None:
    ours, older = says.get("max_completion_tokens"), says.get("max_tokens")
    if ours is not None and older is not None and ours != older:
        raise InvalidValue("`max_completion_tokens` and `max_tokens` contradict each other.", param="max_tokens")
    limit: int | None = older if ours is None else ours
    return limit
