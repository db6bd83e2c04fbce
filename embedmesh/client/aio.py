"""The client for programs with an event loop, over aiohttp."""

import asyncio
import io
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack

import aiohttp

from embedmesh.client.access import Access
from embedmesh.client.aio_chat import AsyncClientChat
from embedmesh.client.answer import CreateEmbeddingResponse
from embedmesh.client.bulk.options import BulkCall, BulkOptions, Chunk
from embedmesh.client.calls import RETRIES, TIMEOUT_S, BegunCall, Calls, SchemeName
from embedmesh.client.rerank import Reranked, RerankOptions
from embedmesh.client.steps import HttpAnswer, NoAnswer, Pause, ToSend
from embedmesh.client.wanted import Inputs
from embedmesh.client.wire import CLIENT_IDLE_S, CLIENT_REPLY_BYTES_MAX, CONNECT_WITHIN_S
from embedmesh.rules.limits import LOCKS_OF_KEY_MAX
from embedmesh.rules.tls_failures import cause_of, tls_failure

if TYPE_CHECKING:
    from embedmesh.client.bulk.posting import Post
    from embedmesh.client.bulk.replies import Rows
    from embedmesh.client.bulk.run import Texts
    from embedmesh.client.bulk.wire import BulkWire
    from embedmesh.client.pins import Pins

T = TypeVar("T")
LARGE_BODY_BYTES = 1024 * 1024  # from here on aiohttp wants to write it in pieces, between which others have their turn
CONNECTIONS_AT_ONCE_MAX = 64  # further calls wait for one
SEALED_AT_ONCE_MAX = LOCKS_OF_KEY_MAX // 2  # further ones wait here: a key that has too many locks open gets no other


