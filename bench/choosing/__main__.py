"""Real processes, unequal nodes: `python -m bench.choosing [--load 0.7 0.9] [--seconds N] [--rounds N] [--json]`.

Four scripted nodes (bench.faultnode) of unequal speed are started once. Our gateway has them as nodes that joined it,
the others in front of the same processes' OpenAI form. Then each contender gets the same arrivals, one after the
other, in turns over the rounds.
"""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import msgspec

from bench.choosing.load import Arrival, arrivals, make_pool, play
from bench.fault.load import MAX_TOKENS, Pool, Record
from bench.rig import fleet
from bench.rig.command import bench, model_folder, progress
from bench.rig.figures import percentile
from bench.rig.fleet import Fleet, Speed
from bench.rig.install import NotInstalled, healthy, nginx, python_router
from bench.rig.processes import Process, free_port
from embedmesh.engine.tokens import ModelTokenizer

SPEEDS = (60_000.0, 30_000.0, 15_000.0, 5_000.0)  # tokens per second
FIXED_MS = 2.0
OURS = "embedmesh"
SEED = 11
START_S = 30.0  # of a peer
P99_OVER_ROUND_ROBIN, P99_OVER_TWO_CHOICES = 4.0, 2.0  # at the first load
WORSE_THAN_LEAST = 1.05  # at the second


class Peer(NamedTuple):
    """A router and its policy."""

    name: str
    program: str  # nginx or sglang-router
    policy: str  # as its option


PEERS = (
    Peer("nginx, round robin", "nginx", ""),
    Peer("nginx, two choices", "nginx", "random two least_conn;"),
    Peer("nginx, least requests", "nginx", "least_conn;"),
    Peer("sglang-router, round robin", "sglang-router", "round_robin"),
    Peer("sglang-router, two choices", "sglang-router", "power_of_two"),
)


@contextmanager
def running(peer: Peer, nodes: Sequence[int], folder: Path) -> Iterator[int]:
    """The peer in front of nodes at these ports; the port that it listens on. Raises NotInstalled."""
    port = free_port()
    folder.mkdir()
    if peer.program == "nginx":
        command = nginx(peer.policy, nodes, folder, port)
    else:
        command = python_router(peer.program, peer.policy, nodes, port, "--request-timeout-secs", "600")
    with healthy(Process(command, folder / "log"), port, START_S):
        yield port


class RouterRow(msgspec.Struct, frozen=True):
    """One contender at one load, in milliseconds; of all requests and of the small ones."""

    requests: int
    failed: int
    wrong_vectors: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    small_p50_ms: float
    small_p99_ms: float

    @classmethod
    def of(cls, records: Sequence[Record]) -> "RouterRow":
        """From what became of its requests."""
        every = [one.took_s * 1000 for one in records]
        small = [one.took_s * 1000 for one in records if one.user == "small"]
        return cls(
            len(records),
            sum(not one.served for one in records),
            sum(one.wrong for one in records),
            fmean(every),
            *(percentile(every, each) for each in (50, 90, 99)),
            *(percentile(small, each) for each in (50, 99)),
        )


class Figures(msgspec.Struct, frozen=True):
    """Rows by load and contender."""

    loads: dict[str, dict[str, RouterRow]]

    @property
    def broken(self) -> list[str]:
        """The targets that were missed, in words."""
        missed = []
        for load, rows in self.loads.items():
            ours = rows[OURS]
            if ours.failed or ours.wrong_vectors:
                missed.append(f"at {load} {ours.failed} failed, {ours.wrong_vectors} vectors were wrong")
            for name, row in rows.items():
                ratio, least = row.p99_ms / ours.p99_ms, _least_ratio(float(load), name)
                if ratio < least:
                    missed.append(f"at {load} p99 is {ratio:.2f}x better than {name}, not {least:.2f}x")
        return missed


def _least_ratio(load: float, name: str) -> float:
    """The least that a peer's p99 over ours may be."""
    if load < 0.8 and "round robin" in name:
        return P99_OVER_ROUND_ROBIN
    if load < 0.8 and "two choices" in name:
        return P99_OVER_TWO_CHOICES
    return 1 / WORSE_THAN_LEAST if "least requests" in name else 0.0


async def measure(load: Sequence[float] = (0.7, 0.9), seconds: float = 20.0, rounds: int = 2) -> Figures:
    """All of it."""
    pool = make_pool(ModelTokenizer(model_folder(), MAX_TOKENS))
    figures: dict[str, dict[str, RouterRow]] = {}
    with tempfile.TemporaryDirectory(prefix="embedmesh-choosing-") as scratch, progress() as bar:
        async with fleet.running(Path(scratch)) as nodes:
            ports = await start_nodes(nodes)
            missing: set[str] = set()
            task = bar.add_task("playing", total=len(load) * rounds * (1 + len(PEERS)))
            for share in load:
                records: dict[str, list[Record]] = {}
                for number, peer in itertools.product(range(rounds), (None, *PEERS)):
                    planned = arrivals(pool, share * sum(SPEEDS), seconds, SEED + number)
                    name = peer.name if peer is not None else OURS
                    bar.update(task, description=f"load {share:.0%}: {name}", advance=1)
                    if name in missing:
                        continue
                    folder = Path(scratch) / f"{share}-{number}-{name}"
                    try:
                        found = await contend(peer, nodes, planned, pool, ports, folder)
                    except NotInstalled as why:
                        bar.console.print(f"{name} is left out: {why}", markup=False)
                        missing.add(name)
                    else:
                        records.setdefault(name, []).extend(found)
                figures[f"{share:g}"] = {name: RouterRow.of(each) for name, each in records.items()}
    return Figures(figures)


async def start_nodes(nodes: Fleet) -> list[int]:
    """The nodes, joined; the ports of their OpenAI form."""
    ports = []
    for seed, speed in enumerate(SPEEDS):
        ports.append(free_port())
        options = ("--openai-port", str(ports[-1]))
        await nodes.join(await nodes.start(Speed(speed, FIXED_MS), seed=seed, options=options))
    return ports


async def contend(
    peer: Peer | None, nodes: Fleet, planned: Sequence[Arrival], pool: Pool, ports: Sequence[int], folder: Path
) -> list[Record]:
    """One contender, alone with the nodes."""
    if peer is None:
        return await play(planned, pool, nodes.port, nodes.credentials.api_key)
    with running(peer, ports, folder) as port:
        return await play(planned, pool, port, "none")


if __name__ == "__main__":
    bench(measure, load="of what the nodes can do together", seconds="of arrivals, a round")
