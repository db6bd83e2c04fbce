"""Fills in what log lines say of a request, while it is answered and at its end."""

import time
from collections.abc import Mapping

from embedmesh.rules.exchange import NODE_HEADER, REQUEST_HEADER
from embedmesh.rules.request_record import AccessLog, RequestRecord

NOBODY_LEFT = "dropped"  # the outcome of a request whose caller has none of its reply


def note_reply(record: RequestRecord, headers: Mapping[str, str], size: int) -> None:
    """A reply with these headers and `size` bytes of body is about to be delivered."""
    own_id = headers.get(REQUEST_HEADER, "")
    record.own_id = own_id if own_id != record.request_id else ""
    record.node = headers.get(NODE_HEADER, record.node)
    record.status, record.bytes_out = 200, size


def note_end(access: AccessLog, record: RequestRecord, began: float, peer: object, forwarded: str | None) -> None:
    """It has ended, `began` on the monotonic clock: hand it to the access log."""
    record.seconds = time.monotonic() - began
    if not record.outcome:
        record.outcome = NOBODY_LEFT if not record.status else "ok" if record.status < 400 else "refused"
    elif record.outcome == NOBODY_LEFT:
        record.status = record.bytes_out = 0
    record.client = access.client_of(peer, forwarded)
    access.ended(record)
