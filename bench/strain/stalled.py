"""Two thousand connections that send half of something and then nothing: what do the others notice?

They have sent half a head, or a head with half a body; a few get a reply that does not fit into the kernel's buffers,
and do not read it. The others send requests at a fixed rate, alone and beside them, in turns.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import msgspec
from rich.progress import Progress

from bench.gateway.contenders import Measurable
from bench.rig.command import wrong
from bench.rig.processes import HOST
from embedmesh.rules.limits import REQUEST_INPUTS_MAX

CONNECTIONS = 2_000
RATE = 200.0  # requests a second of the others
ROUNDS, SECONDS = 3, 4.0
DEAF = 10  # of those; a reply of 2,048 vectors is some 5 MB, which the gateway has to keep for as long
SETTLE_S = 2.0  # until what can be done for them is done
CLOSED_S = 60.0  # by then each of them must have been closed

P99_TIMES_MAX = 2.0
ANSWERED_MIN = 0.98  # of the others' requests
STALLED_MIN = 0.9  # of the connections, from the first to the last of the others' requests beside them


class Stalled(msgspec.Struct, frozen=True):
    """What was found: medians of rounds, milliseconds. `left` are connections that were never closed."""

    connections: int
    least_stalled: int
    answered: float
    alone_p50_ms: float
    alone_p99_ms: float
    p50_ms: float
    p99_ms: float
    not_right: int
    closed_s: float
    left: int
    rss_mb: float

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        times = self.p99_ms / self.alone_p99_ms if self.alone_p99_ms else float("inf")
        conditions: dict[str, object] = {
            f"only {self.answered:.1%} of the others' requests answered": self.answered < ANSWERED_MIN,
            f"only {self.least_stalled} were stalled": self.least_stalled < STALLED_MIN * self.connections,
            f"p99 of the others {times:.1f} times what it was": times > P99_TIMES_MAX,
            f"{self.not_right} of the others' answers were not right": self.not_right > 0,
            f"{self.left} connections were never closed": self.left > 0,
        }
        return wrong(conditions)


def stalled(gateway: Measurable, bar: Progress) -> Stalled:
    """The whole run, over a gateway that answers."""
    request = gateway.requests.read_bytes().partition(b"\0")[0]
    shown = bar.add_task("stalled", total=2 * ROUNDS + 1)
    alone, beside = [], []
    least = CONNECTIONS
    for _ in range(ROUNDS):
        alone.append(gateway.load(SECONDS, RATE))
        bar.advance(shown)
        files = gateway.open_files
        with stalling(gateway.port, request):
            beside.append(gateway.load(SECONDS, RATE))
            least = min(least, gateway.open_files - files)
        bar.advance(shown)
        time.sleep(SETTLE_S)  # all of those are closed
    files = gateway.open_files
    with stalling(gateway.port, request):
        begun = time.monotonic()
        while (left := gateway.open_files - files) > 0 and time.monotonic() - begun < CLOSED_S:
            time.sleep(0.5)
        closed_s = time.monotonic() - begun
    bar.advance(shown)
    return Stalled(
        connections=CONNECTIONS,
        least_stalled=least,
        answered=sum(each.load.right for each in (*alone, *beside)) / (2 * ROUNDS * SECONDS * RATE),
        alone_p50_ms=median([each.load.p50_us for each in alone]) / 1e3,
        alone_p99_ms=median([each.load.p99_us for each in alone]) / 1e3,
        p50_ms=median([each.load.p50_us for each in beside]) / 1e3,
        p99_ms=median([each.load.p99_us for each in beside]) / 1e3,
        not_right=sum(each.load.bad for each in (*alone, *beside)),
        closed_s=closed_s,
        left=left,
        rss_mb=max(each.rss_mb for each in beside),
    )


@contextmanager
def stalling(port: int, request: bytes) -> Iterator[None]:
    """Connections that have begun something. They are closed in the end."""
    head, _, body = request.partition(b"\r\n\r\n")
    with ExitStack() as stack:
        for number in range(CONNECTIONS):
            one = stack.enter_context(socket.socket())
            one.connect((HOST, port))
            if number < DEAF:
                one.sendall(_larger(head, body))
            else:
                one.sendall(request[: len(head) // 2] if number % 2 else request[: -len(body) // 2])
        time.sleep(SETTLE_S)
        yield


def _larger(head: bytes, body: bytes) -> bytes:
    """The same request for as many vectors as there may be."""
    fields = msgspec.json.decode(body)
    more = msgspec.json.encode(fields | {"input": [fields["input"]] * REQUEST_INPUTS_MAX})
    return head.replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % len(more)) + b"\r\n\r\n" + more
