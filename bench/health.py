"""Waiting for a server of another make."""

import asyncio
import time
from contextlib import suppress

from bench.engine.install import NotInstalled
from bench.fault.rig import HOST

LOOK_S = 0.1


async def healthy(port: int, process: asyncio.subprocess.Process, within_s: float) -> None:
    """Until GET /health says 200. Raises NotInstalled where it does not, or the process has ended."""
    begun = time.monotonic()
    while time.monotonic() - begun < within_s and process.returncode is None:
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            status = await reader.readline()
            writer.close()
            if b" 200 " in status:
                return
        await asyncio.sleep(LOOK_S)
    raise NotInstalled("it does not start, or says nothing at /health")
