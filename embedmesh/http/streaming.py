"""Writes a reply that is made while it is read: each part is with the kernel before the next one is asked for.

The status line waits for the first part. Until then a failure is an ordinary reply with an envelope.

The kernel would take megabytes for a caller that does not read: the node would make them, the caller pay for them, and
its deadline pass before a third of them has left. So it gets UNSENT_BYTES_MAX more than the caller's own window.
"""

import asyncio
import socket
from contextlib import suppress

from aiohttp import HttpVersion11, web

from embedmesh.http.aiohttp_connection import ServerConnection, send_head
from embedmesh.http.rendering import REPLY_HEADERS
from embedmesh.http.sending import Sending
from embedmesh.rules.exchange import Delivery, StreamedReply
from embedmesh.rules.request_record import CURRENT

UNSENT_BYTES_MAX = 16 * 1024  # half of it leaves in `part_s` also where a kilobyte a second is read; it is fifty events


async def stream(
    request: web.BaseRequest, response: web.StreamResponse, reply: StreamedReply, part_s: float
) -> Delivery:
    """Write all parts; the caller has `part_s` seconds to read each. Returns how the delivery ended.

    Raises ConnectionResetError if the caller went before the kernel had any of it, and what `parts` raises: then the
    connection is cut, since some of the reply may have left.
    """
    connection = request.protocol
    assert isinstance(connection, ServerConnection)
    # A task of its own: each part wakes all coroutines of the task that waits for it, and a request's are many.
    writing = asyncio.create_task(_write(connection, request, response, reply, part_s))
    try:
        return await writing
    finally:
        connection.sending = None  # only here: a caller that goes between the last part and this must not cancel us


async def _write(
    connection: ServerConnection,
    request: web.BaseRequest,
    response: web.StreamResponse,
    reply: StreamedReply,
    part_s: float,
) -> Delivery:
    begun, sending, size = False, None, 0
    chunked = request.version >= HttpVersion11  # to others the connection's end is that of the reply

    def on_lost(_: object) -> None:
        reply.left()

    connection.lost.add_done_callback(on_lost)
    try:
        async for part in reply.parts:
            transport = connection.transport
            if transport is None:
                break
            if sending is None:
                sending = connection.sending = Sending(transport, part_s)  # the caller's leaving does not cancel us now
                _keep_unsent(transport, UNSENT_BYTES_MAX)
                response.headers.update(request[REPLY_HEADERS])
                if chunked:
                    response.enable_chunked_encoding()
                await send_head(request, response)
            try:
                delivery = await sending.send(b"", b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            except ConnectionResetError:
                break
            begun, size = True, size + len(part)
            if delivery is Delivery.BROKEN_OFF:
                return delivery
        else:
            if not response.prepared and connection.transport is not None:  # an empty reply
                response.headers.update(request[REPLY_HEADERS])
                await response.prepare(request)
            with suppress(ConnectionError):  # it went after the last part
                if connection.transport is not None:
                    await response.write_eof()
                    return Delivery.WHOLE
    except BaseException:
        if response.prepared and request.transport is not None:
            request.transport.abort()
        raise
    finally:
        if (record := CURRENT.get()) is not None:
            record.bytes_out = size
        connection.lost.remove_done_callback(on_lost)
        if sending is not None and connection.transport is not None:
            _keep_unsent(connection.transport, 0)
    if begun:
        return Delivery.BROKEN_OFF
    raise ConnectionResetError("the caller went before any of the reply was sent")


def _keep_unsent(transport: asyncio.Transport, size: int) -> None:
    """Let the kernel take no more than `size` bytes beyond what the other side has room for; 0: as much as it likes."""
    sock = transport.get_extra_info("socket")
    with suppress(AttributeError, OSError):  # no TCP, or a system that cannot
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)
