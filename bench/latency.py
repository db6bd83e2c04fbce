"""What the gateway and the node add to the engine: `python -m bench.latency [--rounds N] [--seconds S] [--json]`.

One short text, in the same run and in turns, so that other work on the machine meets all alike:

* in process: tokeniser and model in the bench's own process;
* engine: the same with a worker process of its own, as a node uses it, without any HTTP;
* node: its socket, in the compact form, as its gateway asks it;
* gateway: the public endpoint over keep-alive HTTP, key, count, money held and all.

Then requests a second with many callers, at the node and at the gateway, and the memory after mixed requests. On a busy
machine `chrt --rr 10 python -m bench.latency` gives the bench and what it starts the cores whenever they want them.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import msgspec
import uvloop

from bench.quality import parts_of
from bench.rig.command import bench, model_folder, track
from bench.rig.figures import Spread, Target, percentile
from bench.rig.http import Address, Wire, embedding_request, http_request
from bench.rig.live import Live, serving
from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.engine.plan import pad_length
from embedmesh.engine.threads import threads_here
from embedmesh.process import python_in_words
from embedmesh.rules.embeddings import EMBED_HEAD, bytes_of, pack_ids

TEXT = "How long does one short question take from here to there?"
WARM_ROUNDS = 50  # first kernels, caches, connections
CALLERS = (1, 16, 32)
MIXED_REQUESTS = 1_000  # before memory is looked at
SIZES = (1, 1, 1, 1, 2, 8, 32)  # texts in one of those
WORDS_A_TEXT = (1, 5, 10, 20, 40, 120, 180)
SEED = 1

ADDED_MS_MAX, ADDED_MS_AIM = 1.2, 0.8  # the targets
GATEWAY_MB_MAX = 120.0
NODE_MB_MAX = 320.0  # with its worker


class Rate(msgspec.Struct, frozen=True):
    """Of some callers that each send the next request as soon as they were answered."""

    callers: int
    per_s: float
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, took_ms: Sequence[float], seconds: float, callers: int = 1) -> "Rate":
        """From what each request took."""
        return cls(callers, len(took_ms) / seconds, percentile(took_ms, 50), percentile(took_ms, 99))


class Figures(msgspec.Struct, frozen=True):
    """All of it. Memory in MB (1e6 bytes), by process."""

    python: str
    in_process: Rate
    engine: Rate
    node: Rate
    gateway: Rate
    node_rates: list[Rate]
    gateway_rates: list[Rate]
    resident_mb: dict[str, float]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """Nothing: a busy machine is no bug."""
        return []


def questions(live: Live, ids: bytes) -> tuple[bytes, bytes]:
    """The same short text, as requests to the node and to the gateway."""
    with Wire(live.node_socket) as wire:
        model = wire.ask(http_request("GET", "/v1/models")).json()["data"][0]["id"]
    body = msgspec.msgpack.encode(pack_ids(model, [ids]))
    return EMBED_HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body, embedding_request(TEXT, key=live.api_key)


async def turn_by_turn(live: Live, folder: Path, rounds: int) -> list[Rate]:
    """All four in turns. Their blocking clients hold the event loop, which has nothing else to do."""
    tokenizer, worker = parts_of(folder)
    model = CompiledModel(read_folder(folder), threads_here())
    to_node, to_gateway = questions(live, bytes_of(tokenizer.ids([TEXT])[0]))
    took: list[list[float]] = [[], [], [], []]

    def sequence() -> list[int]:
        return tokenizer.with_specials(tokenizer.ids([TEXT])[0])

    await worker.start()
    try:
        with Wire(live.node_socket) as node, live.wire() as gateway:
            for number in track(range(WARM_ROUNDS + rounds), "turn by turn"):
                begun = time.perf_counter()
                model.run([sequence()], 1, pad_length(len(sequence())))
                in_process_s = time.perf_counter() - begun
                begun = time.perf_counter()
                await worker.run([sequence()], 1, pad_length(len(sequence())))
                engine_s = time.perf_counter() - begun
                (node_s, at_node), (gateway_s, at_gateway) = node.timed(to_node), gateway.timed(to_gateway)
                assert (at_node.status, at_gateway.status) == (200, 200)
                if number >= WARM_ROUNDS:
                    every = in_process_s, engine_s, node_s, gateway_s
                    for times, seconds in zip(took, every, strict=True):
                        times.append(1000 * seconds)
    finally:
        await worker.stop()
    return [Rate.of(times, sum(times) / 1000) for times in took]


def rate(address: Address, question: bytes, callers: int, seconds: float) -> Rate:
    """Requests a second of some callers."""
    until = time.perf_counter() + seconds

    def call(_: int) -> list[float]:
        took: list[float] = []
        with Wire(address) as wire:
            while time.perf_counter() < until:
                took_s, reply = wire.timed(question)
                if reply.status != 200:
                    raise RuntimeError(f"after {len(took)} requests one failed with status {reply.status}")
                took.append(1000 * took_s)
        return took

    begun = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        took = [ms for times in pool.map(call, range(callers)) for ms in times]
    return Rate.of(took, time.perf_counter() - begun, callers)


def ask_mixed(live: Live) -> None:
    """Texts of every length and requests of many sizes, in both encodings."""
    dice = Random(SEED)
    with live.wire() as wire:
        for number in track(range(MIXED_REQUESTS), "mixed requests"):
            texts = [f"{dice.random()} " + "word " * dice.choice(WORDS_A_TEXT) for _ in range(dice.choice(SIZES))]
            encoding = "float" if number % 2 else "base64"
            reply = wire.ask(live.embed({"input": texts, "encoding_format": encoding, "truncate": "end"}))
            assert reply.status == 200, reply.body


def measure(rounds: int = 400, seconds: float = 3.0) -> Figures:
    """Every figure, on one running endpoint."""
    folder = model_folder()
    with serving() as live, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        in_process, engine, node, gateway = runner.run(turn_by_turn(live, folder, rounds))
        to_node, to_gateway = questions(live, bytes_of(parts_of(folder)[0].ids([TEXT])[0]))
        node_rates, gateway_rates = [], []
        for callers in track(CALLERS, "many callers"):
            node_rates.append(rate(live.node_socket, to_node, callers, seconds))
            gateway_rates.append(rate(live.address, to_gateway, callers, seconds))
        ask_mixed(live)
        resident_mb = live.resident_mb()
        at_most = [
            (
                "the gateway's p50 over the model in process, ms",
                gateway.p50_ms - in_process.p50_ms,
                ADDED_MS_MAX,
                ADDED_MS_AIM,
            ),
            ("memory of the gateway, MB", resident_mb["gateway"], GATEWAY_MB_MAX, None),
            ("memory of node and worker, MB", resident_mb["node"] + resident_mb["worker"], NODE_MB_MAX, None),
        ]
        targets = [Target(what, bound, False, Spread.of([found]), aim=aim) for what, found, bound, aim in at_most]
        return Figures(
            python_in_words(), in_process, engine, node, gateway, node_rates, gateway_rates, resident_mb, targets
        )


if __name__ == "__main__":
    bench(measure, rounds="requests of each path, one at a time", seconds="for each number of callers")
