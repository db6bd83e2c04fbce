"""What a confidential call costs over a plain one: `python -m bench.confidential [--rounds N] [--seconds S] [--json]`.

One short text by our own client, in the same run and in turns, on a real `embedmesh serve`: the plain call; the
confidential one, with its lock, both seals and every check. Then calls a second of some callers, plain and confidential
in turns. Every vector is compared with the plain call's.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import msgspec

from bench.latency import Rate
from bench.rig.command import bench, track
from bench.rig.figures import Spread, Target
from bench.rig.http import MODEL
from bench.rig.live import Live, serving
from embedmesh.client import Client

TEXT = "How long does one short question take from here to there?"
WARM_ROUNDS = 30
CALLERS = (1, 8, 32)
TURNS = 5  # of plain and confidential calls with many callers
SAME = 2e-6  # alone and in a batch differ by less

ADDED_MS_MAX = 1.5  # the targets
RATE_MIN = 0.7


class Rates(msgspec.Struct, frozen=True):
    """Of some callers: calls a second."""

    callers: int
    plain_per_s: float
    confidential_per_s: float
    ratio: float


class Figures(msgspec.Struct, frozen=True):
    """All of it."""

    plain: Rate
    confidential: Rate
    rates: list[Rates]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """Nothing: a busy machine is no bug."""
        return []


def client_of(live: Live) -> Client:
    """A client that has pinned the node of this endpoint, by the file that the node has written."""
    pins = live.data_dir / "node" / "node.identity.pub"
    found = pins if pins.exists() else next(live.data_dir.rglob("node.identity.pub"))
    return Client(base_url=live.base_url, api_key=live.api_key, pins=found)


def call(client: Client, *, confidential: bool, text: str = TEXT) -> list[float]:
    """One call's vector."""
    reply = client.embeddings.create(model=MODEL, input=text, confidential=confidential)
    return list(reply.data[0].embedding)


def timed(ask: Callable[[], object]) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    ask()
    return 1000 * (time.perf_counter() - begun)


def turn_by_turn(live: Live, rounds: int) -> tuple[list[float], list[float]]:
    """Plain calls and confidential calls; milliseconds."""
    plain: list[float] = []
    sealed: list[float] = []
    with client_of(live) as client:
        right = call(client, confidential=False)
        for number in track(range(WARM_ROUNDS + rounds), "turn by turn"):
            plain_ms = timed(lambda: call(client, confidential=False))
            begun = time.perf_counter()
            vector = call(client, confidential=True)
            sealed_ms = 1000 * (time.perf_counter() - begun)
            if max(abs(a - b) for a, b in zip(vector, right, strict=True)) > SAME:
                raise RuntimeError("a confidential call gave another vector than a plain one")
            if number >= WARM_ROUNDS:
                plain.append(plain_ms)
                sealed.append(sealed_ms)
    return plain, sealed


def per_s(live: Live, callers: int, seconds: float, *, confidential: bool) -> float:
    """Calls a second."""
    until = time.perf_counter() + seconds
    with client_of(live) as client:

        def ask(number: int) -> int:
            done = 0
            while time.perf_counter() < until:
                call(client, confidential=confidential, text=f"{TEXT} {number} {done}")  # equal texts share their work
                done += 1
            return done

        begun = time.perf_counter()
        with ThreadPoolExecutor(callers) as pool:
            return sum(pool.map(ask, range(callers))) / (time.perf_counter() - begun)


def measure(rounds: int = 300, seconds: float = 3.0) -> Figures:
    """Every figure, on one running endpoint."""
    with serving() as live:
        plain, sealed = turn_by_turn(live, rounds)
        rates = []
        for callers in track(CALLERS, "many callers"):
            turns = [
                (
                    per_s(live, callers, seconds, confidential=False),
                    per_s(live, callers, seconds, confidential=True),
                )
                for _ in range(TURNS)
            ]
            ratio = median(each / other for other, each in turns)
            rates.append(Rates(callers, median(a for a, _ in turns), median(b for _, b in turns), ratio))
        added_ms = [one - other for one, other in zip(sealed, plain, strict=True)]
        targets = [
            Target("p50 added to the plain call, ms", ADDED_MS_MAX, False, Spread.of(sorted(added_ms))),
            Target("calls a second over plain ones", RATE_MIN, True, Spread.of([each.ratio for each in rates])),
        ]
        return Figures(
            Rate.of(plain, sum(plain) / 1000),
            Rate.of(sealed, sum(sealed) / 1000),
            rates,
            targets,
        )


if __name__ == "__main__":
    bench(measure, rounds="calls of each kind, one at a time", seconds="for each number of callers, each time")
