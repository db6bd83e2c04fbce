"""What the gateway and the node add to the engine: `python -m bench.latency [--rounds N] [--seconds S] [--json]`.

One short text, in the same run and turn by turn, so that whatever else the machine does meets all alike:

* engine: tokeniser and a worker process of its own, as a node uses them, without any HTTP;
* node: its HTTP over its Unix socket;
* gateway: the public endpoint over keep-alive HTTP, key, count, durable hold and all.

Then requests a second with many callers, at the node and at the gateway, and the memory after mixed requests.
"""

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.live import MODEL, Address, Live, Wire, http_request, serving
from embedmesh.engine.folder import digest, read_folder
from embedmesh.engine.frames import LoadModel
from embedmesh.engine.plan import pad_length
from embedmesh.engine.supervise import Supervisor
from embedmesh.engine.tokens import ModelTokenizer
from tests.data import find_model_folder

TEXT = "How long does one short question take from here to there?"
WARM_ROUNDS = 50  # first kernels, caches, connections
CALLERS = (1, 16, 32)
MIXED_REQUESTS = 1_000  # before memory is looked at
SIZES = (1, 1, 1, 1, 2, 8, 32)  # texts in one of those
WORDS_A_TEXT = (1, 5, 10, 20, 40, 120, 180)
SEED = 1

ADDED_MS_MAX = 2.5  # the targets
GATEWAY_MB_MAX = 120.0
NODE_MB_MAX = 320.0  # with its worker


class Times(msgspec.Struct, frozen=True):
    """Of one path, in milliseconds."""

    p50_ms: float
    p99_ms: float


class Rate(msgspec.Struct, frozen=True):
    """Of some callers who each ask again as soon as they were answered."""

    callers: int
    per_s: float
    p50_ms: float
    p99_ms: float


class Figures(msgspec.Struct, frozen=True):
    """All of it. Memory in MB (1e6 bytes), by process."""

    engine: Times
    node: Times
    gateway: Times
    node_rates: list[Rate]
    gateway_rates: list[Rate]
    resident_mb: dict[str, float]

    @property
    def added_ms(self) -> float:
        """What the gateway's median is above the engine's."""
        return self.gateway.p50_ms - self.engine.p50_ms

    def missed(self) -> list[str]:
        """The targets that were missed, in words."""
        gateway, node = self.resident_mb["gateway"], self.resident_mb["node"] + self.resident_mb["worker"]
        said = {
            f"the gateway's p50 is {self.added_ms:.2f} ms above the engine's": self.added_ms > ADDED_MS_MAX,
            f"the gateway has {gateway:.0f} MB": gateway > GATEWAY_MB_MAX,
            f"the node has {node:.0f} MB": node > NODE_MB_MAX,
        }
        return [words for words, missed in said.items() if missed]


class Engine:
    """What a node has inside, without its HTTP. `start`, then `embed`, then `stop`."""

    def __init__(self, folder: Path) -> None:
        model = read_folder(folder)
        self._tokenizer = ModelTokenizer(folder, model.max_tokens)
        load = LoadModel(str(folder), digest(folder), model.width, model.max_tokens, threads=0)
        self._supervisor = Supervisor(load, on_start=lambda: None)
        self.start, self.stop = self._supervisor.start, self._supervisor.stop

    async def embed(self, text: str) -> bytes:
        """The vector of one text."""
        sequence = self._tokenizer.with_specials(self._tokenizer.ids([text])[0])
        (vector,) = await self._supervisor.run([sequence], 1, pad_length(len(sequence)))
        assert vector is not None
        return vector


def questions(live: Live) -> tuple[bytes, bytes]:
    """The same short text, as the node and as the gateway are asked."""
    body = msgspec.json.encode({"model": MODEL, "input": [TEXT]})
    return http_request("POST", "/v1/embeddings", body), live.embed({"input": TEXT, "encoding_format": "base64"})


