"""One request of a caller and its reply, whatever carries them: head, body, reply, stream, delivery."""

from collections.abc import AsyncIterator, Awaitable, Callable
from enum import Enum
from typing import NamedTuple, Protocol

import msgspec

REQUEST_HEADER = "x-embedmesh-request"  # our own id of the request, as the ledger has it
PROCESSING_HEADER = "openai-processing-ms"
COST_HEADER = "x-embedmesh-cost-nanousd"
NODE_HEADER = "x-embedmesh-node"
CACHED_HEADER = "x-embedmesh-cached"
NEXT_LOCK_HEADER = "x-embedmesh-next-lock"  # of a sealed request: what lock its caller would like for the next one
JOB_HEADER = "x-embedmesh-job"  # the job that pays for the request
RETRIES_DIGITS_MAX = 4


class RequestHead(NamedTuple):
    """What a request's head says.

    `retries` is how often an SDK says it has tried before; None if no SDK says so. `request_id` is the id that we gave
    the request; None if the caller brought one, which never reaches the ledger. `api_key` is the key as Azure's
    clients send it. `model` is the model that the path names, if it names one. `next_lock` is of sealed requests. `job`
    is the job that pays, and `form` the path of a dialect other than OpenAI's: `read` looks for neither, since nothing
    on the fast path has one.
    """

    authorization: str | None = None
    idempotency_key: str | None = None
    retries: int | None = None
    request_id: str | None = None
    api_key: str | None = None
    model: str | None = None
    next_lock: str | None = None
    job: str | None = None
    form: str = ""

    @classmethod
    def read(cls, header: Callable[[str], str | None], request_id: str | None, model: str | None) -> "RequestHead":
        """What the headers of a request say, by their names in lower case."""
        retries = header("x-stainless-retry-count") or ""
        known = retries.isascii() and retries.isdigit() and len(retries) <= RETRIES_DIGITS_MAX
        return cls(
            header("authorization"),
            header("idempotency-key"),
            int(retries) if known else None,
            request_id,
            header("api-key"),
            model,
            header(NEXT_LOCK_HEADER),
        )

    def identity(self, body: bytes) -> bytes:
        """What two requests have in common that are the same request: the body, the dialect, the model in the path."""
        if self.model is None and not self.form:
            return body
        return b"\0".join((self.form.encode(), (self.model or "").encode("utf-8", "replace"), body))


class Reply(msgspec.Struct, frozen=True):
    """A whole reply, always status 200 and JSON."""

    headers: dict[str, str]
    body: bytes


class Parts(Protocol):
    """The parts of a reply that is made while it is read, in order: an async generator is one."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...

    async def aclose(self) -> None:
        """No more will be read, however many were: also none."""
        ...


class StreamedReply(msgspec.Struct, frozen=True):
    """A reply that is made while it is read, always status 200. An exception of `parts` breaks it off: nobody pays.

    `left` is called once its caller has gone while the next part is waited for: no more will be read.
    """

    headers: dict[str, str]
    parts: Parts
    content_type: str = "text/event-stream"
    left: Callable[[], None] = lambda: None


class Delivery(Enum):
    """How a delivery ended of which some bytes are in the kernel: the caller has to pay for it, unless it failed."""

    WHOLE = "whole"  # to its last byte
    BROKEN_OFF = "broken_off"  # the caller closed, reset or did not read
    FAILED = "failed"  # a stream ended with an error event; nobody pays


Receive = Callable[[str], Awaitable[bytes]]
"""Read the body of a request of this account. Raises Overloaded if there is no room for it."""

Deliver = Callable[[Reply | StreamedReply], Awaitable[Delivery]]
"""Write a reply to the caller's socket. Raises if no byte of its body got there, or if we end it ourselves."""
