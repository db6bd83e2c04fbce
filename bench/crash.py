"""kill -9 of gateway, node and engine worker under load: `python -m bench.crash [--kills N] [--seed N] [--json]`.

What must hold, and is joined request by request at the end (each carries a `user` of its own, whose keyed hash the
ledger keeps):

* every captured charge is one that a client has read to its last byte (no client breaks a delivery off: what a caller
  decides is tested elsewhere, here it is what a crash does), at the cost that its header named;
* every reply that was read is captured, but for those in flight when a gateway died, and the last batch: together they
  cost at most what the holds and tabs had left that the ledger released at its next start;
* with `--receipts`, a second node's log of what it answered agrees with both (see crash_receipts);
* every reply is right, and the service is back within BACK_S_MAX of each kill, without help.

Exit code 0 only if all of it holds.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Literal

import numpy as np

from bench.crash_join import APART, BACK_S_MAX, KINDS, POSTGRES, Back, Delivered, Figures, join
from bench.crash_receipts import NETWORKS, joining
from bench.rig import ledger, processes
from bench.rig.command import bench, track
from bench.rig.http import REPLY_S, Reply, Wire
from bench.rig.live import Live, serving
from bench.rig.postgres import PostgresServer, serving_if
from bench.rig.processes import wait_for

GIVE_UP_S = 30.0  # a service that is not back by then will not be
CALM_S = (0.05, 1.0)  # load between two kills: long enough for whatever state a kill may find
CLIENTS = 6
PAUSE_S = 0.05  # of a client that was refused; most wait longer, as the reply says
OPEN_HOLDS = (
    "SELECT (SELECT count(*) FROM holds WHERE state = 'open') + (SELECT count(*) FROM tabs WHERE ended_ms IS NULL)"
)
SIZES = (1, 1, 1, 1, 1, 2, 8, 8, 32)  # texts a request: mostly one, sometimes a tenth of a second of work
WORDS = ("river", "stone", "light", "market", "engine", "winter", "paper", "garden", "silver", "number", "letter")
VECTOR_ERROR_MAX = 1e-6  # a text alone and in any batch

Known = dict[str, np.ndarray]
"""Texts and their vectors."""


class LoggingClient(threading.Thread):
    """Sends one request after another until it is stopped, and keeps the log of what it got."""

    def __init__(self, live: Live, name: str, dice: Random, known: Known, stop: threading.Event):
        super().__init__(name=name, daemon=True)
        self._live, self._dice, self._known, self._stopping = live, dice, known, stop
        self._wire: Wire | None = None
        self.delivered: list[Delivered] = []
        self.refused: Counter[str] = Counter()
        self.wrong = 0

    def run(self) -> None:
        number = 0
        while not self._stopping.is_set():
            number += 1
            user = f"{self.name}-{number}"
            texts = self._dice.choices(list(self._known), k=self._dice.choice(SIZES))
            try:
                self._note(user, texts, self._ask(user, texts))
            except (OSError, EOFError) as error:
                self.refused[type(error).__name__] += 1
                self._hang_up()
        self._hang_up()

    def _ask(self, user: str, texts: list[str]) -> Reply:
        if self._wire is None:
            self._wire = self._live.wire()
        return self._wire.ask(self._live.embed({"input": texts, "user": user, "encoding_format": "base64"}))

    def _note(self, user: str, texts: list[str], reply: Reply) -> None:
        if reply.status != 200:
            self.refused[reply.outcome] += 1
            time.sleep(PAUSE_S)
            return
        headers = reply.headers
        cost, request_id = int(headers["x-embedmesh-cost-nanousd"]), headers["x-embedmesh-request"]
        self.delivered.append(Delivered(user, cost, request_id, headers["x-embedmesh-node"]))
        found, right = reply.vectors(), np.array([self._known[text] for text in texts])
        self.wrong += found.shape != right.shape or bool(np.abs(found - right).max() > VECTOR_ERROR_MAX)

    def _hang_up(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


def learn(live: Live, dice: Random, *, texts: int = 60) -> Known:
    """Some texts of 1 to 120 words and their vectors, each in a request of its own, before anything is killed."""
    known: Known = {}
    with live.wire() as wire:
        for number in range(texts):
            text = " ".join([str(number), *dice.choices(WORDS, k=dice.choice((1, 5, 5, 10, 10, 20, 40, 120)))])
            reply = wire.ask(live.embed({"input": text, "user": APART, "encoding_format": "base64"}))
            (known[text],) = reply.vectors()
    return known


def kill(live: Live, kind: str, dice: Random) -> float:
    """kill -9, once there is such a process; the moment when it was dead."""
    found: list[int] = []

    def find() -> bool:
        found[:] = live.gateways() if kind == "gateway" else [pid for name, pid in live.pids().items() if name == kind]
        return bool(found)

    if not wait_for(find, GIVE_UP_S):
        raise RuntimeError(f"there is no {kind} to kill; {live.process.log_tail()}")
    processes.kill(dice.choice(found))
    return time.monotonic()


def kill_postgres(server: PostgresServer) -> float:
    """kill -9 of the server; the moment when a new one takes connections."""
    processes.kill(server.pid)
    server.start_again()
    return time.monotonic()


def back_after(live: Live, killed: float) -> float | None:
    """Seconds from the kill to the first 200 of a request sent after it."""
    question = live.embed({"input": "back?", "user": APART})

    def is_back() -> bool:
        with live.wire(GIVE_UP_S) as wire:
            return wire.ask(question).status == 200

    return time.monotonic() - killed if wait_for(is_back, GIVE_UP_S) else None


def settle(live: Live) -> None:
    """Wait, for at most BACK_S_MAX, until a gateway that was killed last has looked after its holds: the other one
    answers at once. What is open after that is found by the join."""
    wait_for(lambda: ledger.read(live.store, OPEN_HOLDS) == [[(0,)]], BACK_S_MAX)


@contextlib.contextmanager
def clients(live: Live, seed: int, known: Known) -> Iterator[list[LoggingClient]]:
    """Clients at work; at the end each finishes its request."""
    stop = threading.Event()
    working = [LoggingClient(live, f"client{at}", Random(f"{seed} {at}"), known, stop) for at in range(CLIENTS)]
    for client in working:
        client.start()
    try:
        yield working
    finally:
        stop.set()
        for client in working:
            client.join(REPLY_S + 1)


def measure(
    kills: int = 50,
    seed: int = 1,
    store: Literal["sqlite", "postgres"] = "sqlite",
    workers: int = 0,
    receipts: bool = False,
) -> Figures:
    """The whole run."""
    with serving_if(store) as server:
        return run_kills(kills, seed, workers or (2 if server is not None else 1), server, receipts)


def run_kills(kills: int, seed: int, workers: int, server: PostgresServer | None, receipts: bool) -> Figures:
    """`kills` of each kind, in an order and at moments by dice."""
    dice = Random(seed)
    order = list((KINDS if server is None else (*KINDS, POSTGRES)) * kills)
    dice.shuffle(order)
    backs: list[Back] = []
    environment = {"EMBEDMESH_STORE": server.new()} if server is not None else {}
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(serving(["--workers", str(workers), "--node-networks", NETWORKS], environment))
        member = stack.enter_context(joining(live)) if receipts else None
        known = learn(live, dice)
        began = time.monotonic()
        with clients(live, seed, known) as working:
            for kind in track(order, "kill -9"):
                time.sleep(dice.uniform(*CALM_S))
                if kind == POSTGRES:
                    assert server is not None
                    killed = kill_postgres(server)
                else:
                    killed = kill(live, kind, dice)
                backs.append(Back(kind, back_after(live, killed)))
        seconds = time.monotonic() - began
        if member is not None:
            member.process.stop()  # it says farewell and writes its log through
        settle(live)
        live.stop()
        refused = sum((client.refused for client in working), Counter[str]())
        delivered = [each for client in working for each in client.delivered]
        return join(live, delivered, refused, sum(client.wrong for client in working), backs, seconds, member)


if __name__ == "__main__":
    bench(
        measure,
        kills="of each kind: gateway, node, engine worker, PostgreSQL",
        seed="of order, moments and load",
        store="kill -9 of its server, too",
        workers="gateways; 0 is 1 on SQLite, 2 on PostgreSQL",
        receipts="join a second node's log, too",
    )
