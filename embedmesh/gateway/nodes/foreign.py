"""Servers of other makes as nodes: TEI, vLLM, Infinity, llama.cpp, Ollama, anything with an OpenAI `/v1/embeddings`.

They get texts and answer unsigned JSON: the operator decides how far they are trusted. We check what can be checked:
order, strict base64 or numbers, width, finite, not zero, and the size of the whole. See foreign_rerank for scores.

We are lenient where the meaning is plain: a field that we do not need may hold anything, and one that we need may be
written in several ways. A reply that can be read in two ways is refused.
"""

import binascii
import re
import sys
from array import array
from collections.abc import Collection
from typing import Any

import msgspec
import numpy as np

from embedmesh.gateway.nodes.foreign_replies import check_once_each, read_reply, whole
from embedmesh.gateway.nodes.foreign_rerank import UpstreamRerank
from embedmesh.rules.embeddings import Counted, EmbedVectors, ServedModel, ServedModels
from embedmesh.rules.errors import NodeBroke, NodeRefused, UpstreamRefused, WrongAnswer
from embedmesh.rules.forwarding import Attempt, AttemptOwner, Part
from embedmesh.rules.generation import Generating, GenerationRequest, NodeStream
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.rules.ports import Catalogue
from embedmesh.upstream.generating import UpstreamGeneration, in_our_words
from embedmesh.upstream.http1_reader import Http1Reply
from embedmesh.upstream.http1_stream import BodyStream
from embedmesh.upstream.refusals import SUCCESS, WRONG_REQUEST
from embedmesh.upstream.server import UpstreamServer, UpstreamUrl, checked

NOT_OPENAIS = "the server's reply is not of OpenAI's form"
NOT_SEALED = "a server of another make takes no confidential requests"
EMBEDDINGS = "embeddings"  # the path
JSON_BYTES_PER_COMPONENT = 24  # of a vector as JSON floats, in the longest spelling of known servers; base64 has 5.4
JSON_BYTES_PER_VECTOR = 512  # around each vector
JSON_BYTES_PER_REPLY = 16_384  # around all vectors
UNIT_OFF_MAX = 1e-3  # of a unit vector's length, in half floats
VECTOR_LENGTH_MAX = 1e6  # of one that is scaled: models give 1 to some hundreds; bytes in another order 1e30 and more
REPLY_FIELDS = ("data", "embedding", "index", "usage")  # that we read: each may be in its object once
FIELD_NAMES = re.compile(f'"(?:{"|".join(REPLY_FIELDS)})"'.encode()).findall


class Item(msgspec.Struct):
    """One vector: base64 of little-endian float32, or numbers."""

    embedding: str | list[float]
    index: int | float | str | None = None
    object: Any = None


class UpstreamEmbeddings(msgspec.Struct):
    """The reply, as much of it as we look at."""

    data: list[Item]
    usage: Any = None


DECODE = msgspec.json.Decoder(UpstreamEmbeddings).decode


class UpstreamLink:
    """One server. `offers` are the catalogue's models that it runs, with its own names. Implements `Link`."""

    def __init__(
        self,
        url: UpstreamUrl,
        offers: tuple[Offer, ...],
        catalogue: Catalogue,
        token: str,
        normalizing: Collection[str] = (),
        server: type[UpstreamServer] = UpstreamServer,
    ) -> None:
        """`normalizing` are the models whose vectors have unit length, which some servers leave out."""
        self._normalizing = normalizing
        self._server = server(url, token)
        self._offers = {offer.id: offer for offer in offers}
        self._catalogue = catalogue
        self._base64: bool | None = None  # whether it supports `encoding_format`; learned from its replies
        self._generation = UpstreamGeneration(self._server, self._offers)
        self._rerank = UpstreamRerank(self._server, url.path)

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        offer = self._offers.get(model.id)
        if offer is None:
            raise NodeBroke("the server does not run this model")
        try:
            return await (self._rerank.score if model.reranks else self._embed)(part, model, counted, offer)
        except UpstreamRefused as refused:
            raise in_our_words(refused, offer, model) from None

    async def _embed(self, part: Part, model: Model, counted: Counted, offer: Offer) -> EmbedVectors:
        assert counted.texts is not None  # the scheduler gives us no other work
        texts = [offer.prefix + counted.texts[row] for row in part.rows]
        limit = len(texts) * (model.width * JSON_BYTES_PER_COMPONENT + JSON_BYTES_PER_VECTOR) + JSON_BYTES_PER_REPLY
        body = {"model": offer.name or offer.id, "input": texts}
        answer = read_reply(await self._ask(body, limit), _decoded, NOT_OPENAIS)
        data = _in_order(answer.data, len(texts), model.width)
        if model.id in self._normalizing:
            data = _unit(data, model.width)
        return EmbedVectors(_tokens(answer, part, counted.exact), data)

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Attempt | None:
        return None  # what such a server needs may take a second request

    async def generate(self, model: Model, asked: GenerationRequest) -> bytes:
        return await self._generation.generate(model, asked)

    async def stream(self, model: Model, asked: GenerationRequest) -> NodeStream:
        return await self._generation.stream(model, asked)

    async def post_sealed(self, body: bytes, limit: int, request_id: str) -> bytes:
        raise NodeRefused(NOT_SEALED)

    async def generate_sealed(self, modality: Generating, body: bytes, limit: int, request_id: str) -> bytes:
        raise NodeRefused(NOT_SEALED)

    async def stream_sealed(self, modality: Generating, body: bytes, limit: int, request_id: str) -> BodyStream:
        raise NodeRefused(NOT_SEALED)

    async def served(self) -> ServedModels:
        """The models that the operator has listed: not all of these servers have a list."""
        models = [model for offer in self._offers.values() if (model := self._catalogue.find(offer.id)) is not None]
        return ServedModels(
            [ServedModel(model.id, model.width, model.max_tokens, model.digest, model.tier) for model in models]
        )

    def close(self) -> None:
        self._server.close()

    async def _ask(self, body: dict[str, Any], limit: int) -> Http1Reply:
        """A successful reply. The first request finds out whether the server supports `encoding_format`."""
        knew = self._base64
        if knew is not False:
            reply = await self._server.exchange(EMBEDDINGS, body | {"encoding_format": "base64"}, limit)
            self._base64 = True if reply.status in SUCCESS else None if reply.status in WRONG_REQUEST else knew
            if knew or reply.status not in WRONG_REQUEST:  # else try without
                return checked(reply)
        reply = await self._server.exchange(EMBEDDINGS, body, limit)
        if reply.status in SUCCESS:
            self._base64 = False
        return checked(reply)


