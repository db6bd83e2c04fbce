"""What a worker process says on its standard error, as lines of its node's log."""

import asyncio
import logging

log = logging.getLogger("embedmesh.engine")

OUTPUT_LINE_BYTES_MAX = 1_000  # what is longer is cut; the log escapes what is no text


class WorkerOutput(asyncio.Protocol):
    """Reads the pipe, always: a worker must not wait for a log. A worker knows neither texts nor keys."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._line = b""
        self._transport: asyncio.BaseTransport | None = None

    def close(self) -> None:
        """Read no more."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        if len(self._line) > OUTPUT_LINE_BYTES_MAX:
            lines.append(self._line)
            self._line = b""
        for line in lines:
            self._say(line)

    def connection_lost(self, exc: Exception | None) -> None:
        self._say(self._line)

    def _say(self, line: bytes) -> None:
        if line.strip():
            text = line[:OUTPUT_LINE_BYTES_MAX].decode("utf-8", "replace")
            log.warning("the engine's process %d says: %s", self._pid, text)
