"""Two models on the same cores: what they lose to each other: `python -m bench.two_models [--rounds N] [--json]`.

A node serves the default model twice, under two names, with an engine each. In turns: one model alone and both, under
bulk calls and under short ones; then short calls to one while the other has bulk.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import msgspec

from bench.rig.command import CannotRun, bench, model_folder, track
from bench.rig.figures import Spread, Target, missed, percentile
from bench.rig.http import Address, Wire, http_request
from bench.rig.processes import EMBEDMESH, Process, wait_for
from embedmesh.engine.threads import engine_threads
from embedmesh.rules.embeddings import EMBED_HEAD, pack_ids

NAMES = "one", "other"
BULK_TEXTS, BULK_TOKENS = 64, (16, 120)  # of a call; two calls of each model are under way
BULK_CALLERS = 2
SHORT_TOKENS = 10
WARM_S = 2.0
READY_S = 30.0  # two seconds on a quiet machine
SEED = 1

SUM_MIN = 0.95  # of what one does alone: what both do together
SHORT_MAX = 2.5  # times the p50 of one alone: half of a core's time, and a little for the change


class TwoModelFigures(msgspec.Struct, frozen=True):
    """Tokens a second and milliseconds, medians over the rounds; ratios are taken round by round."""

    threads: str
    alone_tokens_per_s: float
    both_tokens_per_s: float
    short_alone_ms: float
    short_both_ms: float
    short_beside_bulk_ms: float
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """The gates that were missed."""
        return missed(self.targets)


class Load:
    """Callers of one model, each of which asks again as soon as it is answered."""

    def __init__(self, node: Address, model: str, texts: int, tokens: tuple[int, int], callers: int) -> None:
        dice = Random(f"{SEED} {model}")
        self._node = node
        self._callers = callers
        lengths = [dice.randint(*tokens) for _ in range(texts)]
        self._tokens = sum(lengths) + 2 * texts
        ids = [b"".join(dice.randrange(2_000, 20_000).to_bytes(4, "little") for _ in range(n)) for n in lengths]
        body = msgspec.msgpack.encode(pack_ids(model, ids))
        self._request = EMBED_HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body

    def run(self, seconds: float) -> tuple[float, list[float]]:
        """Tokens a second, and what each call took in ms."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(self._callers) as pool:
            took = [ms for each in pool.map(lambda _: self._call(begun + seconds), range(self._callers)) for ms in each]
        return self._tokens * len(took) / (time.perf_counter() - begun), took

    def _call(self, until: float) -> list[float]:
        took = []
        with Wire(self._node) as wire:
            while time.perf_counter() < until:
                seconds, reply = wire.timed(self._request)
                assert reply.status == 200, reply.body[:200]
                took.append(1000 * seconds)
        return took


def together(loads: Sequence[Load], seconds: float) -> list[tuple[float, list[float]]]:
    """Of each load, while all of them run."""
    with ThreadPoolExecutor(len(loads)) as pool:
        return list(pool.map(lambda load: load.run(seconds), loads))


def catalogue(folder: Path) -> str:
    """The default model under two names."""
    built_in = Path(__file__).parents[1] / "embedmesh" / "data" / "catalogue.toml"
    entry = built_in.read_text().partition("[[models]]")[2].partition("[[models]]")[0]
    entries = []
    for name in NAMES:
        lines = [line for line in entry.splitlines() if line and line.split()[0] not in ("id", "aliases", "folder")]
        entries.append("\n".join(["[[models]]", f'id = "{name}"', f'folder = "{folder}"', *lines]))
    return "\n".join(entries)


def measure(rounds: int = 5, seconds: float = 2.0) -> TwoModelFigures:
    """All loads in turns, `rounds` times."""
    folder = model_folder()
    with tempfile.TemporaryDirectory(prefix="embedmesh-") as runs:
        path, file = Path(runs) / "node.sock", Path(runs) / "catalogue.toml"
        file.write_text(catalogue(folder))
        command = [*EMBEDMESH, "node", "--uds", str(path), "--data-dir", runs, "--catalogue", str(file)]
        with Process(command, Path(runs) / "node.log") as node:
            if not wait_for(lambda: is_ready(path), READY_S, lambda: node.lives):
                raise CannotRun(f"the node does not start: {node.log_tail()}")
            return _figures(path, rounds, seconds)


def is_ready(node: Path) -> bool:
    """Whether both models have embedded something. Raises OSError while it does not listen."""
    with Wire(node) as wire:
        return wire.ask(http_request("GET", "/readyz")).status == 200


def _figures(node: Path, rounds: int, seconds: float) -> TwoModelFigures:
    bulk = [Load(node, name, BULK_TEXTS, BULK_TOKENS, BULK_CALLERS) for name in NAMES]
    short = [Load(node, name, 1, (SHORT_TOKENS, SHORT_TOKENS), 1) for name in NAMES]
    together([*bulk, *short], WARM_S)
    steps: dict[str, Callable[[], float]] = {
        "alone": lambda: bulk[0].run(seconds)[0],
        "both": lambda: sum(speed for speed, _ in together(bulk, seconds)),
        "short": lambda: percentile(short[0].run(seconds)[1], 50),
        "short both": lambda: max(percentile(took, 50) for _, took in together(short, seconds)),
        "beside bulk": lambda: percentile(together([short[0], bulk[1]], seconds)[0][1], 50),
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds), "rounds"):
        for name, step in steps.items():
            found[name].append(step())

    def ratio(name: str, over: str) -> Spread:
        return Spread.of([one / other for one, other in zip(found[name], found[over], strict=True)])

    alone, both, short_alone, short_both, beside = (statistics.median(found[name]) for name in steps)
    return TwoModelFigures(
        threads=str(engine_threads()),
        alone_tokens_per_s=alone,
        both_tokens_per_s=both,
        short_alone_ms=short_alone,
        short_both_ms=short_both,
        short_beside_bulk_ms=beside,
        targets=[
            Target("both under bulk over one alone, tokens/s", SUM_MIN, True, ratio("both", "alone")),
            Target(
                "p50 of a short text, both under short ones, over alone", SHORT_MAX, False, ratio("short both", "short")
            ),
            Target(
                "p50 of a short text beside the other's bulk, over alone",
                SHORT_MAX,
                False,
                ratio("beside bulk", "short"),
            ),
        ],
    )


if __name__ == "__main__":
    bench(measure, rounds="of all loads in turns", seconds="of each load in a round")