def _decoded(body: bytes) -> UpstreamEmbeddings:
    answer = DECODE(body)
    _check_unambiguous(body, answer)
    return answer


def _check_unambiguous(body: bytes, answer: UpstreamEmbeddings) -> None:
    """Raises ValueError where one object has a field that we read twice: parsers differ in which one counts.

    Nearly every reply has the fields' names exactly as often as needed, so that none is there twice; that is a fast
    check. Else, or where a name may contain an escape, the body is parsed again, slowly.
    """
    must = 1 + (answer.usage is not None) + len(answer.data)  # data, usage, and an embedding each; and of the items:
    must += sum((item.index is not None) + (item.object == "embedding") for item in answer.data)
    if b"\\" in body or len(FIELD_NAMES(body)) != must:
        check_once_each(body, REPLY_FIELDS)


def _in_order(items: list[Item], count: int, width: int) -> bytes:
    """The vectors as float32, by index, or as they came if none has an index. Raises WrongAnswer."""
    if len(items) != count:
        raise WrongAnswer("the server answered with a wrong number of vectors", check=Check.COUNT)
    rows: list[bytes | None] = [None] * count
    ordered = all(item.index is None for item in items)
    for at, item in enumerate(items):
        index = at if ordered else whole(item.index)
        if index is None or index >= count or rows[index] is not None:
            raise WrongAnswer("the server's indexes are not those of the inputs, once each", check=Check.ORDER)
        rows[index] = _row(item.embedding, width)
    return b"".join(row for row in rows if row is not None)


def _row(embedding: str | list[float], width: int) -> bytes:
    if isinstance(embedding, str):
        try:
            row = binascii.a2b_base64(embedding, strict_mode=True)
        except binascii.Error:
            raise WrongAnswer("a vector is not strict base64", check=Check.ENCODING) from None
    else:
        try:
            numbers = array("f", embedding)
        except OverflowError:
            raise WrongAnswer("a component is not a float32", check=Check.ENCODING) from None
        if sys.byteorder != "little":
            numbers.byteswap()
        row = numbers.tobytes()
    if len(row) != width * 4:
        raise WrongAnswer("a vector has another width than the catalogue's", check=Check.WIDTH)
    return row


def _unit(data: bytes, width: int) -> bytes:
    """The vectors scaled to length 1, if any is not of about that length already. Raises WrongAnswer."""
    rows = np.frombuffer(data, "<f4").reshape(-1, width)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not (np.abs(norms - 1.0) > UNIT_OFF_MAX).any():
        return data
    if (norms > VECTOR_LENGTH_MAX).any():  # scaled, it would look like any other
        raise WrongAnswer("a vector is longer than any model makes it", check=Check.ENCODING)
    norms[norms == 0] = 1.0  # `verify` refuses it
    unit: bytes = (rows / norms).astype("<f4").tobytes()
    return unit


def _tokens(answer: UpstreamEmbeddings, part: Part, exact: bool) -> int:
    """Our own exact count; else the server's, capped by our bound; else the bound."""
    if exact or not isinstance(answer.usage, dict):
        return part.tokens
    said = whole(answer.usage.get("prompt_tokens")) or whole(answer.usage.get("total_tokens"))
    return min(said or part.tokens, part.tokens)
