"""Writes a reply to the caller's socket, and knows from when on the caller must pay for it.

That is when the kernel has the first byte of the reply's body. A caller that goes before has hung up, and pays nothing.
What it does later (reset, close, half-close, not reading) breaks the delivery off, and it pays. What we do ourselves is
neither: if `send` is cancelled, nothing is delivered, whatever has left.
"""

import asyncio

from embedmesh.rules.ports import Delivery

SINGLE_WRITE_BYTES_MAX = (
    16 * 1024
)  # in one write: a socket that is writable again has room for a third of its buffer, or 28 kB
TLS_PIECE_BYTES = 64 * 1024  # TLS buffers all that it is given; after each piece we wait until it is sent
TLS_TURNS = 3  # of the event loop, until TLS reports that a write to its socket has failed


class Sending:
    """One reply on one connection. The connection calls `resume_writing` and `lost`, and must not cancel the writer.

    The transport's write buffer must be empty before, with limits that resume writing when it is empty again.
    """

    def __init__(self, transport: asyncio.Transport, within_s: float) -> None:
        """The caller has `within_s` seconds to read the whole reply."""
        self._transport = transport
        self._within_s = within_s
        self._gone = False
        self._emptied: asyncio.Future[bool] | None = None
        self._late: asyncio.TimerHandle | None = None

    async def send(self, head: bytes, body: bytes) -> Delivery:
        """Write it all. Returns when the kernel has the last byte, or the caller broke it off after the first.

        Raises ConnectionResetError if the caller went before any of the body had left.
        """
        transport, size = self._transport, len(body)
        tls = transport.get_extra_info("ssl_object") is not None
        if tls:
            ends = [1, *range(TLS_PIECE_BYTES, size, TLS_PIECE_BYTES), size]
        else:  # once one byte has left, the caller pays, whatever becomes of the others
            ends = [size] if size <= SINGLE_WRITE_BYTES_MAX else [1, size]
        begun, start = False, 0
        try:
            for end in ends:
                if transport.is_closing():
                    break
                transport.write(memoryview(body)[start:end] if start else head + body[:end])
                if tls and not start:
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
            if self._late is not None:
                self._late.cancel()
        if begun:
            return Delivery.BROKEN_OFF
        raise ConnectionResetError("the caller went before any of the reply was sent")

    def resume_writing(self) -> None:
        """What was written is in the kernel."""
        self._wake(True)

    def lost(self) -> None:
        self._gone = True
        self._wake(False)

    async def _empty(self) -> bool:
        """Wait until what was written is in the kernel. Returns False if it never will be."""
        if self._gone:
            return False
        loop = asyncio.get_running_loop()
        self._emptied = loop.create_future()
        if self._late is None:
            self._late = loop.call_later(self._within_s, self._is_late)
        return await self._emptied

    def _is_late(self) -> None:
        self._transport.abort()
        self.lost()

    def _wake(self, emptied: bool) -> None:
        if self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(emptied)
