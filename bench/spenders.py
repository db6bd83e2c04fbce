"""64 callers at once with money for 10, over three gateways: exactly 10 are served, round after round.

    python -m bench.spenders [--rounds 200] [--store postgres|sqlite] [--json]

Real gateway processes on one store, a real model, callers that send their requests over HTTP at the same moment. After
each round the account has nothing left and nothing held; at the end the ledger adds up.
"""

import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

import msgspec

from bench.rig.command import bench, track, wrong
from bench.rig.http import Wire
from bench.rig.live import Live, serving
from bench.rig.postgres import serving_if
from bench.rig.processes import wait_for
from embedmesh.provision.bootstrap import open_books
from embedmesh.storage.books import Books

SPENDERS, SERVED, GATEWAYS = 64, 10, 3
SETTLED_S = 5.0  # a capture is durable some milliseconds after its reply
REQUEST: dict[str, Any] = {"input": "what is it worth", "encoding_format": "base64"}
REFUSED = "429 insufficient_quota"


class Found(msgspec.Struct):
    """The figures of all rounds."""

    rounds: int = 0
    right_rounds: int = 0
    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    not_settled: int = 0
    ledger_ok: bool = False

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        return wrong(
            {
                f"{self.rounds - self.right_rounds} of {self.rounds} rounds": self.right_rounds < self.rounds,
                "no round was run": not self.rounds,
                "money was still held, or left": self.not_settled,
                "the ledger does not add up": not self.ledger_ok,
            }
        )


def spend(live: Live, key: str, wire: list[Wire], start: threading.Barrier) -> str:
    """One caller's one request: the outcome."""
    body = live.embed(REQUEST).replace(live.api_key.encode(), key.encode())
    start.wait()
    try:
        return wire[0].ask(body).outcome
    except (OSError, EOFError):  # the gateway closed an idle connection
        wire[0].close()
        wire[0] = live.wire()
        return wire[0].ask(body).outcome


def settled(books: Books) -> bool:
    """Whether the account soon has nothing and holds nothing."""

    def is_empty() -> bool:
        account = books.accounts.find("poor")
        return account.balance_nanousd == account.held_nanousd == 0

    return wait_for(is_empty, SETTLED_S)


def measure(rounds: int = 200, store: Literal["postgres", "sqlite"] = "postgres") -> Found:
    """All rounds, on a new store."""
    with serving_if(store) as server:
        environment = {"EMBEDMESH_STORE": server.new()} if server is not None else {}
        with serving(["--workers", str(GATEWAYS)], environment) as live:
            found = run_rounds(live, rounds)
            with suppress(subprocess.TimeoutExpired):
                live.stop()
    return found


def run_rounds(live: Live, rounds: int) -> Found:
    """All rounds."""
    found = Found()
    with open_books(live.data_dir, live.store) as books, ThreadPoolExecutor(SPENDERS) as pool:
        with live.wire() as wire:
            price = int(wire.ask(live.embed(REQUEST)).headers["x-embedmesh-cost-nanousd"])
        books.accounts.create("poor")
        _, key = books.keys.create("poor", ["embeddings"])
        wires = [[live.wire()] for _ in range(SPENDERS)]
        for number in track(range(rounds), "rounds"):
            books.accounts.credit("poor", SERVED * price, f"round {number}")
            start = threading.Barrier(SPENDERS)
            got = Counter(pool.map(lambda wire, start=start: spend(live, key, wire, start), wires))
            found.outcomes += got
            found.rounds += 1
            found.right_rounds += got == Counter({"200": SERVED, REFUSED: SPENDERS - SERVED})
            found.not_settled += not settled(books)
            if found.not_settled:
                break
        for each in wires:
            each[0].close()
        found.ledger_ok = books.check().ok
    return found


if __name__ == "__main__":
    bench(measure, rounds="of 64 requests each", store="which kind")
