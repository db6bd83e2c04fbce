"""64 callers with money for 10, 100 or 1,000 requests, over three gateways: exactly so many are served.

    python -m bench.spenders [--rounds 200] [--store postgres|sqlite] [--json]

Real gateway processes on one store, a real model. All callers begin at the same moment, and send one request after
another over HTTP until one is refused; those with money for 10 send one each. In a round with money for 1,000 gateways
open tabs: none of what lies there may be lost to a caller. After each round the account has nothing left and nothing
held; at the end the ledger adds up.
"""

import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

import msgspec

from bench.rig.command import bench, track, wrong
from bench.rig.live import Live, serving
from bench.rig.postgres import serving_if
from bench.rig.processes import wait_for
from embedmesh.provision.bootstrap import open_books
from embedmesh.storage.books import Books

SPENDERS, GATEWAYS = 64, 3
MONEY_FOR = (10, 100, 1_000)  # requests; one a round, in turn
SETTLED_S = 5.0  # a capture is durable some milliseconds after its reply
REQUEST: dict[str, Any] = {"input": "what is it worth", "encoding_format": "base64"}
REFUSED = "429 insufficient_quota"
BUSY, PAUSE_S = "503 overloaded", 0.2  # the node has too much to do on a busy machine: money is not the matter
TABS = "SELECT count(*), coalesce(sum(requests), 0) FROM tabs WHERE account_id = 'poor'"


class Found(msgspec.Struct):
    """The figures of all rounds."""

    rounds: int = 0
    right_rounds: int = 0
    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    wrong_rounds: list[str] = msgspec.field(default_factory=list)
    tabs: int = 0
    under_tabs: int = 0  # requests
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


class Spender:
    """One caller, at one gateway for as long as its connection lasts."""

    def __init__(self, live: Live, key: str):
        self._live = live
        self._body = live.embed(REQUEST).replace(live.api_key.encode(), key.encode())
        self._wire = live.wire()

    def spend(self, start: threading.Barrier, most: int) -> Counter[str]:
        """Requests until one is refused, at most so many: how often each outcome came."""
        found: Counter[str] = Counter()
        start.wait()
        while found.total() - found[BUSY] == found["200"] < most:
            found[outcome := self._ask()] += 1
            if outcome == BUSY:
                time.sleep(PAUSE_S)
        return found

    def close(self) -> None:
        self._wire.close()

    def _ask(self) -> str:
        try:
            return self._wire.ask(self._body).outcome
        except (OSError, EOFError):  # the gateway closed an idle connection
            self._wire.close()
            self._wire = self._live.wire()
            return self._wire.ask(self._body).outcome


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
        spenders = [Spender(live, key) for _ in range(SPENDERS)]
        for number in track(range(rounds), "rounds"):
            money_for = MONEY_FOR[number % len(MONEY_FOR)]
            books.accounts.credit("poor", money_for * price, f"round {number}")
            start, most = threading.Barrier(SPENDERS), 1 if money_for < SPENDERS else money_for
            got = sum(pool.map(lambda one, start=start, most=most: one.spend(start, most), spenders), Counter[str]())
            found.outcomes += got
            found.rounds += 1
            if got - Counter({BUSY: got[BUSY]}) == Counter(
                {"200": money_for, REFUSED: SPENDERS - (money_for if most == 1 else 0)}
            ):
                found.right_rounds += 1
            else:
                found.wrong_rounds.append(f"money for {money_for}: {dict(got)}")
            found.not_settled += not settled(books)
            if found.not_settled:
                break
        for each in spenders:
            each.close()
        ((found.tabs, found.under_tabs),) = books._db.execute(TABS).fetchall()
        found.ledger_ok = books.check().ok
    return found


if __name__ == "__main__":
    bench(measure, rounds="with money for 10, 100 and 1,000 in turn", store="which kind")
