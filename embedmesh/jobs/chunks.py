"""The form of an encrypted file: chunks under AES-256-GCM, so that any part can be read and no part can be changed.

A file begins with a mark and a random salt. Its key follows from the store's key secret, the salt and the file's own id
(HKDF, RFC 5869): contents under another name do not open, and a name that is written twice has two keys. The nonce of a
chunk is its number; the last one is authenticated as the last. So chunks cannot be swapped, left out, or cut off. The
construction is STREAM of Hoang, Reyhanitabar, Rogaway and Vizár, "Online Authenticated-Encryption" (2015).
"""

import os
from collections.abc import Iterator
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from embedmesh.jobs.backend import Stored

CHUNK_BYTES = 64 * 1024  # of plain contents under one tag: what is held to read one byte
TAG_BYTES, NONCE_BYTES, SALT_BYTES, KEY_BYTES = 16, 12, 32, 32
MARK = b"EMFILE1\n"
HEADER_BYTES = len(MARK) + SALT_BYTES
STORED_BYTES = CHUNK_BYTES + TAG_BYTES  # of a whole chunk
FILE_INFO = b"embedmesh file v1\0"
MORE, LAST_ONE = b"more", b"last"


class ContentsLost(Exception):
    """A file's contents are not there, or were changed."""


class ByteSink(Protocol):
    """What takes bytes: a draft, or an open file."""

    def write(self, data: bytes, /) -> object: ...


class SealedWriter:
    """Writes one file from its beginning to its end. Blocks, and raises what writing raises."""

    def __init__(self, file: ByteSink, key_secret: bytes, name: str) -> None:
        salt = os.urandom(SALT_BYTES)
        self._file = file
        self._aead = _aead(key_secret, salt, name)
        self._rest = bytearray()
        self._chunks = 0
        self.bytes = 0  # of plain contents
        file.write(MARK + salt)

    def write(self, data: bytes) -> None:
        """Append."""
        self.bytes += len(data)
        self._rest += data
        whole = (len(self._rest) - 1) // CHUNK_BYTES  # one is kept back: it may be the last
        if whole > 0:
            view = memoryview(self._rest)
            for at in range(0, whole * CHUNK_BYTES, CHUNK_BYTES):
                self._write_chunk(view[at : at + CHUNK_BYTES], MORE)
            view.release()
            del self._rest[: whole * CHUNK_BYTES]

    def end(self) -> None:
        """Write the last chunk."""
        self._write_chunk(self._rest, LAST_ONE)

    def _write_chunk(self, plain: bytearray | memoryview, which: bytes) -> None:
        self._file.write(self._aead.encrypt(_nonce(self._chunks), plain, which))
        self._chunks += 1


class SealedReader:
    """Reads any part of one file. Blocks. Raises ContentsLost for what was changed, and what `file` raises."""

    def __init__(self, file: Stored, key_secret: bytes, name: str) -> None:
        self._file = file
        header = file.read(0, HEADER_BYTES, HEADER_BYTES)
        if len(header) != HEADER_BYTES or not header.startswith(MARK):
            raise ContentsLost("this is no file of ours")
        self._aead = _aead(key_secret, header[len(MARK) :], name)
        stored = file.size - HEADER_BYTES
        self._chunks = -(-stored // STORED_BYTES)
        self.bytes = stored - self._chunks * TAG_BYTES  # of plain contents
        if self._chunks == 0 or self.bytes < 0:
            raise ContentsLost("the file was cut")

    def parts(self, start: int = 0, stop: int | None = None, at_once: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The contents from `start` until before `stop`, a chunk or less at a time.

        `at_once` is how many bytes the caller will ask for together.
        """
        if stop is not None and stop > self.bytes:
            raise ContentsLost("the file is shorter than it was")
        stop = self.bytes if stop is None else stop
        end = min(-(-stop // CHUNK_BYTES), self._chunks)
        ahead = max(1, at_once // CHUNK_BYTES)
        for number in range(start // CHUNK_BYTES, end):
            first = number * CHUNK_BYTES
            plain = self._chunk(number, min(number + ahead, end))
            if part := plain[max(0, start - first) : stop - first]:
                yield part

    def _chunk(self, number: int, end: int) -> bytes:
        """One chunk; those before the chunk `end` will follow."""
        at, until = (HEADER_BYTES + each * STORED_BYTES for each in (number, end))
        stored = self._file.read(at, STORED_BYTES, until)
        try:
            return self._aead.decrypt(_nonce(number), stored, LAST_ONE if number == self._chunks - 1 else MORE)
        except (InvalidTag, ValueError):  # too short to be one
            raise ContentsLost("the file was changed") from None


def _nonce(number: int) -> bytes:
    return number.to_bytes(NONCE_BYTES, "big")


def _aead(key_secret: bytes, salt: bytes, name: str) -> AESGCM:
    key = HKDF(SHA256(), KEY_BYTES, salt=salt, info=FILE_INFO + name.encode()).derive(key_secret)
    return AESGCM(key)
