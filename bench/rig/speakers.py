"""Nodes that speak by a script, in a thread of this process, so that a test or bench that waits can look at them."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.faultnode.speaking import SpeakingNode
from bench.faultnode.speech_acts import Order

JOIN_S = 10.0


class Speaker:
    """One node. Its `node` is looked at from other threads, and its orders are given by them; no lock is needed."""

    def __init__(self) -> None:
        self.node = SpeakingNode()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def asked(self) -> int:
        """Requests but for the gateway's own probes, which ask for one token."""
        return sum(each.body.get("max_tokens") != 1 for each in tuple(self.node.heard))

    @property
    def last(self) -> dict[str, Any]:
        """The body of the last of them."""
        return next(each.body for each in reversed(tuple(self.node.heard)) if each.body.get("max_tokens") != 1)

    @contextmanager
    def ordered(self, mode: str, **more: float) -> Iterator[None]:
        """Answer like that, unless a request's own text says something else."""
        self.node.order = Order(mode, **more)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self.node.order = Order()


@contextmanager
def speakers(number: int) -> Iterator[list[Speaker]]:
    """So many nodes, each on a port of its own."""
    made = [Speaker() for _ in range(number)]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="speakers", daemon=True)
    thread.start()
    try:
        for each in made:
            each.port = asyncio.run_coroutine_threadsafe(each.node.start(), loop).result(JOIN_S)
        yield made
    finally:
        for each in made:
            asyncio.run_coroutine_threadsafe(each.node.stop(), loop).result(JOIN_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(JOIN_S)
        loop.close()
