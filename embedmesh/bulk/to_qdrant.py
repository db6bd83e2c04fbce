"""The sinks `qdrant:http://host:6333/docs` and `qdrant:FOLDER/docs`: points of the collection `docs`, found by id.

The second is the client's own local mode: a folder that one process may have open.
"""

import atexit
import functools
import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from embedmesh.bulk.databases import INT64_MAX, SinkNotReached, persist, plain, rows_by_key
from embedmesh.bulk.sinks import UnitTable
from embedmesh.bulk.stops import NothingListens, Stopped
from embedmesh.bulk.units import JobUnit
from embedmesh.bulk.usage import WrongUsage

FORM = "qdrant:http://host:6333/collection or qdrant:FOLDER/collection"
MISSING = "Qdrant needs its client, which is not installed: pip install 'embedmesh[qdrant]'."
KEY_VARIABLE = "QDRANT_API_KEY"
REQUEST_S = 60  # a server that builds an index meanwhile is slow
REQUEST_FLOATS_MAX = 200_000  # some 4 MB of JSON; servers take 32 MB
BUSY = (408, 429, 500, 502, 503, 504)
ID_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "embedmesh:qdrant-id")  # where ids that Qdrant cannot have become UUIDs


class QdrantSink:
    """Any number of threads may write, and, to a server, any number of processes."""

    def __init__(self, output: str) -> None:
        """Raises WrongUsage; connects to nothing."""
        address, _, option = output.removeprefix("qdrant:").partition("?")
        self._server, _, name = address.rstrip("/").rpartition("/")
        parts = urlsplit(address)
        self._is_local = parts.scheme not in ("http", "https")
        self._name = name if self._is_local else unquote(name)
        self._text = option.removeprefix("text=") if option else None
        if "@" in parts.netloc:
            raise WrongUsage(f"Others would see a key in the output's address. Put it into {KEY_VARIABLE}.")
        place = self._server if self._is_local else parts.netloc and parts.path.strip("/")
        if not name or not place or (option and not option.startswith("text=")):
            raise WrongUsage(f"The output must look like {FORM}.")

    def begin(self, *, resumed: bool, overwrite: bool, width: int | None) -> None:
        """Raises WrongUsage where the collection cannot take vectors, NothingListens where no server is there."""
        try:
            with self._opened() as client:
                self._collection(client, width or 0, make=False)
        except SinkNotReached as error:
            raise NothingListens(str(error)) from None

    def write(self, unit: JobUnit, table: UnitTable) -> str:
        """A point for each text that was embedded."""
        return persist(lambda: self._write(table))

    def finish(self, parts: Iterable[str]) -> None:
        """Raises Stopped where the collection is gone."""
        with self._opened() as client:
            if any(parts) and not client.collection_exists(self._name):
                raise Stopped(f"The collection {self._name!r} was deleted during the job. --overwrite begins anew")

    def _write(self, table: UnitTable) -> str:
        width = table.vectors.shape[1]
        rows = [(key, row) for key, row in rows_by_key(table.ids).items() if table.errors[row] is None]
        given = table.columns if self._text is None else table.columns | {self._text: table.texts}
        with self._opened() as client:
            if not rows or not self._collection(client, width):
                return ""
            step = max(1, REQUEST_FLOATS_MAX // width)
            for at in range(0, len(rows), step):
                part = rows[at : at + step]
                points = _models().Batch(
                    ids=[_point_id(key) for key, _ in part],
                    vectors=table.vectors[[row for _, row in part]].tolist(),
                    payloads=[{name: plain(values[row]) for name, values in given.items()} for _, row in part],
                )
                client.upsert(self._name, points, wait=True)
        return self._name

    def _collection(self, client: Any, width: int, *, make: bool = True) -> bool:
        """Whether the collection is there now. Raises WrongUsage where these vectors cannot go into it."""
        models = _models()
        if not client.collection_exists(self._name):
            if not (width and make):
                return False
            vectors = models.VectorParams(size=width, distance=models.Distance.COSINE)
            try:
                client.create_collection(self._name, vectors_config=vectors)
            except Exception:
                if not client.collection_exists(self._name):  # else another worker has made it just now
                    raise
        found = client.get_collection(self._name).config.params.vectors
        if not isinstance(found, models.VectorParams):
            raise WrongUsage(f"The collection {self._name!r} has named vectors. One with a single vector is needed.")
        if width and found.size != width:
            raise WrongUsage(
                f"The collection {self._name!r} has vectors of {found.size:,} components, and these have {width:,}."
                " Choose another collection, another model or --dimensions."
            )
        return True

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """The client, with its errors in our words."""
        client = _client(self._server, self._is_local)
        from qdrant_client.http import exceptions

        try:
            with _local_mode if self._is_local else nullcontext():
                yield client
        except exceptions.ResponseHandlingException as error:
            raise SinkNotReached(f"Qdrant does not answer ({type(error.source).__name__})") from None
        except exceptions.UnexpectedResponse as error:
            words = f"HTTP {error.status_code} {error.reason_phrase}"
            if error.status_code in BUSY:
                raise SinkNotReached(f"Qdrant could not do it now ({words})") from None
            hint = f" Is {KEY_VARIABLE} right?" if error.status_code in (401, 403) else ""
            raise WrongUsage(f"Qdrant refused to write into {self._name!r} ({words}).{hint}") from None


def _point_id(key: str) -> int | str:
    """Whole numbers below 2^63 and UUIDs as they are, whether they came as text or not; of others a UUID is made."""
    if key.isascii() and key.isdecimal() and str(int(key)) == key and int(key) <= INT64_MAX:
        return int(key)
    with suppress(ValueError):
        if str(uuid.UUID(key)) == key.lower():
            return key
    return str(uuid.uuid5(ID_SPACE, key))


def _models() -> Any:
    """The client's models. Raises WrongUsage."""
    try:
        from qdrant_client import models
    except ImportError:
        raise WrongUsage(MISSING) from None
    return models


_local_mode = threading.RLock()  # its client is not made for several threads


@functools.cache
def _client(server: str, is_local: bool) -> Any:
    """One a server and process. Raises WrongUsage."""
    _models()
    from qdrant_client import QdrantClient

    if not is_local:
        key = os.environ.get(KEY_VARIABLE)
        return QdrantClient(url=server, api_key=key, timeout=REQUEST_S, check_compatibility=False)
    try:
        client = QdrantClient(path=server, force_disable_check_same_thread=True)
    except RuntimeError:
        raise WrongUsage(
            f"Another process has the folder {server} open. Qdrant's local mode is for one process: end the other,"
            " use --engine local, or run a Qdrant server."
        ) from None
    atexit.register(client.close)  # it complains where its own end comes later
    return client
