"""The client for programs without an event loop. Threads may share one."""

import ssl
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack

from embedmesh.client.answer import CreateEmbeddingResponse
from embedmesh.client.bulk.options import BulkOptions, Chunk
from embedmesh.client.calls import RETRIES, TIMEOUT_S, BegunCall, Calls, SchemeName
from embedmesh.client.chat import ClientChat
from embedmesh.client.rerank import Reranked, RerankOptions
from embedmesh.client.steps import Pause
from embedmesh.client.wanted import Inputs
from embedmesh.client.wire import Late, Wire

if TYPE_CHECKING:
    from embedmesh.client.bulk.replies import Rows
    from embedmesh.client.pins import Pins

T = TypeVar("T")


class Client:
    """Embeds texts at a gateway: `client.embeddings.create(model=…, input=…)`, as with the openai package.

    `base_url` and `api_key` are those of EMBEDMESH_BASE_URL and EMBEDMESH_API_KEY where they are not given. With
    `confidential` the texts are sealed for a node that is among the `pins`, which may be the name of a file; a call can
    say so for itself. Threads may share a client; a connection is kept for each that runs at one time. `timeout` is in
    seconds, for a whole call with all its tries; only the look-up of the host's name takes as long as it takes.
    With `lock_ahead`, confidential calls that follow one another need one exchange each, not two: every reply brings
    the lock for the next call. After the last, the money for that one stays set aside for up to 30 seconds.
    """

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
        """Raises WrongCall or WrongPins. `scheme="atoma-sdk-1"` is what the published SDKs do."""
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
        self._wire = Wire(self._calls.access)
        self.embeddings = ClientEmbeddings(self._calls, self._wire)
        self.chat = ClientChat(self._calls, self._wire)

    def embed(self, texts: Iterable[str | Sequence[int]], *, model: str, **options: Unpack[BulkOptions]) -> "Rows":
        """The vectors of many texts, or lists of token ids: float32 (texts, width), in input order.

        Texts are packed into requests, several of which are in flight; what is refused for load is sent again. See
        BulkOptions. Raises subclasses of EmbedmeshError; an interrupt cancels what is under way.
        """
        from embedmesh.client.bulk.run import as_sequence
        from embedmesh.client.bulk.threads import embed_all_waiting

        return embed_all_waiting(self._calls.begin_bulk(model, options), as_sequence(texts))

    def embed_stream(
        self, texts: Iterable[str | Sequence[int]], *, model: str, **options: Unpack[BulkOptions]
    ) -> Generator[Chunk, None, None]:
        """As `embed`, for more texts than fit into memory: `for start, vectors in client.embed_stream(texts, …)`.

        Chunks come in input order. What is in flight is in memory, and no more. Texts are taken in this thread. To
        leave the loop, or to close the generator, cancels what is under way.
        """
        from embedmesh.client.bulk.run import as_iterable
        from embedmesh.client.bulk.threads import embed_stream_waiting

        return embed_stream_waiting(self._calls.begin_bulk(model, options), as_iterable(texts))

    def rerank(self, query: str, documents: Iterable[str], *, model: str, **options: Unpack[RerankOptions]) -> Reranked:
        """Documents in the order in which they answer the query: their indices and scores, best first.

        What one request does not take is sent in several, one after another. See RerankOptions. Raises subclasses of
        EmbedmeshError; what was scored until then is lost, and was paid.
        """
        calls = self._calls.begin_rerank(query, documents, model, options)
        try:
            begun = next(calls)
            while True:
                begun = calls.send(run_call(self._wire, begun))
        except StopIteration as done:
            reranked: Reranked = done.value
            return reranked

    def close(self) -> None:
        """Close its connections."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ClientEmbeddings:
    """`client.embeddings`."""

    def __init__(self, calls: Calls, wire: Wire) -> None:
        self._calls = calls
        self._wire = wire

    def create(
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
        """Vectors of the input. Raises subclasses of EmbedmeshError.

        `lock_tokens` is how many tokens a confidential call has money set aside for, where fewer than the bytes of the
        input are known to be enough. `extra_body` are further members of the request.
        """
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
        return run_call(self._wire, begun)


def run_call(wire: Wire, begun: BegunCall[T]) -> T:
    """What has come of a call. Raises subclasses of EmbedmeshError."""
    steps = begun.steps
    try:
        step = next(steps)
        while True:
            if isinstance(step, Pause):
                threading.Event().wait(min(step.seconds, begun.deadline - time.monotonic()))
                step = steps.send(None)
            else:
                step = steps.send(wire.send(step, begun.deadline))
    except StopIteration as done:
        result: T = done.value
        return result
    except Late:
        raise begun.too_slow() from None
    finally:
        steps.close()
