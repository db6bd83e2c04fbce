"""64 callers at once with money for 10, over three gateways: exactly 10 are served, round after round.

    python -m bench.spenders [--rounds 200] [--store postgres|sqlite] [--json]

Real gateway processes on one store, a real model, callers that ask over HTTP all at the same moment. After each round
the account has nothing left and nothing held; at the end the ledger adds up.
"""

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.live import Live, Wire, serving
from embedmesh.provision.bootstrap import open_books
from embedmesh.storage.books import Books

SPENDERS, SERVED, GATEWAYS = 64, 10, 3
SETTLED_S = 5.0  # a capture is durable some milliseconds after its reply
REQUEST: dict[str, Any] = {"input": "what is it worth", "encoding_format": "base64"}
REFUSED = "429 insufficient_quota"


class Found(msgspec.Struct):
    """What came of all rounds."""

    rounds: int = 0
    right_rounds: int = 0
    outcomes: dict[str, int] = {}
    not_settled: int = 0
    ledger_ok: bool = False

    @property
    def ok(self) -> bool:
        """Whether every round was right."""
        return self.right_rounds == self.rounds > 0 and not self.not_settled and self.ledger_ok


def spend(live: Live, key: str, wire: list[Wire], start: threading.Barrier) -> str:
    """One caller's one request; what it got."""
    body = live.embed(REQUEST).replace(live.api_key.encode(), key.encode())
    start.wait()
    try:
        reply = wire[0].ask(body)
    except (OSError, EOFError):  # the gateway closed an idle connection
        wire[0].close()
        wire[0] = live.wire()
        reply = wire[0].ask(body)
    return "200" if reply.status == 200 else f"{reply.status} {reply.code}"


def settled(books: Books) -> bool:
    """Whether the account has nothing and holds nothing, soon."""
    until = time.monotonic() + SETTLED_S
    while time.monotonic() < until:
        account = books.accounts.find("poor")
        if account.balance_nanousd == account.held_nanousd == 0:
            return True
        time.sleep(0.01)
    return False


def measure(live: Live, rounds: int, console: Console) -> Found:
    """All rounds."""
    found, outcomes = Found(), Counter[str]()
    bar = Progress(TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    with open_books(live.data_dir, live.store) as books, ThreadPoolExecutor(SPENDERS) as pool, bar:
        with live.wire() as wire:
            price = int(wire.ask(live.embed(REQUEST)).headers["x-embedmesh-cost-nanousd"])
        books.accounts.create("poor")
        _, key = books.keys.create("poor", ["embeddings"])
        wires = [[live.wire()] for _ in range(SPENDERS)]
        for number in bar.track(range(rounds)):
            books.accounts.credit("poor", SERVED * price, f"round {number}")
            start = threading.Barrier(SPENDERS)
            got = Counter(pool.map(lambda wire, start=start: spend(live, key, wire, start), wires))
            outcomes += got
            found.rounds += 1
            found.right_rounds += got == Counter({"200": SERVED, REFUSED: SPENDERS - SERVED})
            found.not_settled += not settled(books)
            if found.not_settled:
                break
        for each in wires:
            each[0].close()
        found.ledger_ok = books.check().ok
    found.outcomes = dict(outcomes)
    return found


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.spenders", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--store", choices=("postgres", "sqlite"), default="postgres", help="which kind")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked: Any = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        environment = {}
        if asked.store == "postgres":
            from bench.postgres import serving as serving_postgres

            environment = {"EMBEDMESH_STORE": stack.enter_context(serving_postgres(on_disk=True)).new()}
        live = stack.enter_context(serving(["--workers", str(GATEWAYS)], environment))
        found = measure(live, asked.rounds, Console(stderr=True))
        with contextlib.suppress(subprocess.TimeoutExpired):
            live.stop()
    if asked.json:
        print(msgspec.json.encode({"ok": found.ok, **msgspec.to_builtins(found)}).decode())
    else:
        print(
            f"{found.right_rounds} of {found.rounds} rounds: exactly {SERVED} of {SPENDERS} were served; "
            f"{found.outcomes}; ledger {'adds up' if found.ledger_ok else 'DOES NOT ADD UP'}"
        )
        print("Exactly right." if found.ok else "WRONG")
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
