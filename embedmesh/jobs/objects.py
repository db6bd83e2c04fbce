"""Files in object storage, by fsspec: S3 and what speaks it, Google, Azure. The extra `embedmesh[remote]`.

    KEY/000000, KEY/000001 …   the parts of what was written, each of PART_BYTES
    KEY/end                    how long it is, and what is behind the last whole part
    stores/ID                  a mark: the store of that id keeps files here

Object storage renames nothing. So parts are objects of their own, and `end` is written last: what has no `end` is not
there. A multipart upload would do the same in another way for each make of storage, would hide what a gateway that died
has left from listings, and its parts have at least 5 MiB, which is memory of each upload.

An operation has OPERATION_S in all, whatever the driver tries in that time. Drivers run on the event loop of fsspec, in
its own thread: nothing of them is on the gateway's.
"""

import asyncio
import logging
import re
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from embedmesh.bulk.remote import file_system
from embedmesh.bulk.usage import WrongUsage
from embedmesh.jobs.backend import FREE_BYTES, store_key
from embedmesh.jobs.chunks import ContentsLost
from embedmesh.rules.errors import SetupError
from embedmesh.rules.file_failures import StorageFull

OBJECT_THREADS = 8  # that wait for the network: a part takes some 50 ms
PART_BYTES = 2 * 1024 * 1024  # of each upload in memory, and twice that where it is just sent
FIRST_BYTES = 128 * 1024  # of an object `end` that are read at first: most segments are no longer
OPERATION_S = 20.0  # a part at 100 kB/s; several tries of a driver where it is refused or cut
LATE_S = 2.0  # for fsspec's own thread to notice that
DROP_S = 10.0  # what is not deleted by then is a stray
AWAY_S = 1.0  # after a silence nothing is asked: what waited behind it for a thread hears of it at once
TOLD_S = 60.0  # the same is logged once in that time: a hundred batches may try again every five seconds
HEAD = struct.Struct(">4sIQ")  # of `end`: a mark, the size of a part, the size of all
MARK = b"EMO1"
AWAY = "Files cannot be kept or read now. Try again later."
NO_BUCKET = "NoSuchBucket"  # which is told as an object that is not there
NO_KEY = "NoSuchKey"  # the one 404 of S3 that says so; any other may be of a proxy before it
CUT = "InvalidRange"  # what is asked for lies behind its end
ERROR_CODE = re.compile(r"[A-Za-z]{1,64}")
WRITTEN = ("LastModified", "last_modified", "updated", "mtime", "created")  # when, as makes of storage call it

logger = logging.getLogger(__name__)


class ObjectDraft:
    """Parts of what is being written, each sent once it is whole."""

    def __init__(self, storage: "ObjectStorage", key: str) -> None:
        self._storage = storage
        self._key = key
        self._waiting = bytearray()
        self._parts = 0
        self._sent = False

    def write(self, data: bytes) -> None:
        self._waiting += data
        while len(self._waiting) >= PART_BYTES:
            self._put(f"{self._parts:06}", bytes(memoryview(self._waiting)[:PART_BYTES]))
            del self._waiting[:PART_BYTES]
            self._parts += 1

    def end(self) -> None:
        size = self._parts * PART_BYTES + len(self._waiting)
        self._put("end", HEAD.pack(MARK, PART_BYTES, size) + self._waiting)

    def abort(self) -> None:
        self._waiting.clear()
        if self._sent:
            self._storage.drop(self._key)

    def _put(self, name: str, content: bytes) -> None:
        self._sent = True
        self._storage.put(f"{self._key}/{name}", content)


