"""Servers of other makes as nodes: TEI, vLLM, Infinity, llama.cpp, Ollama, anything with an OpenAI `/v1/embeddings`.

They get texts and answer JSON, unsigned: they are trusted as far as the operator says. What can be checked is: order,
strict base64 or numbers, width, finite, not zero, and a size bound on the whole.

They are taken as they are: a member that is not needed never spoils a reply, whatever it holds, and one that is needed
may be written in any way that leaves its meaning plain. What can be read in two ways is refused.
"""

import binascii
import json
import re
import ssl
import sys
from array import array
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from embedmesh.gateway.nodes.http1 import Dialler, Reply, retry_after_s, tcp_dialler
from embedmesh.gateway.nodes.own import check_of
from embedmesh.rules.embeddings import Counted, EmbedVectors, ServedModel, ServedModels
from embedmesh.rules.errors import InvalidValue, NodeBroke, NodeBusy, UpstreamRefused, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.rules.ports import Catalogue

BYTES_PER_COMPONENT = 24  # of a vector as JSON floats, the longest of our peers' spellings; base64 has 5.4
BYTES_PER_INPUT = 512  # around each vector
BYTES_PER_REPLY = 16_384
PORTS = {"http": 80, "https": 443}
UNIT_OFF_MAX = 1e-3  # what half floats may make of it
WRONG_REQUEST = (400, 413, 414, 422)
SUCCESS = (200, 201, 203)  # others of the class say that there is no whole answer
DIGITS_MAX = 15  # of a number that is written as a text
MEMBERS = ("data", "embedding", "index", "usage")  # that we look at: each may stand once in its object
NAMES = re.compile(f'"(?:{"|".join(MEMBERS)})"'.encode()).findall
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
URL_CHARS_MAX = 300
ELSEWHERE = "; it sends us elsewhere: is its address right?"  # where we do not go
HINTS = {
    **dict.fromkeys((301, 302, 303, 307, 308), ELSEWHERE),
    401: "; is its token right?",
    403: "; is its token right?",
    404: "; are its address and its name for the model right?",
}


class Item(msgspec.Struct):
    """One vector: base64 of little-endian float32, or numbers."""

    embedding: str | list[float]
    index: int | float | str | None = None
    object: Any = None


class Embeddings(msgspec.Struct):
    """The reply, as much of it as we look at."""

    data: list[Item]
    usage: Any = None


class Place(msgspec.Struct, frozen=True):
    """Where a server is: what `parse_url` makes of the operator's word."""

    tls: bool
    host: str
    port: int
    path: str  # before `/embeddings`, without a slash at its end


