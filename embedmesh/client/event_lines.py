"""Cuts a stream as gateways send it into its events."""

from embedmesh.client.words import reply_not_trusted
from embedmesh.rules.sealed_generation import SEALED_EVENT_BYTES_MAX

EVENT_CHARS_MAX = 2 * SEALED_EVENT_BYTES_MAX  # of one event as it comes: base64, and JSON around it


class EventLines:
    """Cuts a stream of bytes into the data of its events. Comments are left out."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are whole now. Raises ReplyNotTrusted for an event larger than any right one."""
        *events, self._buffer = (self._buffer + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._buffer) > EVENT_CHARS_MAX:
            raise reply_not_trusted("form")
        found = []
        for event in events:
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found
