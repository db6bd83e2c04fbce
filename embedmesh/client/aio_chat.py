"""`await client.chat.completions.create(…)`, sealed for a node that is pinned, over aiohttp."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import aiohttp

from embedmesh.client.chat import BROKE
from embedmesh.client.chat_answer import ChatCompletion, ChatCompletionChunk
from embedmesh.client.chat_steps import BEGAN, OpensStream
from embedmesh.client.errors import CallNotAnswered, CallTooSlow
from embedmesh.client.event_lines import EventLines
from embedmesh.client.steps import Pause

if TYPE_CHECKING:
    from embedmesh.client.aio import AsyncWire
    from embedmesh.client.calls import Calls
    from embedmesh.client.chat_core import ChatReader


class AsyncClientChat:
    """`client.chat`."""

    def __init__(self, calls: "Calls", wire: "AsyncWire") -> None:
        self.completions = AsyncClientChatCompletions(calls, wire)


class AsyncClientChatCompletions:
    """`client.chat.completions`."""

    def __init__(self, calls: "Calls", wire: "AsyncWire") -> None:
        self._calls = calls
        self._wire = wire

    @overload
    async def create(
        self, *, model: str, messages: Sequence[Mapping[str, Any]], stream: Literal[True], **members: Any
    ) -> "AsyncChatStream": ...

    @overload
    async def create(
        self, *, model: str, messages: Sequence[Mapping[str, Any]], stream: Literal[False] = False, **members: Any
    ) -> ChatCompletion: ...

    async def create(
        self,
        *,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        stream: bool = False,
        confidential: bool | None = None,
        lock_tokens: int | None = None,
        timeout: float | None = None,
        **members: Any,
    ) -> "ChatCompletion | AsyncChatStream":
        """As `ClientChatCompletions.create`."""
        begun = self._calls.begin_chat(
            model=model,
            messages=messages,
            stream=stream,
            confidential=confidential,
            lock_tokens=lock_tokens,
            timeout=timeout,
            fields=members,
        )
        steps, response = begun.steps, None
        try:
            async with asyncio.timeout(begun.deadline - time.monotonic()):
                step = next(steps)
                while True:
                    if isinstance(step, Pause):
                        await asyncio.sleep(step.seconds)
                        step = steps.send(None)
                    elif isinstance(step, OpensStream):
                        answer = await self._wire.open(step)
                        if isinstance(answer, aiohttp.ClientResponse):
                            response = answer
                        step = steps.send(BEGAN if isinstance(answer, aiohttp.ClientResponse) else answer)
                    else:
                        step = steps.send(await self._wire.send(step))
        except StopIteration as done:
            return done.value if response is None else AsyncChatStream(done.value, response, begun.timeout_s)
        except TimeoutError:
            raise begun.too_slow() from None
        finally:
            steps.close()


class AsyncChatStream:
    """As `ChatStream`, with `async for`."""

    def __init__(self, reader: "ChatReader", response: aiohttp.ClientResponse, timeout_s: float) -> None:
        self._reader = reader
        self._response = response
        self._timeout_s = timeout_s
        self._lines = EventLines()
        self._chunks = self._read()

    def __aiter__(self) -> AsyncIterator[ChatCompletionChunk]:
        return self

    async def __anext__(self) -> ChatCompletionChunk:
        return await anext(self._chunks)

    async def close(self) -> None:
        """No more is wanted: what was handed over until now is paid."""
        await self._chunks.aclose()
        self._response.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _read(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        try:
            while data := await self._next():
                for event in self._lines.feed(data):
                    yield self._reader.event(event)
            self._reader.end()
        finally:
            self._response.close()

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._response.content.readany()
        except TimeoutError:
            raise CallTooSlow(f"Nothing more of the answer came within {self._timeout_s:g} s.") from None
        except (aiohttp.ClientError, OSError):
            raise CallNotAnswered(BROKE) from None
