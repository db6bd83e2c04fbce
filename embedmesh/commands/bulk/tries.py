"""One request of a run, tried once and again: in the clear, or sealed for a node whose identity is pinned.

Whatever is tried again is the same request to the gateway, so that a reply that was lost on the way is not paid twice:
by one `Idempotency-Key`, or by the same sealed bytes for the same lock.
"""

import base64
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedmesh.client.errors import NodeNotTrusted, WrongCall
from embedmesh.client.refusals import Problem, read_problem
from embedmesh.client.steps import FOR_A_NEW_LOCK, OTHER_LOCKS_MAX
from embedmesh.client.wanted import EXTRA_TOKENS_MAX, Wanted
from embedmesh.rules.embeddings import EmbedReply
from embedmesh.rules.limits import REQUEST_TOKENS_MAX

if TYPE_CHECKING:
    from embedmesh.client.core import SealedStep, Trust

Vector = NDArray[np.float32]


class BulkVectors(msgspec.Struct, frozen=True):
    """An answer: a vector for each text."""

    vectors: list[Vector]
    tokens: int
    cost_nanousd: int


class Posted(NamedTuple):
    """A whole reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Post = Callable[[str, bytes, Mapping[str, str]], Awaitable[Posted]]
"""Sends a body to a path below the endpoint, with these headers besides its own."""

Tried = tuple[BulkVectors | Problem, Mapping[str, str]]
"""What came of one try, and the headers beside it."""


class Tries(Protocol):
    """One request."""

    async def once(self, post: Post) -> Tried:
        """Try it. Raises what `post` raises, and ValueError for a reply that is none."""
        ...


class PlainTries:
    """In the clear."""

    def __init__(self, body: bytes, inputs: int) -> None:
        self._body = body
        self._inputs = inputs
        self._headers = {"Idempotency-Key": secrets.token_hex(16)}

    async def once(self, post: Post) -> Tried:
        """Try it."""
        reply = await post("/embeddings", self._body, self._headers)
        if reply.status != 200:
            return read_problem(reply.status, reply.body), reply.headers
        vectors, tokens = decode_vectors(reply.body, self._inputs)
        return BulkVectors(vectors, tokens, _cost(reply)), reply.headers


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
            if isinstance(sealed, tuple):
                return sealed
            self._sealed = sealed
        sealed = self._sealed
        reply = await post("/confidential/embeddings", sealed.body, {})
        self._sealed = None
        if reply.status == 200:
            rows = sealed.read(reply.body)
            vectors = [np.frombuffer(row, "<f4") for row in rows.vectors]
            return BulkVectors(vectors, rows.tokens, _cost(reply)), reply.headers
        problem = sealed.read_refusal(reply.status, reply.body)
        if problem is None:
            problem = read_problem(reply.status, reply.body)
        elif problem.code not in FOR_A_NEW_LOCK:
            return problem, {}
        if problem.code in FOR_A_NEW_LOCK:
            return msgspec.structs.replace(problem, status=503), {}
        return problem, reply.headers

    async def _lock(self, post: Post) -> "SealedStep | Tried":
        """The request, sealed for a trusted node; or why there is no lock."""
        from embedmesh.client.calls import now_ms
        from embedmesh.client.core import LockStep

        try:
            step = LockStep(self._wanted, self._trust)
        except WrongCall as error:  # nothing else can be wrong with it
            return Problem(413, "body_too_large", error.message), {}
        for others in range(OTHER_LOCKS_MAX + 1):
            reply = await post("/nodes/lock", step.body, {})
            if reply.status != 200:
                return read_problem(reply.status, reply.body), reply.headers
            try:
                return step.read(reply.body, now_ms())
            except NodeNotTrusted as error:
                if error.reason != "not_pinned" or others == OTHER_LOCKS_MAX:
                    raise
        raise AssertionError("unreachable: the last lock is used, or refused")


def want_texts(fields: Mapping[str, str | int], body: bytes, texts: list[bytes]) -> Wanted:
    """What a request for these texts (JSON strings) wants; `fields` are its other members."""
    dimensions = fields.get("dimensions")
    tokens = sum(map(len, texts)) + EXTRA_TOKENS_MAX * len(texts)
    return Wanted(
        model=str(fields["model"]),
        body=body,
        inputs=len(texts),
        tokens_max=min(tokens, REQUEST_TOKENS_MAX),
        encoding="base64",
        dimensions=dimensions if isinstance(dimensions, int) else None,
    )


def decode_vectors(body: bytes, inputs: int) -> tuple[list[Vector], int]:
    """The vectors of a reply, in input order, and its tokens. Raises ValueError where anything is not as it must be."""
    reply = msgspec.json.decode(body, type=EmbedReply)
    if [item.index for item in reply.data] != list(range(inputs)):
        raise ValueError("count or order")
    vectors = [np.frombuffer(base64.b64decode(item.embedding, validate=True), "<f4") for item in reply.data]
    if not all(len(vector) == len(vectors[0]) > 0 and np.isfinite(vector).all() for vector in vectors):
        raise ValueError("width or value")
    return vectors, reply.usage.total_tokens


def _cost(reply: Posted) -> int:
    cost = reply.headers.get("x-embedmesh-cost-nanousd", "0")
    return int(cost) if cost.isdecimal() else 0
