"""What a run found: times by request and contender, differences and memory."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from bench.engine.figures import ST
from bench.engine.rounds import Rounds
from bench.rerank.field import GATEWAY, OURS, PEERS
from bench.rig.corpus import Name
from bench.rig.figures import Spread, Target, missed

OVER_PEERS = 1.5
DIFFERENCE_MAX = 1e-5  # of a logit of ours to CrossEncoder's
KINDS: dict[Name, str] = {
    "D": "29 tokens",  # on average, as M
    "M": "135 tokens",
    "X": "5 to 256 tokens",
    "P": "499 tokens",  # each: with the query as much as the model takes
}


class Ask(NamedTuple):
    """A request: how many documents of a kind. Of the `calls` in a round the median counts."""

    kind: Name
    documents: int
    calls: int = 1

    @property
    def words(self) -> str:
        """As tables have it."""
        return f"{self.documents:,} of {KINDS[self.kind]}"


FEW = (Ask("M", 1, 20), Ask("M", 10, 5))
HUNDRED = tuple(Ask(kind, 100) for kind in KINDS)
THOUSAND = tuple(Ask(kind, 1_000) for kind in KINDS if kind != "P")
LARGEST = Ask("P", 1_000)
JUDGED = (*HUNDRED, *THOUSAND, LARGEST)


class AskRow(msgspec.Struct, frozen=True):
    """What a request took a contender. `documents_per_s` is by the median."""

    request: str
    contender: str
    rounds: int
    best_ms: float
    median_ms: float
    documents_per_s: float


class RerankFigures(msgspec.Struct, frozen=True):
    """All of it. `difference` is the largest of a logit to CrossEncoder's; `left_out` says why by name.

    `peak_mb`: resident, while the largest request runs, as far as looks see it. `other_work`: the largest share of all
    cores that other processes took while a request went round.
    """

    machine: str
    threads: int
    other_work: float
    versions: dict[str, str]
    difference: dict[str, float]
    peak_mb: dict[str, float]
    requests: list[AskRow]
    left_out: dict[str, str]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """What was missed, and how much was not measured."""
        unmeasured = sum(target.verdict == "not measured" for target in self.targets)
        return [*missed(self.targets), *([f"{unmeasured} targets were not measured"] if unmeasured else [])]


def rows_of(asks: Sequence[Ask], rounds: Rounds, names: Sequence[str]) -> list[AskRow]:
    """A row for each request and contender that was measured."""
    found = []
    for ask in asks:
        for name in names:
            if taken := rounds.taken(ask.words, name):
                spread = Spread.of([1_000 * each for each in taken])
                rate = 1_000 * ask.documents / spread.median
                found.append(AskRow(ask.words, name, len(taken), spread.low, spread.median, rate))
    return found


def targets_of(
    asks: Sequence[Ask], rounds: Rounds, difference: Mapping[str, float], peak_mb: Mapping[str, float]
) -> list[Target]:
    """Ratios are taken round by round."""
    found = []
    for ask in asks:
        for peer in PEERS:
            both = [each for each in rounds.rows[ask.words] if GATEWAY in each and peer in each]
            ratio = Spread.of([each[peer] / each[GATEWAY] for each in both]) if both else None
            found.append(Target(f"{ask.words}: gateway over {peer}", OVER_PEERS, True, ratio, "x"))
    for name in OURS:
        most = Spread.of([difference[name]]) if name in difference and ST in difference else None
        found.append(Target(f"{name}: largest difference to CrossEncoder", DIFFERENCE_MAX, False, most))
    if LARGEST in asks:
        least = min((peak_mb[peer] for peer in PEERS if peer in peak_mb), default=None)
        share = None if least is None or GATEWAY not in peak_mb else Spread.of([peak_mb[GATEWAY] / least])
        found.append(Target("peak memory of gateway and node, over the least of the peers", 1.0, False, share, "x"))
    return found
