"""A reply on its way to the caller's socket, and the moment from which the caller has no say in whether it pays.

That is when the first byte of its body is with the kernel. What the caller does before that is a hang-up; what it does
after that (reset, close, half-close, not reading) only breaks off what it has to pay. What we do ourselves is neither:
whoever is cancelled in `send` has not delivered, whatever has left.
"""

import asyncio

from embedmesh.rules.exchange import Delivery

WHOLE_BYTES_MAX = 16 * 1024  # in one write: a socket that has room again has room for a third of its buffer, or 28 kB
TLS_PIECE_BYTES = 64 * 1024  # TLS takes all that it is given into memory; after each piece it says whether it may go on
TLS_TURNS = 3  # of the event loop, until TLS has told us that a write to its socket has failed


class Sending:
    """One reply on one connection, which tells it of `resume_writing` and `lost`, and must not cancel its writer.

    The transport's write buffer has to be empty before, and its limits such that it wakes us when it is empty again.
    """

    def __init__(self, transport: asyncio.Transport, within_s: float) -> None:
        """`within_s` are all the seconds that the caller may take to read it."""
        self._transport = transport
        self._within_s = within_s
        self._gone = False
        self._emptied: asyncio.Future[bool] | None = None
        self._late: asyncio.TimerHandle | None = None

    async def send(self, head: bytes, body: bytes) -> Delivery:
        """Write it all; returns when its last byte is in the kernel, or the caller has broken it off after its first.

        Raises ConnectionResetError when the caller has gone before any of the body had left.
        """
        transport, size = self._transport, len(body)
        tls = transport.get_extra_info("ssl_object") is not None
        if tls:
            ends = [1, *range(TLS_PIECE_BYTES, size, TLS_PIECE_BYTES), size]
        else:  # once one byte has left, nothing about the rest is left to find out
            ends = [size] if size <= WHOLE_BYTES_MAX else [1, size]
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
        """The connection is gone."""
        self._gone = True
        self._wake(False)

    async def _empty(self) -> bool:
        """Wait until what was written is in the kernel. False where that will not be."""
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
