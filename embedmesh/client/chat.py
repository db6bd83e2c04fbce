"""`client.chat.completions.create(…)`, sealed for a node that is pinned, for programs without an event loop."""

import http.client
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from embedmesh.client.chat_answer import ChatCompletion, ChatCompletionChunk
from embedmesh.client.chat_steps import BEGAN, OpensStream
from embedmesh.client.errors import CallNotAnswered, CallTooSlow
from embedmesh.client.event_lines import EventLines
from embedmesh.client.steps import Pause
from embedmesh.client.wire import Late, Pieces, Wire

if TYPE_CHECKING:
    from embedmesh.client.calls import Calls
    from embedmesh.client.chat_core import ChatReader

BROKE = "The connection broke before the answer was whole: what came of it may be used as what it is, a part."


class ClientChat:
    """`client.chat`."""

    def __init__(self, calls: "Calls", wire: Wire) -> None:
        self.completions = ClientChatCompletions(calls, wire)


class ClientChatCompletions:
    """`client.chat.completions`."""

    def __init__(self, calls: "Calls", wire: Wire) -> None:
        self._calls = calls
        self._wire = wire

    @overload
    def create(
        self, *, model: str, messages: Sequence[Mapping[str, Any]], stream: Literal[True], **members: Any
    ) -> "ChatStream": ...

    @overload
    def create(
        self, *, model: str, messages: Sequence[Mapping[str, Any]], stream: Literal[False] = False, **members: Any
    ) -> ChatCompletion: ...

    def create(
        self,
        *,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        stream: bool = False,
        confidential: bool | None = None,
        lock_tokens: int | None = None,
        timeout: float | None = None,
        **members: Any,
    ) -> "ChatCompletion | ChatStream":
        """The next message of a conversation, whole or as a stream. Raises subclasses of EmbedmeshError.

        `members` are further ones of the request: max_tokens, temperature, tools. Only sealed chats are made here: the
        openai package makes the others. `lock_tokens` is how many tokens money is set aside for: the prompt's and the
        answer's together.
        """
        begun = self._calls.begin_chat(
            model=model,
            messages=messages,
            stream=stream,
            confidential=confidential,
            lock_tokens=lock_tokens,
            timeout=timeout,
            fields=members,
        )
        steps, pieces = begun.steps, None
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    threading.Event().wait(min(step.seconds, begun.deadline - time.monotonic()))
                    step = steps.send(None)
                elif isinstance(step, OpensStream):
                    answer = self._wire.open(step, begun.deadline)
                    if isinstance(answer, Pieces):
                        pieces = answer
                    step = steps.send(BEGAN if isinstance(answer, Pieces) else answer)
                else:
                    step = steps.send(self._wire.send(step, begun.deadline))
        except StopIteration as done:
            return done.value if pieces is None else ChatStream(done.value, pieces, begun.timeout_s)
        except Late:
            raise begun.too_slow() from None
        finally:
            steps.close()


class ChatStream:
    """The chunks of one answer, each checked before it is given. Close it, or read it to its end.

    Where the answer is cut, or anything on the way has changed it, iterating raises: no part is taken for the whole.
    """

    def __init__(self, reader: "ChatReader", pieces: Pieces, timeout_s: float) -> None:
        self._reader = reader
        self._pieces = pieces
        self._timeout_s = timeout_s
        self._lines = EventLines()
        self._chunks = self._read()

    def __iter__(self) -> Iterator[ChatCompletionChunk]:
        return self

    def __next__(self) -> ChatCompletionChunk:
        return next(self._chunks)

    def close(self) -> None:
        """No more is wanted: what was handed over until now is paid."""
        self._chunks.close()
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> Generator[ChatCompletionChunk, None, None]:
        try:
            while data := self._next():
                for event in self._lines.feed(data):
                    yield self._reader.event(event)
            self._reader.end()
        finally:
            self._pieces.close()

    def _next(self) -> bytes:
        try:
            return self._pieces.read(self._timeout_s)
        except TimeoutError:
            raise CallTooSlow(f"Nothing more of the answer came within {self._timeout_s:g} s.") from None
        except (OSError, http.client.HTTPException, ValueError):
            raise CallNotAnswered(BROKE) from None