class StoredObject:
    """What was written, read by ranges: those that have just come are at hand."""

    def __init__(self, storage: "ObjectStorage", key: str) -> None:
        """Raises ContentsLost, StorageFull."""
        self._storage = storage
        self._key = key
        first = storage.get(f"{key}/end", 0, FIRST_BYTES)
        if len(first) < HEAD.size or not first.startswith(MARK):
            raise ContentsLost("this is no object of ours")
        _, self._part_bytes, self.size = HEAD.unpack_from(first)
        if not self._part_bytes:
            raise ContentsLost("the object was changed")
        self._parts = self.size // self._part_bytes
        self._at, self._here = self._parts * self._part_bytes, first[HEAD.size :]

    def read(self, start: int, size: int, until: int) -> bytes:
        found = bytearray()
        stop = min(start + size, self.size)
        while (at := start + len(found)) < stop:
            if not 0 <= at - self._at < len(self._here):
                self._fetch(at, min(until, self.size))
            found += self._here[at - self._at : stop - self._at]
        if stop >= self._at + len(self._here):
            self._here = b""  # nothing is kept while a slow caller takes its time
        return bytes(found)

    def close(self) -> None:
        self._here = b""

    def _fetch(self, at: int, until: int) -> None:
        number, first = divmod(at, self._part_bytes)
        last = min(self._part_bytes, first + until - at)
        name, ahead = ("end", HEAD.size) if number == self._parts else (f"{number:06}", 0)
        self._at, self._here = at, self._storage.get(f"{self._key}/{name}", ahead + first, ahead + last)
        if not self._here:
            raise ContentsLost("the object was cut")


