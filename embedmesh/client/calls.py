"""What both clients do with the arguments of a call: whom to trust, how long it may take, which steps it is."""

import random
import ssl
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

from embedmesh.client.access import find_access
from embedmesh.client.answer import CreateEmbeddingResponse
from embedmesh.client.bulk.options import BulkCall, BulkOptions, bulk_batch_size, bulk_concurrency, bulk_fields
from embedmesh.client.errors import CallTooSlow, WrongCall
from embedmesh.client.rerank import Reranked, RerankOptions, RerankReply, rerank_requests, want_rerank
from embedmesh.client.reserves import Reserves
from embedmesh.client.steps import Patience, Steps, confidential, plain
from embedmesh.client.wanted import Inputs, Wanted, want
from embedmesh.rules.confidential import HPKE_SCHEME

if TYPE_CHECKING:
    from embedmesh.client.core import Trust
    from embedmesh.client.pins import Pins

TIMEOUT_S = 600.0  # the longest a gateway lets a request live, and what the openai package waits
RETRIES = 2  # as the openai package

SchemeName = Literal["hpke-1", "atoma-sdk-1"]
T = TypeVar("T")


class BegunCall(NamedTuple, Generic[T]):
    """A call that can be run: its steps, and until when (`time.monotonic`).

    Of a chat `timeout_s` is for its head, and then for each event of a stream.
    """

    steps: Steps[T]
    deadline: float
    timeout_s: float
    confidential: bool = False

    def too_slow(self) -> CallTooSlow:
        """The error for a call that has passed its deadline."""
        return CallTooSlow(f"No answer within {self.timeout_s:g} s. Whether it was done is not known.")


class Calls:
    """Makes calls of arguments."""

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key: str | None,
        confidential: bool,
        pins: "Pins | str | Path | None",
        scheme: str,
        timeout: float,
        max_retries: int,
        ssl_context: ssl.SSLContext | None,
        lock_ahead: bool = True,
    ) -> None:
        """Raises WrongCall or WrongPins."""
        self.access = find_access(base_url, api_key, ssl_context)
        self._confidential = confidential
        self._trust = _trust(pins, scheme) if confidential or pins is not None else None
        self._scheme = scheme
        self._timeout_s = timeout
        self._retries = max_retries
        self._reserves = Reserves() if lock_ahead and scheme == HPKE_SCHEME else None

    def begin(
        self,
        *,
        model: str,
        input: Inputs,
        encoding_format: Literal["float", "base64"] | None,
        dimensions: int | None,
        lock_tokens: int | None,
        idempotency_key: str | None,
        confidential: bool | None,
        timeout: float | None,
        extra_body: Mapping[str, Any] | None,
        fields: Mapping[str, Any],
    ) -> BegunCall[CreateEmbeddingResponse]:
        """Raises WrongCall."""
        wanted = want(
            model=model,
            input=input,
            encoding_format=encoding_format,
            dimensions=dimensions,
            lock_tokens=lock_tokens,
            fields={**fields, **(extra_body or {})},
        )
        if not (self._confidential if confidential is None else confidential):
            headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
            return self._begun(timeout, lambda patience: plain(wanted, patience, headers))
        if idempotency_key:
            raise WrongCall("A confidential call needs no idempotency_key: its lock is good for one request.")
        begun = self._begun(timeout, lambda patience: self._confidential_steps(wanted, patience))
        return begun._replace(confidential=True)

    def begin_bulk(self, model: str, options: BulkOptions) -> BulkCall:
        """Raises WrongCall."""
        sealed = options.get("confidential")
        if self._confidential if sealed is None else sealed:
            self._trust = self._trust or _trust(None, self._scheme)
            trust: Trust | None = self._trust
        else:
            trust = None
        return BulkCall(
            access=self.access,
            fields=bulk_fields(model, options),
            trust=trust,
            idempotent=options.get("idempotent", False),
            concurrency=bulk_concurrency(options),
            batch_size=bulk_batch_size(options),
            progress=options.get("progress"),
            on_refused=options.get("on_refused"),
            within_s=self._timeout_s,
        )

    def begin_chat(
        self,
        *,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        stream: bool,
        confidential: bool | None,
        lock_tokens: int | None,
        timeout: float | None,
        fields: Mapping[str, Any],
    ) -> BegunCall[Any]:
        """Raises WrongCall."""
        if not (self._confidential if confidential is None else confidential):
            raise WrongCall("Only confidential chats are made here: use the openai package for the others.")
        from embedmesh.client.chat_core import check_scheme, want_chat
        from embedmesh.client.chat_steps import sealed_chat
        from embedmesh.client.core import LockStep

        wanted = want_chat(model=model, messages=messages, stream=stream, lock_tokens=lock_tokens, fields=fields)
        self._trust = trust = self._trust or _trust(None, self._scheme)
        check_scheme(trust)
        step = LockStep(wanted, trust)
        return self._begun(timeout, lambda patience: sealed_chat(wanted, step, patience, now_ms))

    def begin_rerank(
        self, query: str, documents: Iterable[str], model: str, options: RerankOptions
    ) -> Generator[BegunCall[RerankReply | None], RerankReply | None, Reranked]:
        """Calls to be run one after another. Raises WrongCall."""
        if self._confidential:
            raise WrongCall("Nothing was sent: rerank has no sealed form. Make a client that is not confidential.")
        timeout_s = options.get("timeout")
        wanted = want_rerank(query, documents, model, options)
        return rerank_requests(wanted, lambda steps: self._begun(timeout_s, steps))

    def _begun(self, timeout: float | None, steps: Callable[[Patience], Steps[T]]) -> BegunCall[T]:
        """A call whose time runs from now on."""
        timeout_s = self._timeout_s if timeout is None else timeout
        deadline = time.monotonic() + timeout_s
        patience = Patience(self._retries, lambda: deadline - time.monotonic(), random)
        return BegunCall(steps(patience), deadline, timeout_s)

    def _confidential_steps(self, wanted: Wanted, patience: Patience) -> Steps[CreateEmbeddingResponse]:
        from embedmesh.client.core import LockStep  # cryptography takes its time, and plain calls need none

        self._trust = self._trust or _trust(None, self._scheme)
        step = LockStep(wanted, self._trust)
        return confidential(wanted, step, patience, now_ms, self._reserves)


def now_ms() -> int:
    """Unix time."""
    return time.time_ns() // 1_000_000


def _trust(pins: "Pins | str | Path | None", scheme: str) -> "Trust":
    from embedmesh.client.core import Trust
    from embedmesh.client.pins import Pins

    return Trust(Pins.read(pins) if isinstance(pins, str | Path) else pins, scheme)
