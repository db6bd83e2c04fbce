"""One request of a run, tried once and again: in the clear, or sealed for a node whose identity is pinned.

Whatever is tried again is the same request to the gateway, so that a reply that was lost on the way is not paid twice.
It says how often it was sent before, as SDKs do, by which a gateway of ours finds the first for a minute, unless its
reply was handed over whole (see embedmesh.flow.retries); or it has one `Idempotency-Key`, which any gateway of the
store knows for a day; or it is the same sealed bytes for the same lock. Keys are for those who ask: a gateway keeps the
reply to each, which costs it as much again as the request, and it keeps 256 MiB for an account.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from embedmesh.client.bulk.posting import Post, Posted
from embedmesh.client.bulk.replies import ReplyVectors, made_vectors, read_vectors, reply_bytes_max
from embedmesh.client.errors import NodeNotTrusted, WrongCall
from embedmesh.client.refusals import Problem, read_problem
from embedmesh.client.steps import FOR_A_NEW_LOCK, OTHER_LOCKS_MAX
from embedmesh.client.wanted import EXTRA_TOKENS_MAX, Wanted
from embedmesh.rules.limits import REQUEST_TOKENS_MAX

if TYPE_CHECKING:
    from embedmesh.client.core import SealedStep, Trust

RETRY_HEADER = "x-stainless-retry-count"
LOCK_REPLY_BYTES_MAX = 1024 * 1024  # a node's keys and its models; evidence may be large
SEALED_AGAIN = 2  # what is sealed is in base64 in base64


class Tried(NamedTuple):
    """What came of one try: vectors or a problem, the headers beside it, and what was charged."""

    answer: ReplyVectors | Problem
    headers: Mapping[str, str]
    cost_nanousd: int = 0


class Tries(Protocol):
    """One request."""

    async def once(self, post: Post) -> Tried:
        """Try it. Raises what `post` raises, and ValueError for a reply that is none."""
        ...


class PlainTries:
    """In the clear."""

    def __init__(self, body: bytes, inputs: int, *, key: str | None) -> None:
        self._body = body
        self._inputs = inputs
        self._headers = {"Idempotency-Key": key} if key is not None else {}
        self._tried = 0

    async def once(self, post: Post) -> Tried:
        """Try it."""
        headers = self._headers | {RETRY_HEADER: str(self._tried)}
        self._tried += 1
        reply = await post("/embeddings", self._body, headers, reply_bytes_max(self._inputs))
        if reply.status != 200:
            return _refused(reply)
        return Tried(read_vectors(reply.body, self._inputs), reply.headers, _cost(reply))


class SealedTries:
    """Sealed. What the node says to its caller alone is told as any refusal is."""

    def __init__(self, wanted: Wanted, trust: "Trust") -> None:
        self._wanted = wanted
        self._trust = trust
        self._sealed: SealedStep | None = None  # sent, and not answered

    async def once(self, post: Post) -> Tried:
        """Try it. Raises NotTrusted, too."""
        if self._sealed is None:
            sealed = await self._lock(post)
            if isinstance(sealed, Tried):
                return sealed
            self._sealed = sealed
        sealed = self._sealed
        bytes_max = SEALED_AGAIN * reply_bytes_max(self._wanted.inputs)
        reply = await post("/confidential/embeddings", sealed.body, {}, bytes_max)
        self._sealed = None
        if reply.status == 200:
            rows = sealed.read(bytes(reply.body))
            return Tried(made_vectors(rows.vectors, rows.tokens), reply.headers, _cost(reply))
        problem = sealed.read_refusal(reply.status, bytes(reply.body))
        if problem is None:
            problem = read_problem(reply.status, reply.body)
        elif problem.code not in FOR_A_NEW_LOCK:
            return Tried(problem, {})
        if problem.code in FOR_A_NEW_LOCK:
            return Tried(msgspec.structs.replace(problem, status=503), {})
        return Tried(problem, reply.headers)

    async def _lock(self, post: Post) -> "SealedStep | Tried":
        """The request, sealed for a trusted node; or why there is no lock."""
        from embedmesh.client.calls import now_ms
        from embedmesh.client.core import LockStep

        try:
            step = LockStep(self._wanted, self._trust)
        except WrongCall as error:  # nothing else can be wrong with it
            return Tried(Problem(413, "body_too_large", error.message), {})
        for others in range(OTHER_LOCKS_MAX + 1):
            reply = await post("/nodes/lock", step.body, {}, LOCK_REPLY_BYTES_MAX)
            if reply.status != 200:
                return _refused(reply)
            try:
                return step.read(bytes(reply.body), now_ms())
            except NodeNotTrusted as error:
                if error.reason != "not_pinned" or others == OTHER_LOCKS_MAX:
                    raise
        raise AssertionError("unreachable: the last lock is used, or refused")


def want_texts(model: str, dimensions: object, body: bytes, inputs: int, size: int) -> Wanted:
    """What a request for texts of `size` bytes of JSON wants."""
    return Wanted(
        model=model,
        body=body,
        inputs=inputs,
        tokens_max=min(size + EXTRA_TOKENS_MAX * inputs, REQUEST_TOKENS_MAX),
        encoding="base64",
        dimensions=dimensions if isinstance(dimensions, int) else None,
    )


def _refused(reply: Posted) -> Tried:
    return Tried(read_problem(reply.status, reply.body), reply.headers)


def _cost(reply: Posted) -> int:
    cost = reply.headers.get("x-embedmesh-cost-nanousd", "0")
    return int(cost) if cost.isdecimal() else 0
