"""One HTTP/1.1 connection of a bulk run. A reply of known length is received into the memory that it is read from.

aiohttp takes twice the CPU for a reply of 128 vectors, and five times that for a reply of one.
"""

import asyncio
import re
from typing import Any, cast

import httptools
import numpy as np

from embedmesh.client.bulk.posting import Posted

REPLY_HEAD_BYTES_MAX = 32 * 1024  # as large as any server's that proxies did not refuse
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n]*)?")
HEAD_END = b"\r\n\r\n"


class Broke(Exception):
    """The connection ended, or what came is no reply. `heard`: some of a reply had come."""

    def __init__(self, *, heard: bool) -> None:
        super().__init__()
        self.heard = heard


class BulkConnection(asyncio.BufferedProtocol):
    """One exchange at a time. Whatever breaks an exchange closes the connection."""

    def __init__(self) -> None:
        self.usable = True
        self._transport: asyncio.Transport | None = None
        self._woken: asyncio.Future[Posted] | None = None
        self._bytes_max = 0
        self._head = bytearray(REPLY_HEAD_BYTES_MAX)
        self._begin()

    def _begin(self) -> None:
        self._come = 0  # bytes of the head, or of the body once there is one
        self._heard = False
        self._body = memoryview(b"")
        self._reader: _AnyFraming | None = None
        self._status, self._headers, self._stays = 0, dict[str, str](), True

    async def exchange(self, request: bytes, bytes_max: int) -> Posted:
        """Send a request; its whole reply, whose body has at most `bytes_max` bytes. Raises Broke."""
        if self._transport is None:
            raise Broke(heard=False)
        self._begin()
        self._bytes_max = bytes_max
        self._woken = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._woken
        except BaseException:
            self.close()
            raise
        finally:
            self._woken = None

    def close(self) -> None:
        """At once."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # by how we connect

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._body[self._come :] if self._body else memoryview(self._head)[self._come :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._woken is None or self._woken.done():
            self.close()  # nothing was asked
            return
        self._heard = True
        self._come += nbytes
        if self._body:
            if self._come == len(self._body):
                self._done(self._body)
        elif self._reader is not None:
            self._feed(self._reader, bytes(memoryview(self._head)[: self._come]))
        else:
            self._read_head()

    def eof_received(self) -> None:
        if self._reader is not None and self._reader.ends_by_closing:
            self._status, self._headers, self._stays = self._reader.status, self._reader.headers, False
            self._done(self._reader.body)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._transport = None
        self._break()

    # -- reading

    def _read_head(self) -> None:
        end = self._head.find(HEAD_END, 0, self._come)
        if end < 0:
            if self._come == REPLY_HEAD_BYTES_MAX:
                self._break()
            return
        lines = bytes(memoryview(self._head)[:end]).split(b"\r\n")
        status = STATUS_LINE.fullmatch(lines[0])
        if status is None:
            self._break()
            return
        self._status = int(status[2])
        pairs = [line.partition(b":") for line in lines[1:]]
        self._headers = {name.decode("latin-1").lower(): value.strip().decode("latin-1") for name, _, value in pairs}
        keeps = self._headers.get("connection", "keep-alive" if status[1] == b"1" else "close").lower()
        self._stays = "keep-alive" in keeps or (status[1] == b"1" and "close" not in keeps)
        length = self._headers.get("content-length", "")
        plain = length.isdecimal() and "transfer-encoding" not in self._headers and len(self._headers) == len(pairs)
        if not plain or self._status < 200 or self._status in (204, 304):
            self._reader = _AnyFraming(self._bytes_max)
            self._feed(self._reader, bytes(memoryview(self._head)[: self._come]))
            return
        self._read_body(int(length), end + len(HEAD_END))

    def _read_body(self, size: int, begins: int) -> None:
        come = self._come - begins
        if size > self._bytes_max or come > size:
            self._break()
            return
        body = np.empty(size, np.uint8).data  # a bytearray would be of new pages each time: half a millisecond
        body[:come] = memoryview(self._head)[begins : self._come]
        if come == size:
            self._done(body)
            return
        self._body, self._come = body, come

    def _feed(self, reader: "_AnyFraming", data: bytes) -> None:
        self._come = 0
        try:
            reader.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError):
            self._break()
            return
        if reader.is_whole:
            self._status, self._headers = reader.status, reader.headers
            self._stays = self._stays and reader.stays
            self._done(reader.body)

    def _done(self, body: bytearray | memoryview) -> None:
        waiter = self._woken
        self._body, self._reader = memoryview(b""), None
        if not self._stays:
            self.close()
        if waiter is not None and not waiter.done():
            waiter.set_result(Posted(self._status, self._headers, body))

    def _break(self) -> None:
        self._body, self._reader = memoryview(b""), None
        if self._woken is not None and not self._woken.done():
            self._woken.set_exception(Broke(heard=self._heard))
        self.close()


class _AnyFraming:
    """Reads a reply in chunks, one that ends with the connection, one with interim replies before it."""

    def __init__(self, bytes_max: int) -> None:
        self.status, self.headers, self.body = 0, dict[str, str](), bytearray()
        self.is_whole, self.stays = False, True
        self.ends_by_closing = False
        self._bytes_max = bytes_max
        self._in_head = True
        self._parser: Any = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises HttpParserError, and ValueError for a body that is too large, or for two replies."""
        self._parser.feed_data(data)
        if self.is_whole:
            self._parser = None  # each refers to the other

    def on_message_begin(self) -> None:
        if self.is_whole:
            raise ValueError("two replies")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else a trailer
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self.status = self._parser.get_status_code()
        coding = self.headers.get("transfer-encoding", "").lower()
        self.ends_by_closing = "content-length" not in self.headers and not coding.endswith("chunked")

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > self._bytes_max:
            raise ValueError("too large")

    def on_message_complete(self) -> None:
        if 100 <= self.status < 200:  # the reply itself is still to come
            self.headers, self._in_head = {}, True
            return
        self.is_whole, self.stays = True, self._parser.should_keep_alive()
