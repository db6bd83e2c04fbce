"""Writes a reply to the caller's socket, and knows from when on the caller must pay for it.

That is when the kernel has the first byte of the reply's body. A caller that goes before has hung up, and pays nothing.
What it does later (reset, close, half-close, not reading) breaks the delivery off, and it pays. What we do ourselves is
neither: if `send` is cancelled, nothing is delivered, whatever has left.
"""

import asyncio
from typing import NamedTuple

from embedmesh.rules.exchange import Delivery

SINGLE_WRITE_BYTES_MAX = (
    16 * 1024
)  # in one write: a socket that is writable again has room for a third of its buffer, or 28 kB
TLS_PIECE_BYTES = 64 * 1024  # TLS buffers all that it is given; after each piece we wait until it is sent
TLS_TURNS = 3  # of the event loop, until TLS reports that a write to its socket has failed


class Rest(NamedTuple):
    """What `send_now` could not end: whether any of the body has left, and what of it is not written yet."""

    begun: bool
    unwritten: bytes = b""
    gone: bool = False


def send_now(transport: asyncio.Transport, head: bytes, body: bytes) -> Rest | None:
    """Write a reply, over no TLS; None if the kernel has all of it, else `Sending.finish` must end it.

    The transport's write buffer must be empty. Once one byte has left, the caller pays, whatever becomes of the others:
    so it leaves alone where a write might take a part only.
    """
    if transport.is_closing():
        return Rest(False, gone=True)
    single = len(body) <= SINGLE_WRITE_BYTES_MAX
    transport.write(head + body if single else head + body[:1])
    if transport.is_closing():  # the write has failed: nothing has left
        return Rest(False, gone=True)
    left = transport.get_write_buffer_size()
    if single:
        return Rest(left < len(body)) if left else None
    if left:
        return Rest(False, body[1:])
    transport.write(memoryview(body)[1:])
    if transport.is_closing():
        return Rest(True, gone=True)
    return Rest(True) if transport.get_write_buffer_size() else None


class Sending:
    """One reply on one connection, or the parts of one. The connection calls `resume_writing` and `lost`, and must not
    cancel the writer.

    The transport's write buffer must be empty before, with limits that resume writing when it is empty again.
    """

    def __init__(self, transport: asyncio.Transport, within_s: float) -> None:
        """The caller has `within_s` seconds to read what is given to one `send`."""
        self._transport = transport
        self._plain = transport.get_extra_info("ssl_object") is None
        self._within_s = within_s
        self._gone = False
        self._emptied: asyncio.Future[bool] | None = None
        self._late: asyncio.TimerHandle | None = None

    async def send(self, head: bytes, body: bytes) -> Delivery:
        """Write it all. Returns when the kernel has the last byte, or the caller broke it off after the first.

        Raises ConnectionResetError if the caller went before any of the body had left.
        """
        transport, size = self._transport, len(body)
        if self._plain:
            rest = send_now(transport, head, body)
            return Delivery.WHOLE if rest is None else await self.finish(rest)
        begun, start = False, 0
        try:
            for end in (1, *range(TLS_PIECE_BYTES, size, TLS_PIECE_BYTES), size):
                if transport.is_closing():
                    break
                transport.write(memoryview(body)[start:end] if start else head + body[:end])
                if not start:
                    for _ in range(TLS_TURNS):
                        await asyncio.sleep(0)
                if transport.is_closing() or self._gone:  # the write has failed: nothing of this piece has left
                    break
                left = transport.get_write_buffer_size()
                begun = begun or left < end - start
                if left and not await self._empty():
                    break
                begun, start = True, end
            else:
                return Delivery.WHOLE
        finally:
            self._in_time()
        return _broken_off(begun)

    async def finish(self, rest: Rest) -> Delivery:
        """End what `send_now` has begun. Returns and raises what `send` does."""
        transport = self._transport
        try:
            if rest.gone or not await self._empty():
                return _broken_off(rest.begun)
            if not rest.unwritten:
                return Delivery.WHOLE
            transport.write(rest.unwritten)
            if transport.is_closing() or (transport.get_write_buffer_size() and not await self._empty()):
                return Delivery.BROKEN_OFF
            return Delivery.WHOLE
        finally:
            self._in_time()

    def resume_writing(self) -> None:
        """What was written is in the kernel."""
        self._wake(True)

    def lost(self) -> None:
        self._gone = True
        self._wake(False)

    async def _empty(self) -> bool:
        """Wait until what was written is in the kernel. Returns False if it never will be."""
        if self._gone or not self._transport.get_write_buffer_size():
            return not self._gone
        loop = asyncio.get_running_loop()
        self._emptied = loop.create_future()
        if self._late is None:
            self._late = loop.call_later(self._within_s, self._is_late)
        return await self._emptied

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _is_late(self) -> None:
        self._transport.abort()
        self.lost()

    def _wake(self, emptied: bool) -> None:
        if self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(emptied)


def _broken_off(begun: bool) -> Delivery:
    """How a delivery ended that is not whole: after it had `begun`, or else by a ConnectionResetError."""
    if begun:
        return Delivery.BROKEN_OFF
    raise ConnectionResetError("the caller went before any of the reply was sent")