async def turn_by_turn(live: Live, folder: Path, rounds: int, console: Console) -> list[Times]:
    """Engine, node and gateway in turns. Their blocking clients hold the event loop, which has nothing else to do."""
    engine = Engine(folder)
    to_node, to_gateway = questions(live)
    took: list[list[float]] = [[], [], []]
    await engine.start()
    try:
        with Wire(live.node_socket) as node, live.wire() as gateway:
            for _ in track(range(WARM_ROUNDS + rounds), "turn by turn", console=console):
                marks = [time.perf_counter()]
                await engine.embed(TEXT)
                marks.append(time.perf_counter())
                assert node.ask(to_node).status == 200
                marks.append(time.perf_counter())
                assert gateway.ask(to_gateway).status == 200
                marks.append(time.perf_counter())
                for times, begun, done in zip(took, marks, marks[1:], strict=False):
                    times.append(1000 * (done - begun))
    finally:
        await engine.stop()
    return [Times(*percentiles(times[WARM_ROUNDS:])) for times in took]


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The median, and what 99 in a hundred do not exceed."""
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


def rate(address: Address, question: bytes, callers: int, seconds: float) -> Rate:
    """Requests a second of some callers."""
    took: list[float] = []
    failed: list[int] = []
    until = time.perf_counter() + seconds

    def call() -> None:
        with Wire(address) as wire:
            while (begun := time.perf_counter()) < until:
                status = wire.ask(question).status
                took.append(1000 * (time.perf_counter() - begun))
                if status != 200:
                    failed.append(status)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(took)} requests failed, the first with status {failed[0]}")
    return Rate(callers, len(took) / (time.perf_counter() - begun), *percentiles(took))


def ask_mixed(live: Live, console: Console) -> None:
    """Texts of every length and requests of many sizes, in both encodings."""
    dice = Random(SEED)
    with live.wire() as wire:
        for number in track(range(MIXED_REQUESTS), "mixed requests", console=console):
            texts = [f"{dice.random()} " + "word " * dice.choice(WORDS_A_TEXT) for _ in range(dice.choice(SIZES))]
            encoding = "float" if number % 2 else "base64"
            reply = wire.ask(live.embed({"input": texts, "encoding_format": encoding, "truncate": "end"}))
            assert reply.status == 200, reply.body


def measure(folder: Path, rounds: int, seconds: float, console: Console) -> Figures:
    """Every figure, on one running endpoint."""
    with serving() as live, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        engine, node, gateway = runner.run(turn_by_turn(live, folder, rounds, console))
        to_node, to_gateway = questions(live)
        node_rates, gateway_rates = [], []
        for callers in track(CALLERS, "many callers", console=console):
            node_rates.append(rate(live.node_socket, to_node, callers, seconds))
            gateway_rates.append(rate(live.address, to_gateway, callers, seconds))
        ask_mixed(live, console)
        return Figures(engine, node, gateway, node_rates, gateway_rates, live.resident_mb())


def show(figures: Figures, console: Console) -> None:
    """The figures for a person, the verdict last."""
    table = Table("one short text", "p50 ms", "p99 ms", "p50 above the engine, ms")
    for name, times in (("engine", figures.engine), ("node", figures.node), ("gateway", figures.gateway)):
        above = times.p50_ms - figures.engine.p50_ms
        table.add_row(name, f"{times.p50_ms:.2f}", f"{times.p99_ms:.2f}", f"{above:.2f}")
    console.print(table)
    table = Table("callers", "node: requests/s", "p50 ms", "p99 ms", "gateway: requests/s", "p50 ms", "p99 ms")
    for node, gateway in zip(figures.node_rates, figures.gateway_rates, strict=True):
        row = [f"{value:,.1f}" for each in (node, gateway) for value in (each.per_s, each.p50_ms, each.p99_ms)]
        table.add_row(str(node.callers), *row)
    console.print(table)
    memory = ", ".join(f"{name} {size:.0f} MB" for name, size in figures.resident_mb.items())
    console.print(f"Resident after {MIXED_REQUESTS:,} mixed requests: {memory}.")
    console.print("Missed: " + "; ".join(figures.missed()) if figures.missed() else "All targets reached.")


def main(arguments: Sequence[str]) -> int:
    """The command. Its exit code does not judge: a busy machine is no bug."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=400, help="requests of each path, one at a time")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of callers")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked: Any = parser.parse_args(arguments)
    folder = find_model_folder()
    if folder is None:
        print("the default model's files are not here; run `embedmesh setup` first", file=sys.stderr)
        return 1
    figures = measure(folder, asked.rounds, asked.seconds, Console(stderr=True))
    if asked.json:
        print(msgspec.json.encode({**msgspec.to_builtins(figures), "missed": figures.missed()}).decode())
    else:
        show(figures, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
