"""A sealed chat, step by step, without I/O: every check of a reply, whole or event by event, is here.

An event is returned once it was found to be the node's own, to this request, and the next one. After the last of them
`is_over` is true; a stream that ends before is thrown away by `end`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from embedmesh.client.chat_answer import ChatCompletion, ChatCompletionChunk, ChatUsage
from embedmesh.client.core import SealedStep, Trust
from embedmesh.client.errors import CallRefused, WrongCall
from embedmesh.client.refusals import Problem, read_problem
from embedmesh.client.wanted import Wanted
from embedmesh.client.words import reply_not_trusted
from embedmesh.confidential.failures import SealBroken, Untrusted
from embedmesh.confidential.generation_statements import AnsweredRequest, read_event
from embedmesh.rules.base64s import decode64
from embedmesh.rules.confidential import HPKE_SCHEME, SealedAnswer
from embedmesh.rules.limits import REQUEST_TOKENS_MAX, TEMPLATE_TOKENS
from embedmesh.rules.sealed_generation import (
    GenerationStatement,
    confidential_path,
    operation_of,
)

T = TypeVar("T", bound=msgspec.Struct)

CHAT_PATH = confidential_path("chat").removeprefix("/v1")
ANSWER_TOKENS = 1_024  # that are locked for an answer whose limit nobody says
LIMITS = ("max_completion_tokens", "max_tokens")
SEALED_STREAM_STATUS = 200


class _SealedChat(msgspec.Struct, frozen=True):
    """A sealed answer, or an event of one, in base64."""

    ciphertext: str
    statement: str
    statement_signature: str
    usage: ChatUsage | None = None


class _RefusedChat(msgspec.Struct, frozen=True):
    sealed: _SealedChat | None = None


class _ChatError(msgspec.Struct, frozen=True):
    error: _RefusedChat


def want_chat(
    *,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    stream: bool,
    lock_tokens: int | None,
    fields: Mapping[str, Any],
) -> Wanted:
    """The request with these members; of `fields`, None is not sent. Raises WrongCall."""
    given = {name: value for name, value in fields.items() if value is not None}
    asked = {**given, "model": model, "messages": list(messages)} | ({"stream": True} if stream else {})
    try:
        body = msgspec.json.encode(asked)
    except UnicodeEncodeError:
        raise WrongCall("A text has half a surrogate pair, which UTF-8 cannot hold. Remove it.") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WrongCall(f"The arguments are not JSON: {type(error).__name__}.") from None
    limit = next((given[name] for name in LIMITS if isinstance(given.get(name), int)), ANSWER_TOKENS)
    choices = given["n"] if isinstance(given.get("n"), int) else 1
    tokens_max = len(body) + TEMPLATE_TOKENS * (1 + len(asked["messages"])) + choices * limit
    return Wanted(
        model=model,
        body=body,
        inputs=1,
        tokens_max=min(tokens_max, REQUEST_TOKENS_MAX),
        lock_tokens=lock_tokens,
        operation=operation_of("chat", stream),
        stream=stream,
    )


def check_scheme(trust: Trust) -> None:
    """Raise WrongCall for the SDKs' scheme: it cannot tell a cut stream from a whole one."""
    if trust.scheme != HPKE_SCHEME:
        raise WrongCall(f"Chats are sealed by {HPKE_SCHEME} only.")


class ChatReader:
    """Reads the reply to one sealed chat."""

    def __init__(self, sealed: SealedStep, wanted: Wanted) -> None:
        about = sealed.about
        assert about.events is not None  # of our own scheme
        self._answered = AnsweredRequest(about.public_key, about.lock, about.digest, "chat", wanted.stream)
        self._units = about.units
        self._open_whole = about.opener
        self._events = about.events()
        self._model = wanted.model
        self._stream = wanted.stream
        self._number = 0
        self.is_over = False

    def whole(self, reply: bytes) -> ChatCompletion:
        """The completion in a reply with status 200. Raises ReplyNotTrusted."""
        told = _read(reply, _SealedChat)
        answer, statement = self._checked(told)
        body = self._opened(answer, statement)
        completion = _read(body, ChatCompletion)
        self._check_inside(told, statement, completion.model, completion.usage)
        return completion

    def event(self, data: bytes) -> ChatCompletionChunk:
        """The chunk in the data of the next event. Raises ReplyNotTrusted, or CallRefused where the stream failed."""
        if self.is_over:
            raise reply_not_trusted("after")
        try:
            told = msgspec.json.decode(data, type=_SealedChat)
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise self._failure(data) from None
        answer, statement = self._checked(told)
        if statement.status != 200:
            raise reply_not_trusted("status")
        chunk = _read(self._opened(answer, statement), ChatCompletionChunk)
        self._check_inside(told, statement, chunk.model, chunk.usage)
        self._number += 1
        self.is_over = statement.final
        return msgspec.structs.replace(chunk, usage=_usage(statement)) if statement.final else chunk

    def end(self) -> None:
        """Nothing more comes. Raises ReplyNotTrusted where the node has not said that this is the end."""
        if not self.is_over:
            raise reply_not_trusted("cut")

    def read_refusal(self, status: int, reply: bytes) -> tuple[Problem, bool]:
        """Why a request was refused, and whether that is the node's word. Raises ReplyNotTrusted."""
        try:
            told = msgspec.json.decode(reply, type=_ChatError).error.sealed
        except (msgspec.DecodeError, ValueError, RecursionError):
            told = None
        if told is None:
            return read_problem(status, reply), False
        answer, statement = self._checked(told)
        if statement.status == 200:
            raise reply_not_trusted("status")
        if not answer.sealed:
            return read_problem(status, reply), False
        return read_problem(status, self._opened(answer, statement)), True

    def _failure(self, data: bytes) -> Exception:
        """For an event that is no answer: an error that ends the stream, or nothing that is known."""
        try:
            msgspec.json.decode(data, type=_ChatError)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return reply_not_trusted("form")
        problem, by_node = self.read_refusal(SEALED_STREAM_STATUS, data)
        return CallRefused(problem, sealed=by_node)

    def _checked(self, told: _SealedChat) -> tuple[SealedAnswer, GenerationStatement]:
        try:
            answer = SealedAnswer(
                decode64(told.statement), decode64(told.statement_signature), decode64(told.ciphertext)
            )
        except ValueError:
            raise reply_not_trusted("form") from None
        try:
            return answer, read_event(answer, self._answered, self._number, self._units)
        except Untrusted as error:
            raise reply_not_trusted(error.reason) from None

    def _opened(self, answer: SealedAnswer, statement: GenerationStatement) -> bytes:
        try:
            return self._events.open(answer.sealed, final=statement.final) if self._stream else self._open_whole(answer)
        except SealBroken:
            raise reply_not_trusted("seal") from None

    def _check_inside(
        self, told: _SealedChat, statement: GenerationStatement, model: str, usage: ChatUsage | None
    ) -> None:
        if statement.status != 200:
            raise reply_not_trusted("status")
        if model != self._model:
            raise reply_not_trusted("model")
        if any(said is not None and said != _usage(statement) for said in (told.usage, usage)):
            raise reply_not_trusted("usage")


def _usage(statement: GenerationStatement) -> ChatUsage:
    return ChatUsage(statement.input, statement.output, statement.input + statement.output)


def _read(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise reply_not_trusted("form") from None
