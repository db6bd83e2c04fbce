"""The caller: requests with a deadline for all of each, and what is said of the replies."""

import base64
import binascii
import json
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from threading import Timer
from typing import Any, NamedTuple

import numpy as np

from bench.rig.http import MODEL, Vectors
from bench.rig.processes import HOST

WITHIN_S = 20.0  # for the whole reply: four times what each gateway is told to wait for a node
BODY_BYTES_MAX = 16 * 1024 * 1024  # of a reply that is read: 2,048 vectors as floats
CLOSE = 1e-6  # of a component: floats as decimals


class Broken(Exception):
    """What happened instead, in a few words."""


class NotClaimed(Exception):
    """Why a row cannot be asked of a peer."""


class Answer(NamedTuple):
    """What came; status 0 where no whole reply did, and `lost` says why."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    lost: str = ""

    @property
    def words(self) -> str:
        """For a cell of the table."""
        return self.lost or str(self.status)

    def json(self) -> dict[str, Any]:
        """The body. Raises Broken."""
        try:
            found = json.loads(self.body)
        except ValueError:
            raise Broken(f"{self.words}, no JSON") from None
        if not isinstance(found, dict):
            raise Broken(f"{self.words}, no object")
        return found


class Target(NamedTuple):
    """Where a gateway is called, and how."""

    port: int
    key: str | None = None
    headers: Mapping[str, str] = {}

    def ask(
        self,
        body: Mapping[str, Any] | bytes | Iterator[bytes] = b"",
        method: str = "POST",
        path: str = "/v1/embeddings",
        headers: Mapping[str, str | None] | None = None,
        within_s: float = WITHIN_S,
    ) -> Answer:
        """One request on a connection of its own. A header of None is left out; an iterator is sent in chunks."""
        fields: dict[str, str | None] = {"Content-Type": "application/json", **self.headers}
        if self.key is not None:
            fields["Authorization"] = f"Bearer {self.key}"
        fields |= headers or {}
        sent = {name: value for name, value in fields.items() if value is not None}
        payload = json.dumps(body).encode() if isinstance(body, Mapping) else body
        connection = HTTPConnection(HOST, self.port, timeout=within_s)
        late = []

        def give_up() -> None:
            late.append(True)
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

        watch = Timer(within_s, give_up)
        watch.start()
        try:
            connection.request(method, path, payload, sent)
            reply = connection.getresponse()
            read = reply.read(BODY_BYTES_MAX)
            if len(read) == BODY_BYTES_MAX:
                return Answer(0, {}, b"", f"more than {BODY_BYTES_MAX >> 20} MiB")
            if late:
                raise TimeoutError
            if reply.length:
                return Answer(0, {}, b"", "a body that was cut")
            found = {name.lower(): value for name, value in reply.getheaders()}
            return Answer(reply.status, found, read)
        except (OSError, HTTPException) as error:
            lost = f"nothing within {within_s:.0f} s" if late or isinstance(error, TimeoutError) else "hung up"
            return Answer(0, {}, b"", lost)
        finally:
            watch.cancel()
            connection.close()

    def embed(self, given: Any, *, headers: Mapping[str, str | None] | None = None, **more: Any) -> Answer:
        """`POST /v1/embeddings`, in base64 unless `more` says otherwise."""
        return self.ask({"model": MODEL, "input": given, "encoding_format": "base64", **more}, headers=headers)


def vectors_in(answer: Answer, encoding: str = "base64") -> Vectors:
    """The vectors, as a client takes them: in the order in which they stand. Raises Broken."""
    if answer.status != 200:
        raise Broken(answer.words)
    data = answer.json().get("data")
    if not isinstance(data, list):
        raise Broken("200 without vectors")
    rows = [_row(item.get("embedding") if isinstance(item, dict) else None, encoding) for item in data]
    if len({len(row) for row in rows}) > 1:
        raise Broken("200, vectors of several widths")
    if any(item.get("index") != at for at, item in enumerate(data)):
        raise Broken("200, indexes are not in order")
    return np.array(rows, dtype=np.float32)


def _row(embedding: Any, encoding: str) -> Sequence[float]:
    if encoding == "base64":
        if not isinstance(embedding, str):
            raise Broken("200, floats instead of base64")
        try:
            found: list[float] = np.frombuffer(base64.b64decode(embedding, validate=True), "<f4").tolist()
        except (binascii.Error, ValueError):
            raise Broken("200, base64 that cannot be read") from None
        return found
    if not isinstance(embedding, list):
        raise Broken("200, base64 instead of floats")
    if not all(isinstance(each, int | float) for each in embedding):
        raise Broken("200, a component that is no number")
    return embedding


def check_right(answer: Answer, truth: Vectors, encoding: str = "base64") -> None:
    """Raises Broken unless these are the right vectors, one for each input and in their order."""
    found = vectors_in(answer, encoding)
    if len(found) != len(truth):
        raise Broken(f"200, {len(found)} vectors for {len(truth)} inputs")
    if found.ndim != 2 or found.shape[1] != truth.shape[1]:
        raise Broken(f"200, {found.shape[-1]} components")
    if not np.isfinite(found).all():
        raise Broken("200, NaN or infinity")
    if not found.any(axis=1).all():
        raise Broken("200, a zero vector")
    length = float(np.linalg.norm(found[0].astype(np.float64)))
    if not math.isclose(length, float(np.linalg.norm(truth[0])), rel_tol=1e-3):
        raise Broken(f"200, length {length:.3g}")
    if not np.allclose(found, truth, atol=CLOSE):
        raise Broken("200, wrong vectors")


def check_refused(answer: Answer, *statuses: int) -> None:
    """Raises Broken unless it was refused with one of these statuses; 400 may be 413 or 422, as servers differ."""
    if answer.status not in (*statuses, *((413, 422) if 400 in statuses else ())):
        raise Broken(answer.words)


def check_envelope(answer: Answer, code: str | None = None) -> None:
    """Raises Broken unless a failure has OpenAI's form, and this code, where one is given."""
    if "application/json" not in answer.headers.get("content-type", ""):
        raise Broken(f"{answer.status}, no JSON")
    error = answer.json().get("error")
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        raise Broken(f"{answer.status}, another form")
    missing = sorted({"type", "param", "code"} - error.keys())
    if missing:
        raise Broken(f"{answer.status}, without {', '.join(missing)}")
    if code is not None and error["code"] != code:
        raise Broken(f"{answer.status}, code {error['code']!r}")