def parse_url(url: str) -> Place:
    """`http://HOST:PORT` or `https://HOST/some/v1`; `/v1` is added where no path is given. Raises InvalidValue."""
    try:
        parts = urlsplit(url)
        port = PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    sane = url.isascii() and url.isprintable() and " " not in url and len(url) <= URL_CHARS_MAX
    if not sane or not port or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidValue("A server's address is like http://10.0.0.7:8080 or https://host/v1.", param="address")
    return Place(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/") or "/v1")


def dialler(place: Place) -> Dialler:
    """Connections to the server. The operator named it: no policy, but its certificate must be good for its name."""
    tls = ssl.create_default_context() if place.tls else None
    return tcp_dialler(place.host, place.port, tls, name=place.host)


class UpstreamLink:
    """One server. `offers` say which catalogue models it runs, and what it calls them. Implements `Link`."""

    def __init__(
        self,
        place: Place,
        offers: tuple[Offer, ...],
        catalogue: Catalogue,
        token: str,
        normalizing: Collection[str] = (),
    ) -> None:
        """`normalizing` are models whose vectors have unit length: some servers leave that out."""
        self._normalizing = normalizing
        self._wires = dialler(place)
        self._offers = {offer.id: offer for offer in offers}
        self._catalogue = catalogue
        self._base64: bool | None = None  # whether it knows `encoding_format`; learned by asking
        self._decode = msgspec.json.Decoder(Embeddings).decode
        host = place.host if place.port in PORTS.values() else f"{place.host}:{place.port}"
        authorization = f"Authorization: Bearer {token}\r\n" if token else ""
        self._head = (
            f"POST {place.path}/embeddings HTTP/1.1\r\nHost: {host}\r\n{authorization}"
            "Content-Type: application/json\r\nAccept: application/json\r\nAccept-Encoding: identity\r\n"
        )

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        assert counted.texts is not None  # the line gives us no other work
        offer = self._offers.get(model.id)
        if offer is None:
            raise NodeBroke("the server is not said to run this model")
        texts = [offer.prefix + counted.texts[place] for place in part.places]
        limit = len(texts) * (model.width * BYTES_PER_COMPONENT + BYTES_PER_INPUT) + BYTES_PER_REPLY
        asked: dict[str, Any] = {"model": offer.name or offer.id, "input": texts}
        answer = self._read(await self._ask(asked, limit))
        data = _in_order(answer.data, len(texts), model.width)
        if model.id in self._normalizing:
            data = _unit(data, model.width)
        return EmbedVectors(_tokens(answer, part, counted.exact), data)

    async def served(self) -> ServedModels:
        """What the operator says that it serves: there is no list that all of these servers have."""
        models = [model for offer in self._offers.values() if (model := self._catalogue.find(offer.id)) is not None]
        return ServedModels(
            [ServedModel(model.id, model.width, model.max_tokens, model.digest, model.tier) for model in models]
        )

    def close(self) -> None:
        self._wires.close()

    async def _ask(self, asked: dict[str, Any], limit: int) -> Reply:
        """A success. The first time without knowing whether `encoding_format` is known there."""
        knew = self._base64
        if knew is not False:
            reply = await self._exchange(asked | {"encoding_format": "base64"}, limit)
            self._base64 = True if reply.status in SUCCESS else None if reply.status in WRONG_REQUEST else knew
            if knew or reply.status not in WRONG_REQUEST:  # it knew it and is believed, until it is asked again
                return _checked(reply)
        reply = await self._exchange(asked, limit)
        if reply.status in SUCCESS:
            self._base64 = False
        return _checked(reply)

    def _read(self, reply: Reply) -> Embeddings:
        body = reply.body.removeprefix(BYTE_ORDER_MARK)
        try:
            answer = self._decode(body)
            _check_unambiguous(body, answer)
        except (ValueError, RecursionError):  # msgspec's, json's and Unicode's own errors are ValueErrors
            if reply.by_closing:
                raise NodeBroke("the server closed the connection before its reply was whole") from None
            coding = reply.headers.get(b"content-encoding", b"identity").lower()
            words = "is compressed, which was not asked for" if coding != b"identity" else "is not of OpenAI's form"
            raise WrongAnswer(f"the server's reply {words}", check=Check.FORM) from None
        return answer

    async def _exchange(self, asked: dict[str, Any], limit: int) -> Reply:
        body = json.dumps(asked, ensure_ascii=False).encode()
        request = f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body
        return await self._wires.exchange(lambda: request, limit)


def _checked(reply: Reply) -> Reply:
    """The reply, if its status says that it is one. Raises what any other status means."""
    status, wait_s = reply.status, retry_after_s(reply.headers)
    if status in SUCCESS:
        return reply
    if status in (408, 429, 503):
        raise NodeBusy(f"it is busy: HTTP {status}", retry_after_s=wait_s)
    check = check_of(status)
    if status in WRONG_REQUEST:
        raise UpstreamRefused(f"it refuses: HTTP {status}", check=check, retry_after_s=wait_s)
    words = f"it refuses: HTTP {status}" if check in (Check.ACCESS, Check.STATUS_4XX) else f"it answered HTTP {status}"
    raise NodeBroke(words + HINTS.get(status, ""), check=check, retry_after_s=wait_s)


def _check_unambiguous(body: bytes, answer: Embeddings) -> None:
    """Raises ValueError where a member that we look at stands twice in one object: readers differ in which counts.

    Where the names of them stand as often as they must, none stands twice; that is quick, and so with nearly every
    reply. Else, or where a name may be spelt with an escape, the body is read anew, slowly.
    """
    must = 1 + (answer.usage is not None) + len(answer.data)  # data, usage, and an embedding each; and of the items:
    must += sum((item.index is not None) + (item.object == "embedding") for item in answer.data)
    if b"\\" in body or len(NAMES(body)) != must:
        json.loads(body, object_pairs_hook=_once_each)


def _once_each(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if any(names.count(name) > 1 for name in MEMBERS):
        raise ValueError("a member stands twice")


def _whole(said: object) -> int | None:
    """A whole number of at least 0, also as `3.0` or `"3"`; None of anything else."""
    if isinstance(said, str) and said.isascii() and said.isdecimal() and len(said) <= DIGITS_MAX:
        return int(said)
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else None


def _in_order(items: list[Item], count: int, width: int) -> bytes:
    """The vectors as float32, by index, or as they came where none has one. Raises WrongAnswer."""
    if len(items) != count:
        raise WrongAnswer("the server answered with another number of vectors than asked", check=Check.COUNT)
    rows: list[bytes | None] = [None] * count
    ordered = all(item.index is None for item in items)
    for at, item in enumerate(items):
        index = at if ordered else _whole(item.index)
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
            raise WrongAnswer("a component is no float32", check=Check.ENCODING) from None
        if sys.byteorder != "little":
            numbers.byteswap()
        row = numbers.tobytes()
    if len(row) != width * 4:
        raise WrongAnswer("a vector has another width than the catalogue's", check=Check.WIDTH)
    return row


def _unit(data: bytes, width: int) -> bytes:
    """The same vectors with length 1, where any is not of about that length already."""
    rows = np.frombuffer(data, "<f4").reshape(-1, width)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not (np.abs(norms - 1.0) > UNIT_OFF_MAX).any():
        return data
    norms[norms == 0] = 1.0  # found out by the check that follows
    unit: bytes = (rows / norms).astype("<f4").tobytes()
    return unit


def _tokens(answer: Embeddings, part: Part, exact: bool) -> int:
    """Ours where we have counted; else the server's, capped by our bound, and the bound where it does not say."""
    if exact or not isinstance(answer.usage, dict):
        return part.tokens
    said = _whole(answer.usage.get("prompt_tokens")) or _whole(answer.usage.get("total_tokens"))
    return min(said or part.tokens, part.tokens)
