"""kill -9 of gateway, node and engine worker under load: `python -m bench.crash [--kills N] [--seed N] [--json]`.

What must hold, and is joined request by request at the end (each carries a `user` of its own, whose keyed hash the
ledger keeps):

* every captured charge is one that a client has read to its last byte (no client breaks a delivery off: what a caller
  decides is tested elsewhere, here it is what a crash does), at the cost that its header named;
* every reply that was read is captured, but for replies in flight when a gateway died: at most as many as the ledger
  released at its next start;
* with `--receipts`, a second node's log of what it answered agrees with both (see crash_receipts);
* every reply is right, and the service is back within BACK_S_MAX of each kill, without help.

Exit code 0 only if all of it holds.
"""

import argparse
import base64
import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.crash_join import APART, BACK_S_MAX, KINDS, POSTGRES, Back, Delivered, Figures, join
from bench.crash_receipts import NETWORKS, joining
from bench.live import REPLY_S, Live, Reply, Wire, serving
from bench.postgres import Server
from embedmesh.storage.engines import engine_of

GIVE_UP_S = 30.0  # a service that is not back by then will not be
CALM_S = (0.05, 1.0)  # load between two kills: long enough for whatever state a kill may find
CLIENTS = 6
PAUSE_S = 0.05  # of a client that was refused; told to wait a second, most wait longer
LOG_SHOWN_CHARS = 2_000  # its end, where the bench breaks off
OPEN_HOLDS = "SELECT count(*) FROM holds WHERE state = 'open'"
POLL_S = 0.005  # between two looks at a process, and two questions whether it is back
SIZES = (1, 1, 1, 1, 1, 2, 8, 8, 32)  # texts a request: mostly one, sometimes a tenth of a second of work
WORDS = ("river", "stone", "light", "market", "engine", "winter", "paper", "garden", "silver", "number", "letter")
VECTOR_ERROR_MAX = 1e-6  # a text alone and in any batch


