"""Chat, completions and images of servers of other makes: what they are asked, and their streams, event by event."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

from embedmesh.http.sse import BYTE_ORDER_MARK, SseParser
from embedmesh.rules.errors import NodeBroke, NodeFailure, NotAsAsked, TooLarge, UpstreamRefused, WrongAnswer
from embedmesh.rules.generation import PATHS, GenerationRequest, StreamEnd
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.upstream.http1_reader import Http1Reply
from embedmesh.upstream.http1_stream import BodyStream
from embedmesh.upstream.refusals import failure_in
from embedmesh.upstream.server import REFUSAL_BYTES_MAX, UpstreamServer, checked, is_plain

DONE = b"[DONE]"  # the data of the last event
USAGE = {"stream_options": {"include_usage": True}}
NO_STREAMS = (b"application/json", b"text/html")  # types of replies that are no streams; others may be mislabelled
COMPRESSED = "the server's reply is compressed, which was not asked for"


class UpstreamGeneration:
    """One server that generates. Implements the port `GeneratingClient`, but for the choice of the node."""

    def __init__(self, server: UpstreamServer, offers: Mapping[str, Offer]) -> None:
        """`offers` are the models that it runs, by the catalogue's ids."""
        self._server = server
        self._offers = offers
        self._knows_options: bool | None = None  # whether it supports `stream_options`; learned from its replies

    async def generate(self, model: Model, asked: GenerationRequest) -> bytes:
        """A whole reply: one JSON value, unless something else is wrong with it. Raises a NodeFailure."""
        offer = self._offer(model)
        try:
            body = _named(offer, asked)
            return _whole(checked(await self._server.exchange(PATHS[asked.modality], body, asked.reply_bytes_max)))
        except TooLarge as failure:
            raise _more_than_asked(failure) from None
        except UpstreamRefused as refused:
            raise in_our_words(refused, offer, model) from None
        except NodeBroke as failure:
            raise _of_this_request(failure) from None

    async def stream(self, model: Model, asked: GenerationRequest) -> "UpstreamStream":
        """A stream, once its head has come. Raises a NodeFailure."""
        offer = self._offer(model)
        try:
            return await self._usage_told(_named(offer, asked) | {"stream": True}, asked)
        except UpstreamRefused as refused:
            raise in_our_words(refused, offer, model) from None
        except NodeBroke as failure:
            raise _of_this_request(failure) from None

    async def _usage_told(self, body: dict[str, Any], asked: GenerationRequest) -> "UpstreamStream":
        """A stream that tells its usage, from a server that can. The first request finds that out."""
        knew = self._knows_options
        if knew is not False:
            try:
                stream = await self._stream(body | USAGE, asked)
                self._knows_options = True
                return stream
            except UpstreamRefused as refused:
                if refused.too_long or (knew and "stream_options" not in refused.said):
                    raise
        stream = await self._stream(body, asked)
        self._knows_options = False
        return stream

    async def _stream(self, body: dict[str, Any], asked: GenerationRequest) -> "UpstreamStream":
        stream = await self._server.stream(PATHS[asked.modality], body, asked.reply_bytes_max)
        kind = stream.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind not in NO_STREAMS and is_plain(stream.headers):
            return UpstreamStream(stream)
        try:
            data = await stream.read_all(REFUSAL_BYTES_MAX)
        finally:
            stream.close()
        words = "the server answered no stream, though one was asked for" if is_plain(stream.headers) else COMPRESSED
        raise failure_in(data) or WrongAnswer(words, check=Check.FORM)

    def _offer(self, model: Model) -> Offer:
        offer = self._offers.get(model.id)
        if offer is None:
            raise NodeBroke("the server does not run this model")
        return offer


class UpstreamStream:
    """A stream with success. Implements `NodeStream`: of the events, those that have data."""

    def __init__(self, body: BodyStream) -> None:
        self.end: StreamEnd | None = None
        self._body = body
        self._parser = SseParser()
        self._events: deque[bytes] = deque()  # that have come in the last piece of the body
        self._any = False  # whether there was an event
        self._failure: NodeFailure | None = None  # that an event told: nothing after it counts

    async def next(self) -> bytes | None:
        while True:
            if self._failure is not None:
                raise self._failure
            while self._events:
                event = self._events.popleft()
                if event.startswith(DONE):
                    self.end = "done"
                    self._events.clear()
                    self._body.leave()
                elif event and not event.isspace():  # an empty one keeps the connection open
                    self._failure = failure_in(event)
                    if self._failure is not None:
                        self.close()
                        raise self._failure
                    self._any = True
                    return event
            if self.end is not None:
                if not self._any:
                    raise NodeBroke("the server's stream has no event", check=Check.FORM)
                return None
            if self._parser.too_large:
                self.close()
                raise NotAsAsked("an event of the server's stream is larger than any right one", check=Check.HTTP)
            try:
                self._feed(await self._body.read())
            except TooLarge as failure:
                raise _more_than_asked(failure) from None

    def close(self) -> None:
        self._body.close()

    def _feed(self, data: bytes | None) -> None:
        """Have the next events, or the end."""
        if data is not None:
            self._events.extend(self._parser.feed(data))
            return
        self.end = "closed" if self._body.by_closing else "whole"
        last = self._parser.rest()
        if last is not None and (self.end == "whole" or last.startswith(DONE)):  # else it may have been cut
            self._events.append(last)


def _more_than_asked(failure: TooLarge) -> NotAsAsked:
    """How much comes back is for the caller's prompt to say: that node is not sent away for it."""
    return NotAsAsked(failure.message, check=failure.check)


def _of_this_request(failure: NodeBroke) -> NodeFailure:
    """A server for chats may have no path for completions. Its 404 to them must not keep it from those who chat."""
    return NotAsAsked(failure.message, check=failure.check) if failure.check is Check.STATUS_4XX else failure


def _named(offer: Offer, asked: GenerationRequest) -> dict[str, Any]:
    """The body as the server wants it."""
    return asked.body | {"model": offer.name or offer.id}


def _whole(reply: Http1Reply) -> bytes:
    """The reply's JSON. It is not looked at, except where it may have been cut, or is an error."""
    body = reply.body.removeprefix(BYTE_ORDER_MARK)
    if not is_plain(reply.headers):
        raise WrongAnswer(COMPRESSED, check=Check.FORM)
    if reply.by_closing:
        try:
            msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise NodeBroke("the server closed the connection before its reply was whole") from None
    if (failure := failure_in(body)) is not None:
        raise failure
    return body


def in_our_words(refused: UpstreamRefused, offer: Offer, model: Model) -> UpstreamRefused:
    """The same, with our name for the model: theirs may be a path."""
    if offer.name:
        refused.said = refused.said.replace(offer.name, model.id)
    return refused
