"""The rounds of a run: what each contender took in each row, the ratios, and whether more rounds are needed.

Ratios are taken round by round, so that what slows the machine down slows both. A row is done when all its ratios are
settled (the median's 95 % interval is narrower than ±5 %) or after ROUNDS_MAX. Rounds of an earlier run may be added
to: one that was interrupted, or whose machine is free only now and then. A round in which other processes worked is not
taken, whatever it found, and counted.
"""

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

import embedmesh.engine
from bench.engine.figures import EXACT, PEERS, ROWS, Ratio, is_settled
from bench.engine.targets import OVER_OURS
from bench.rig.command import CannotRun
from bench.rig.figures import median_interval

ROUNDS_MIN = 6  # fewer have no interval of 95 %
ROUNDS_MAX = 30  # what is not settled then is a machine that has other work: the run says so
OTHER_WORK_MAX = 0.05  # of all cores: what an idle system's services take, and an idle node's probes


class Rounds(msgspec.Struct):
    """Seconds by contender, of each round of each row; for one text alone the median of several.

    `made_by` names the machine, its kind, the threads, the versions and the engine's code: rounds of others do not mix.
    """

    made_by: dict[str, str]
    disturbed: int = 0  # rounds of a row that were not taken: other processes had worked meanwhile
    rows: dict[str, list[dict[str, float]]] = msgspec.field(default_factory=lambda: {row: [] for row in ROWS})

    def add(self, row: str, seconds: dict[str, float], other_work: float = 0.0) -> None:
        """One more round of a row, unless other processes took more than OTHER_WORK_MAX of the cores meanwhile."""
        if other_work > OTHER_WORK_MAX:
            self.disturbed += 1
        else:
            self.rows[row].append(seconds)

    def taken(self, row: str, name: str) -> list[float]:
        """What a contender took."""
        return [each[name] for each in self.rows[row] if name in each]

    def ratio(self, row: str, ours: str, theirs: str) -> Ratio | None:
        """None where they were never measured in one round."""
        found = [each[theirs] / each[ours] for each in self.rows[row] if ours in each and theirs in each]
        return ratio_of(row, ours, theirs, found) if found else None

    def best_peer(self, row: str) -> str | None:
        """The peer with the least median; None where none was measured."""
        medians = {name: statistics.median(taken) for name in PEERS if (taken := self.taken(row, name))}
        return min(medians, key=lambda name: medians[name], default=None)

    def ratios(self, row: str) -> list[Ratio]:
        """Those that have targets: exact over its best peer, and ours over each other."""
        peer = self.best_peer(row)
        pairs = [(EXACT, peer)] if peer is not None else []
        pairs += [pair for pair, bounds in OVER_OURS.items() if row in bounds]
        return [ratio for ours, theirs in pairs if (ratio := self.ratio(row, ours, theirs)) is not None]

    def is_done(self, row: str) -> bool:
        """Whether another round would tell nothing more, or is one too many."""
        count = len(self.rows[row])
        return count >= ROUNDS_MAX or (count >= ROUNDS_MIN and all(map(is_settled, self.ratios(row))))

    def save(self, path: Path) -> None:
        """Write them, for a later run to add to."""
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.encode(self))


def ratio_of(row: str, ours: str, theirs: str, found: Sequence[float]) -> Ratio:
    """Of the ratios of single rounds."""
    median, interval = statistics.median(found), median_interval(found)
    spread = None if interval is None else (interval[1] - interval[0]) / 2 / median
    return Ratio(row, ours, theirs, len(found), median, interval, spread)


def saved_rounds(path: Path, made_by: dict[str, str]) -> Rounds:
    """Those of an earlier run. Raises CannotRun where there are none, or of something else."""
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=Rounds)
    except (OSError, msgspec.DecodeError):
        raise CannotRun(f"there are no rounds to add to in {path.name}: run without --add first") from None
    if other := [name for name in made_by if saved.made_by.get(name) != made_by[name]]:
        raise CannotRun(f"{path.name} has rounds with another {', '.join(other)}: run without --add")
    return saved


def engine_digest() -> str:
    """Of the engine's code."""
    folder = Path(embedmesh.engine.__file__).parent
    return hash_of(path for path in sorted(folder.rglob("*")) if path.suffix in {".py", ".c", ".h", ".so"})


def hash_of(paths: Iterable[Path]) -> str:
    """SHA-256 over files' contents, in order."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()
