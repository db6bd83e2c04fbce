"""Reads replies of nodes as they come, in any framing that HTTP/1.1 allows. It has no socket."""

from typing import Any

import httptools
import msgspec

from embedmesh.rules.errors import TooLarge, WrongAnswer
from embedmesh.rules.nodes import Check

NODE_HEAD_BYTES_MAX = 16 * 1024  # our nodes send under 1,000


class Http1Reply(msgspec.Struct, frozen=True):
    """A node's whole reply, without interim ones (1xx) and trailers.

    Header names are in lower case; of a repeated one the last counts. They must not be changed.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    by_closing: bool = False  # only the connection's end marks the body's end: it may have been cut


class ReplyReader:
    """One reply, read by httptools as it comes. What is there first counts: the `reply`, or a `failure`.

    A body can be taken before it is whole; what was taken is not in the `reply`.
    """

    def __init__(self, size_max: int) -> None:
        self.reply: Http1Reply | None = None
        self.failure: WrongAnswer | None = None
        self.keeps_alive = True
        self._parser: Any = httptools.HttpResponseParser(self)  # until the end: each refers to the other
        self._size_max = size_max
        self.size = 0
        self._chunks: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._head_size = 0
        self._in_head = True

    def feed(self, data: bytes | memoryview) -> None:
        """Read on, until there is a reply or a failure."""
        self.size += len(data)
        if self.size > self._size_max:
            self._fail("the node's reply is larger than any right one", TooLarge)
        else:
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self.keeps_alive = False
                self._fail("the node's reply is not HTTP")
            if self._in_head and self.size > NODE_HEAD_BYTES_MAX:  # only now: a large body may have come with the head
                self._fail_by_head()
        if self.reply is not None or self.failure is not None:
            self._parser = None

    @property
    def head(self) -> tuple[int, dict[bytes, bytes]] | None:
        """Status and headers, once they have come. Those of an interim reply (1xx) are not it."""
        if self.reply is not None:
            return self.reply.status, self.reply.headers
        return None if self._in_head or self._parser is None else (self._parser.get_status_code(), self._headers)

    def take(self) -> list[bytes]:
        """What has come of the body, and was not taken yet."""
        taken, self._chunks = self._chunks, []
        return taken

    def by_closing(self) -> Http1Reply | None:
        """The reply if the connection's end is its own, since its head gives no other."""
        coding = self._headers.get(b"transfer-encoding", b"").lower()
        if self._in_head or b"content-length" in self._headers or coding.endswith(b"chunked"):
            return None
        return self._whole(by_closing=True)

    def _whole(self, *, by_closing: bool = False) -> Http1Reply:
        return Http1Reply(self._parser.get_status_code(), self._headers, b"".join(self._chunks), by_closing)

    def _fail(self, words: str, kind: type[WrongAnswer] = WrongAnswer) -> None:
        if self.reply is None and self.failure is None:
            self.failure = kind(words, check=Check.HTTP)

    def _fail_by_head(self) -> None:
        self._fail("the head of the node's reply is larger than any right one")

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        if self.reply is not None:
            self.keeps_alive = False  # a second reply: it must not become the next answer

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._in_head:  # else a trailer: it must not overrule the head
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_size > NODE_HEAD_BYTES_MAX:
            self._fail_by_head()

    def on_body(self, body: bytes) -> None:
        if self.reply is None:  # else it is a second reply's
            self._chunks.append(body)

    def on_message_complete(self) -> None:
        if 100 <= self._parser.get_status_code() < 200:  # the reply itself is still to come
            self._headers, self._in_head = {}, True
            return
        if not self._parser.should_keep_alive():
            self.keeps_alive = False
        if self.reply is None and self.failure is None:
            self.reply = self._whole()