class ObjectStorage:
    """A prefix, which all gateways of a store share. Credentials are where its driver looks for them."""

    threads_max = OBJECT_THREADS

    def __init__(self, address: str, store_id: str) -> None:
        self._address = address
        self._mark = store_key(store_id)
        self._marked = False
        self._system: Any = None
        self._root = ""
        self._away_until_s = 0.0
        self._told: dict[str, float] = {}  # until when each is not logged again
        self._cut: Future[None] = Future()
        self._lock = threading.Lock()

    def make(self) -> None:
        scheme, _, path = self._address.partition("://")
        if scheme in ("file", "local"):
            raise SetupError("Give --files-dir as a path where it is a folder.")
        user, _, _ = path.partition("/")[0].rpartition("@")
        if "?" in path or ":" in user or "::" in self._address:  # the address is logged: no secrets in it
            raise SetupError("Give --files-dir as SCHEME://BUCKET/PREFIX. All else is up to the driver's own settings.")
        try:
            self._system, root = file_system(self._address, use_listings_cache=False, skip_instance_cache=True)
        except WrongUsage as wrong:
            raise SetupError(f"--files-dir: {wrong}") from None
        except Exception as error:  # noqa: BLE001 - a driver that does not find what it needs
            raise SetupError(f"--files-dir: {self._address} cannot be used ({type(error).__name__}).") from None
        self._root = root.rstrip("/")
        if not self._root:
            raise SetupError("Give --files-dir as SCHEME://BUCKET/PREFIX: it names no bucket.")
        if not self._system.async_impl:
            from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

            self._system = AsyncFileSystemWrapper(self._system, asynchronous=False)
        for name in ("aiobotocore", "botocore"):  # which tell where they found what
            logging.getLogger(name).setLevel(logging.WARNING)

    def free_bytes(self) -> int:
        return FREE_BYTES

    total_bytes = free_bytes

    def begin(self, key: str) -> ObjectDraft:
        return ObjectDraft(self, key)

    def open(self, key: str) -> StoredObject:
        return StoredObject(self, key)

    def mark(self) -> None:
        self._pipe(self._mark, b"1")
        self._marked = True

    def check(self) -> None:
        if self._marked:
            with suppress(FileNotFoundError):  # somebody has deleted it
                self._cat(self._mark, 0, 1)
                return
        self.mark()

    def put(self, key: str, content: bytes) -> None:
        """Write an object. Raises StorageFull."""
        if not self._marked:
            self.mark()  # first: see `get`
        self._pipe(key, content)

    def _pipe(self, key: str, content: bytes) -> None:
        try:
            self._do("pipe_file", f"{self._root}/{key}", content)
        except FileNotFoundError as error:  # no bucket, in whatever words
            raise self._away("pipe_file", error) from None

    def get(self, key: str, start: int, stop: int) -> bytes:
        """Bytes of an object, as far as it has them. Raises ContentsLost, StorageFull.

        An object is lost where S3 says so; with a driver that only says "not found", where it is not found again once
        the mark of the store was.
        """
        try:
            return self._cat(key, start, stop)
        except FileNotFoundError as error:
            if _code(error) == NO_KEY:
                raise ContentsLost("there is no such object") from None
            if _response(error) is not None:
                raise self._away("cat_file", error) from None
        try:
            self._cat(self._mark, 0, 1)
        except FileNotFoundError as error:
            raise self._away("cat_file", error) from None
        try:
            return self._cat(key, start, stop)
        except FileNotFoundError:
            raise ContentsLost("there is no such object") from None

    def _cat(self, key: str, start: int, stop: int) -> bytes:
        found: bytes = self._do("cat_file", f"{self._root}/{key}", start=start, end=stop)
        return found

    def drop(self, key: str) -> None:
        with suppress(StorageFull, FileNotFoundError):
            found = self._do("find", f"{self._root}/{key}", drops=True)
            self._do("rm", list(found), drops=True)

    def names(self, key: str) -> list[str]:
        try:
            found: Sequence[str] = self._do("ls", f"{self._root}/{key}", detail=False)
        except FileNotFoundError:
            return []
        return sorted({path.rstrip("/").rpartition("/")[2] for path in found})

    def is_old(self, key: str, age_s: float) -> bool:
        try:
            found = self._do("find", f"{self._root}/{key}", detail=True)
        except FileNotFoundError as error:
            raise self._away("find", error) from None
        return bool(found) and all(time.time() - _written_s(about) > age_s for about in found.values())

    def cut(self) -> None:
        with self._lock:
            if not self._cut.done():
                self._cut.set_result(None)

    def _do(self, operation: str, *given: Any, drops: bool = False, **options: Any) -> Any:
        """What an operation of the driver returns. Raises FileNotFoundError, ContentsLost, StorageFull."""
        if self._cut.done() or (time.monotonic() < self._away_until_s and not drops):
            raise StorageFull(AWAY)
        within_s = DROP_S if drops else OPERATION_S
        call = getattr(self._system, f"_{operation}")
        within = asyncio.wait_for(call(*given, **options), within_s)
        future = asyncio.run_coroutine_threadsafe(within, self._system.loop)
        try:
            wait((future, self._cut), within_s + LATE_S, FIRST_COMPLETED)
            if not future.done():
                future.cancel()
                raise StorageFull(AWAY) if self._cut.done() else TimeoutError
            return future.result()
        except StorageFull:
            raise
        except FileNotFoundError as error:
            if _code(error) == NO_BUCKET:
                raise self._away(operation, error) from None
            raise
        except Exception as error:  # noqa: BLE001 - each make of storage has errors of its own
            if _code(error) == CUT:
                raise ContentsLost("the object was cut") from None
            raise self._away(operation, error) from None

    def _away(self, operation: str, error: Exception) -> StorageFull:
        """It cannot be used now. The log says how that was told, and not in which words: these may show a secret."""
        now = time.monotonic()
        what = " ".join(filter(None, (operation, type(error).__name__, _code(error))))
        with self._lock:
            if isinstance(error, TimeoutError):
                self._away_until_s = now + AWAY_S
            if now > self._told.get(what, 0.0):
                self._told = {each: until_s for each, until_s in self._told.items() if until_s > now}
                self._told[what] = now + TOLD_S
                logger.error("%s cannot be used: %s", self._address, what)
        return StorageFull(AWAY)


def _code(error: BaseException) -> str:
    """What S3 calls an error, such as `AccessDenied`; empty for another."""
    code = (_response(error) or {}).get("Error", {}).get("Code")
    return code if isinstance(code, str) and ERROR_CODE.fullmatch(code) else ""


def _response(error: BaseException) -> dict[str, Any] | None:
    """What S3 has answered; None of a driver that does not tell."""
    response = getattr(error.__cause__ or error, "response", None)
    return response if isinstance(response, dict) else None


def _written_s(about: dict[str, Any]) -> float:
    """When an object was written, in Unix seconds; for one that does not say so: now."""
    value = next((about[name] for name in WRITTEN if about.get(name)), None)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value) if isinstance(value, int | float) else time.time()
