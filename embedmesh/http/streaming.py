"""Writes a reply that is made while it is read: each part is with the kernel before the next one is asked for.

The status line waits for the first part. Until then a failure is an ordinary reply with an envelope.
"""

from contextlib import suppress

from aiohttp import web

from embedmesh.http.aiohttp_connection import ServerConnection, send_head
from embedmesh.http.rendering import REPLY_HEADERS
from embedmesh.http.sending import Sending
from embedmesh.rules.exchange import Delivery, StreamedReply


async def stream(
    request: web.BaseRequest, response: web.StreamResponse, reply: StreamedReply, part_s: float
) -> Delivery:
    """Write all parts; the caller has `part_s` seconds to read each. Returns how the delivery ended.

    Raises ConnectionResetError if the caller went before the kernel had any of it, and what `parts` raises: then the
    connection is cut, since some of the reply may have left.
    """
    connection = request.protocol
    assert isinstance(connection, ServerConnection)
    begun = False

    def on_lost(_: object) -> None:
        reply.left()

    connection.lost.add_done_callback(on_lost)
    try:
        async for part in reply.parts:
            transport = connection.transport
            if transport is None:
                break
            connection.sending = Sending(transport, part_s)  # from now on the caller's leaving does not cancel us
            if not response.prepared:
                response.headers.update(request[REPLY_HEADERS])
                response.enable_chunked_encoding()
                await send_head(request, response)
            try:
                delivery = await connection.sending.send(b"", b"%x\r\n%b\r\n" % (len(part), part))
            except ConnectionResetError:
                break
            begun = True
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
        connection.lost.remove_done_callback(on_lost)
        connection.sending = None
    if begun:
        return Delivery.BROKEN_OFF
    raise ConnectionResetError("the caller went before any of the reply was sent")
