"""A caller that reads a kilobyte a second of a stream that its node would write in seconds."""

import socket
import time

from bench.generation.contenders import Contender
from bench.generation.node import Spoken
from bench.generation.readers import together
from bench.rig.command import run_async
from bench.rig.processes import HOST

SPOKEN = Spoken(events=200_000)  # fifty megabytes
FIRST = Spoken(events=2_000, pace_s=0.001)
"""What a process takes once, for its first fast stream, is no slow reader's."""
READ_BYTES, READS_A_S = 250, 4
RECEIVE_BYTES = 4_096  # that the reader's own kernel may keep


def growth_kb(gateway: Contender, seconds: float) -> float:
    """By how much the gateway grows, at most, in `seconds`. Raises RuntimeError where the stream ends before."""
    run_async(together(gateway.target, 1, FIRST, lambda: gateway.cpu_s))
    before, most = gateway.resident_kb, 0.0
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        caller.settimeout(seconds)
        caller.connect((HOST, gateway.target.port))
        caller.sendall(gateway.target.request(SPOKEN))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not caller.recv(READ_BYTES):
                raise RuntimeError("the gateway has cut off a reader of a kilobyte a second")
            time.sleep(1 / READS_A_S)
            most = max(most, gateway.resident_kb - before)
    return most