class Client(threading.Thread):
    """Asks one thing after another until told to stop, and keeps the log of what it got."""

    def __init__(self, live: Live, name: str, dice: Random, known: dict[str, np.ndarray], stop: threading.Event):
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
            self.refused[f"{reply.status} {reply.code}"] += 1
            time.sleep(PAUSE_S)
            return
        said = reply.headers
        cost, request_id = int(said["x-embedmesh-cost-nanousd"]), said["x-embedmesh-request"]
        self.delivered.append(Delivered(user, cost, request_id, said["x-embedmesh-node"]))
        right = [self._known[text] for text in texts]
        found = vectors_of(reply)
        if len(found) != len(right) or max(map(difference, found, right)) > VECTOR_ERROR_MAX:
            self.wrong += 1

    def _hang_up(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


def vectors_of(reply: Reply) -> list[np.ndarray]:
    """The vectors of a base64 reply."""
    return [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in reply.json()["data"]]


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest, over the components."""
    return float(np.abs(one - other).max())


def learn(live: Live, dice: Random, *, texts: int = 60) -> dict[str, np.ndarray]:
    """Some texts of 1 to 120 words and their vectors, each asked for alone, before anything is killed."""
    known = {}
    with live.wire() as wire:
        for number in range(texts):
            text = " ".join([str(number), *dice.choices(WORDS, k=dice.choice((1, 5, 5, 10, 10, 20, 40, 120)))])
            reply = wire.ask(live.embed({"input": text, "user": APART, "encoding_format": "base64"}))
            (known[text],) = vectors_of(reply)
    return known


def kill(live: Live, kind: str, dice: Random) -> float:
    """kill -9, once there is such a process; the moment when it was dead."""
    until = time.monotonic() + GIVE_UP_S
    while (pid := _find(live, kind, dice)) is None:
        if time.monotonic() > until:
            said = live.log.read_text(errors="replace")[-LOG_SHOWN_CHARS:]
            raise RuntimeError(f"there is no {kind} to kill; {said}")
        time.sleep(PAUSE_S)
    kill_process(pid)
    return time.monotonic()


def kill_process(pid: int) -> None:
    """kill -9; returns when it is dead."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError, IndexError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(POLL_S)


def kill_postgres(server: Server) -> float:
    """kill -9 of the server; the moment when a new one takes connections."""
    kill_process(server.pid)
    server.start_again()
    return time.monotonic()


def _find(live: Live, kind: str, dice: Random) -> int | None:
    if kind != "gateway":
        return live.pids().get(kind)
    gateways = live.gateways()
    return dice.choice(gateways) if gateways else None


def back_after(live: Live, killed: float) -> float | None:
    """Seconds from the kill to the first 200 of a request sent after it."""
    question = live.embed({"input": "back?", "user": APART})
    while time.monotonic() - killed < GIVE_UP_S:
        with contextlib.suppress(OSError, EOFError), live.wire(GIVE_UP_S) as wire:
            if wire.ask(question).status == 200:
                return time.monotonic() - killed
        time.sleep(POLL_S)
    return None


def settle(live: Live) -> None:
    """Wait, for at most so long as one may take to come back, until a gateway that was killed last has looked after its
    holds: the other one answers at once. What is open after that is found by the join."""
    until = time.monotonic() + BACK_S_MAX
    db = engine_of(live.store).connect(busy_s=BACK_S_MAX, read_only=True)
    with contextlib.closing(db):
        while db.execute(OPEN_HOLDS).fetchone() != (0,) and time.monotonic() < until:
            time.sleep(POLL_S)


@contextlib.contextmanager
def clients(live: Live, seed: int, known: dict[str, np.ndarray]) -> Iterator[list[Client]]:
    """Clients at work; at the end each finishes what it has asked."""
    stop = threading.Event()
    working = [Client(live, f"client{at}", Random(f"{seed} {at}"), known, stop) for at in range(CLIENTS)]
    for client in working:
        client.start()
    try:
        yield working
    finally:
        stop.set()
        for client in working:
            client.join(REPLY_S + 1)


def measure(kills: int, seed: int, workers: int, server: Server | None, receipts: bool, console: Console) -> Figures:
    """The whole run: `kills` of each kind, in an order and at moments by dice."""
    dice = Random(seed)
    order = list((KINDS if server is None else (*KINDS, POSTGRES)) * kills)
    dice.shuffle(order)
    bar = Progress(TextColumn("kill -9"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    backs: list[Back] = []
    environment = {"EMBEDMESH_STORE": server.new()} if server is not None else {}
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(serving(["--workers", str(workers), "--node-networks", NETWORKS], environment))
        member = stack.enter_context(joining(live)) if receipts else None
        known = learn(live, dice)
        began = time.monotonic()
        with clients(live, seed, known) as working, bar:
            for kind in bar.track(order):
                time.sleep(dice.uniform(*CALM_S))
                if kind == POSTGRES:
                    assert server is not None
                    killed = kill_postgres(server)
                else:
                    killed = kill(live, kind, dice)
                backs.append(Back(kind, back_after(live, killed)))
        seconds = time.monotonic() - began
        if member is not None:
            member.stop()
        settle(live)
        live.stop()
        refused = sum((client.refused for client in working), Counter())
        delivered = [each for client in working for each in client.delivered]
        return join(live, delivered, refused, sum(client.wrong for client in working), backs, seconds, member)


def show(figures: Figures, console: Console) -> None:
    """The figures for a person, the verdict last."""
    back = Table(
        "killed", "times", "back after, median s", "max s", title=f"{figures.kills} kills in {figures.seconds:.0f} s"
    )
    for kind, each in figures.back_s.items():
        back.add_row(kind, f"{each['kills']:.0f}", f"{each['median']:.2f}", f"{each['max']:.2f}")
    console.print(back)
    table = Table("what", "figure")
    receipts = msgspec.structs.asdict(figures.receipts) if figures.receipts is not None else {}
    for name, value in (
        msgspec.structs.asdict(figures) | {f"receipts: {name}": n for name, n in receipts.items()}
    ).items():
        if not isinstance(value, int | float):
            continue
        table.add_row(name.replace("_", " "), f"{value:,.0f}" if isinstance(value, float) else f"{value:,}")
    for kind, count in figures.refused.items():
        table.add_row(f"not delivered: {kind}", f"{count:,}")
    console.print(table)
    broken = figures.broken()
    console.print("BROKEN: " + "; ".join(broken) if broken else "All promises kept.")


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.crash", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each kind: gateway, node, engine worker, PostgreSQL")
    parser.add_argument("--seed", type=int, default=1, help="of order, moments and load")
    parser.add_argument("--store", choices=("sqlite", POSTGRES), default="sqlite", help="kill -9 of its server, too")
    parser.add_argument("--workers", type=int, default=0, help="gateways (default: 1 on SQLite, 2 on PostgreSQL)")
    parser.add_argument("--receipts", action="store_true", help="with a second node, whose log is joined, too")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked: Any = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        server = None
        if asked.store == POSTGRES:
            from bench.postgres import serving as serving_postgres

            server = stack.enter_context(serving_postgres(on_disk=True))
        workers = asked.workers or (2 if server is not None else 1)
        figures = measure(asked.kills, asked.seed, workers, server, asked.receipts, Console(stderr=True))
    if asked.json:
        print(msgspec.json.encode({"ok": not figures.broken(), **msgspec.to_builtins(figures)}).decode())
    else:
        show(figures, Console())
    return 1 if figures.broken() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