class AsyncClient:
    """As `Client`, with `await`: `await client.embeddings.create(…)`. For one event loop."""

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        confidential: bool = False,
        pins: "Pins | str | Path | None" = None,
        scheme: SchemeName = "hpke-1",
        timeout: float = TIMEOUT_S,
        max_retries: int = RETRIES,
        ssl_context: ssl.SSLContext | None = None,
        lock_ahead: bool = True,
    ) -> None:
        """Raises WrongCall or WrongPins."""
        self._calls = Calls(
            base_url=base_url,
            api_key=api_key,
            confidential=confidential,
            pins=pins,
            scheme=scheme,
            timeout=timeout,
            max_retries=max_retries,
            ssl_context=ssl_context,
            lock_ahead=lock_ahead,
        )
        self._wire = AsyncWire(self._calls.access)
        self._bulk_wire: BulkWire | None = None
        self.embeddings = AsyncClientEmbeddings(self._calls, self._wire)
        self.chat = AsyncClientChat(self._calls, self._wire)

    async def embed(self, texts: "Texts", *, model: str, **options: Unpack[BulkOptions]) -> "Rows":
        """As `Client.embed`. Texts may come from an asynchronous iterator, too."""
        from embedmesh.client.bulk.run import as_sequence, embed_all

        call = self._calls.begin_bulk(model, options)
        given = [text async for text in texts] if isinstance(texts, AsyncIterable) else as_sequence(texts)
        return await embed_all(call, self._bulk_post(call), given)

    def embed_stream(
        self, texts: "Texts", *, model: str, **options: Unpack[BulkOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """As `Client.embed_stream`, with `async for`. Texts may come from an asynchronous iterator, too."""
        from embedmesh.client.bulk.run import as_iterable, embed_stream

        call = self._calls.begin_bulk(model, options)
        return embed_stream(call, self._bulk_post(call), as_iterable(texts))

    async def rerank(
        self, query: str, documents: Iterable[str], *, model: str, **options: Unpack[RerankOptions]
    ) -> Reranked:
        """As `Client.rerank`."""
        calls = self._calls.begin_rerank(query, documents, model, options)
        try:
            begun = next(calls)
            while True:
                begun = calls.send(await self._wire.run(begun))
        except StopIteration as done:
            reranked: Reranked = done.value
            return reranked

    def _bulk_post(self, call: BulkCall) -> "Post":
        from embedmesh.client.bulk.wire import BulkWire

        if self._bulk_wire is None:
            self._bulk_wire = BulkWire(call.access, call.within_s)
        return self._bulk_wire.post

    async def close(self) -> None:
        """Close its connections."""
        if self._bulk_wire is not None:
            self._bulk_wire.close()
        await self._wire.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncClientEmbeddings:
    """`client.embeddings`."""

    def __init__(self, calls: Calls, wire: "AsyncWire") -> None:
        self._calls = calls
        self._wire = wire
        self._sealed = asyncio.Semaphore(SEALED_AT_ONCE_MAX)

    async def create(
        self,
        *,
        model: str,
        input: Inputs,
        encoding_format: Literal["float", "base64"] | None = None,
        dimensions: int | None = None,
        user: str | None = None,
        input_type: str | None = None,
        truncate: Literal["none", "end", "start"] | None = None,
        confidential: bool | None = None,
        lock_tokens: int | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> CreateEmbeddingResponse:
        """As `ClientEmbeddings.create`."""
        begun = self._calls.begin(
            model=model,
            input=input,
            encoding_format=encoding_format,
            dimensions=dimensions,
            lock_tokens=lock_tokens,
            idempotency_key=idempotency_key,
            confidential=confidential,
            timeout=timeout,
            extra_body=extra_body,
            fields={"user": user, "input_type": input_type, "truncate": truncate},
        )
        return await self._wire.run(begun, self._sealed if begun.confidential else None)


class AsyncWire:
    """Connections to one gateway."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._session: aiohttp.ClientSession | None = None

    async def run(self, begun: BegunCall[T], turns: asyncio.Semaphore | None = None) -> T:
        """What has come of a call, which waits for its turn first. Raises subclasses of EmbedmeshError."""
        try:
            async with asyncio.timeout(begun.deadline - time.monotonic()), turns or nullcontext():
                return await self._run(begun)
        except TimeoutError:
            raise begun.too_slow() from None

    async def _run(self, begun: BegunCall[T]) -> T:
        steps = begun.steps
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = steps.send(None)
                else:
                    step = steps.send(await self.send(step))
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            steps.close()

    async def send(self, request: ToSend) -> HttpAnswer | NoAnswer:
        """The reply, whenever it comes."""
        answer = await self._answer(request, streams=False)
        assert not isinstance(answer, aiohttp.ClientResponse)
        return answer

    async def open(self, request: ToSend) -> HttpAnswer | NoAnswer | aiohttp.ClientResponse:
        """The same, but a reply of status 200 is not read yet, and is its reader's to close."""
        return await self._answer(request, streams=True)

    async def _answer(self, request: ToSend, *, streams: bool) -> HttpAnswer | NoAnswer | aiohttp.ClientResponse:
        base_url = self._access.base_url
        try:
            response = await self._opened().post(
                base_url + request.path,
                data=request.body if len(request.body) < LARGE_BODY_BYTES else io.BytesIO(request.body),
                headers={**self._access.headers, **request.headers},
                ssl=self._access.tls or False,
                allow_redirects=False,
            )
            if streams and response.status == 200:
                return response
            async with response:
                if response.headers.get("Content-Encoding"):
                    raise ValueError("encoded")
                body = await read_bounded(response, CLIENT_REPLY_BYTES_MAX)
                headers = {name.lower(): value for name, value in response.headers.items()}
                return HttpAnswer(response.status, headers, body)
        except aiohttp.ClientSSLError as error:
            return NoAnswer("tls", str(tls_failure(base_url, cause_of(error))))
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or type(error.os_error).__name__
            return NoAnswer("connect", f"{base_url} cannot be reached ({reason})")
        except aiohttp.ConnectionTimeoutError:
            return NoAnswer("connect", f"{base_url} cannot be reached in time")
        except (aiohttp.ClientError, ValueError) as error:
            return NoAnswer("broken", f"the connection to {base_url} broke ({type(error).__name__})")

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _opened(self) -> aiohttp.ClientSession:
        """The session; an event loop has to run."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_AT_ONCE_MAX, keepalive_timeout=CLIENT_IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_WITHIN_S),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


async def read_bounded(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """The whole body. Raises ValueError where it is larger than `bytes_max`."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > bytes_max:
            raise ValueError("too large")
        chunks.append(chunk)
    return b"".join(chunks)
