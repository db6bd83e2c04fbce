"""The requests: three kinds, from six accounts, at random moments.

The cost of a request is its tokens, and they are as unequal as in life: nearly nine in ten of the tokens are of the one
request in twenty that is *bulk*. All distributions are discrete, so their moments are known exactly; the check against
the formula for one queue rests on that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, pvariance
from typing import NamedTuple

import numpy as np

QUANTILES = 256  # equally likely lengths of a text


def _lengths(median: float, spread: float, low: int, high: int) -> list[int]:
    """Equally likely lengths in tokens: a lognormal distribution within bounds."""
    normal = NormalDist(np.log(median), spread)
    values = [round(float(np.exp(normal.inv_cdf((at + 0.5) / QUANTILES)))) for at in range(QUANTILES)]
    return [min(max(value, low), high) for value in values]


SHORT = _lengths(12, 0.4, 4, 40)  # questions and titles: 13 tokens on average
PASSAGE = _lengths(128, 0.35, 16, 256)  # pieces of documents: 136 on average, and what the default model takes at most


class Kind(NamedTuple):
    """One kind of request. The number of texts is Pareto of exponent 1 between its bounds: half of it up to about twice
    the least, and every doubling half as likely as the one before."""

    name: str
    share: float  # of the requests
    texts_min: int
    texts_max: int
    lengths: Sequence[int]

    def texts(self, uniform: float) -> int:
        """The number of texts for a number in [0, 1)."""
        low, high = self.texts_min, self.texts_max + 1
        return int(low / (1.0 - uniform * (1.0 - low / high)))

    def moments(self) -> tuple[float, float]:
        """Of a request's tokens: the mean, and the mean of the square."""
        low, high = self.texts_min, self.texts_max + 1
        below = [(1 - low / texts) / (1 - low / high) for texts in range(low, high + 1)]
        likely = np.diff(below)
        texts = np.arange(low, high)
        mean, variance = fmean(self.lengths), pvariance(self.lengths)
        return float(likely @ texts * mean), float(likely @ (texts**2 * mean**2 + texts * variance))


SMALL = Kind("small", 0.60, 1, 1, SHORT)
CHUNKS = Kind("chunks", 0.35, 4, 32, PASSAGE)  # a document: 540 to 4,400 tokens, 1,300 on average
BULK = Kind("bulk", 0.05, 200, 2_048, PASSAGE)  # an index: 27,000 to 278,000 tokens, 70,000 on average
KINDS = (SMALL, CHUNKS, BULK)

NOISY = "noisy"
ACCOUNTS = {NOISY: 0.5, **{f"light {number}": 0.1 for number in range(1, 6)}}  # shares of the requests


@dataclass(eq=False, slots=True)
class Request:
    """One request, and how it ended."""

    number: int
    at: float  # when it comes
    account: str
    kind: Kind
    lengths: list[int]
    tokens: int
    ended_at: float = -1.0
    failed: bool = False
    tried: set[int] = field(default_factory=set)  # nodes, by number: for routers that try again


def moments() -> tuple[float, float]:
    """Of the tokens of any request: the mean, and the mean of the square."""
    each = [(kind.share, *kind.moments()) for kind in KINDS]
    return sum(share * mean for share, mean, _ in each), sum(share * square for share, _, square in each)


class Trace:
    """Requests, the same for every contender; `at` makes them come at any rate."""

    def __init__(self, count: int, seed: int) -> None:
        dice = np.random.default_rng(seed)
        self._waits = dice.exponential(1.0, count)
        self._accounts = dice.choice(list(ACCOUNTS), count, p=list(ACCOUNTS.values())).tolist()
        self._kinds = [KINDS[at] for at in dice.choice(len(KINDS), count, p=[kind.share for kind in KINDS])]
        counts = [kind.texts(uniform) for kind, uniform in zip(self._kinds, dice.random(count), strict=True)]
        tables = {kind.name: np.array(kind.lengths) for kind in KINDS}
        self._lengths = [
            tables[kind.name][dice.integers(0, QUANTILES, texts)].tolist()
            for kind, texts in zip(self._kinds, counts, strict=True)
        ]
        self._tokens = [sum(lengths) for lengths in self._lengths]
        self._flood = dice.random(count)
        self.mean_tokens = fmean(self._tokens)  # of these requests: chance makes it differ by a few percent

    def at(self, per_s: float, flood: float = 1.0) -> list[Request]:
        """Poisson arrivals. With a `flood` the noisy account's requests come that many times as often while the
        middle third of all arrives, and the others' as before."""
        waits = self._waits / per_s
        count = len(waits)
        accounts = self._accounts
        if flood != 1.0:
            share = ACCOUNTS[NOISY]
            faster = share * flood + 1 - share
            middle = slice(count // 3, 2 * count // 3)
            waits[middle] /= faster
            light = [name for name in ACCOUNTS if name != NOISY]
            accounts = list(accounts)
            for number in range(*middle.indices(count)):
                drawn = self._flood[number] * faster / share
                accounts[number] = NOISY if drawn < flood else light[number % len(light)]
        return [
            Request(number, float(when), account, kind, lengths, tokens)
            for number, (when, account, kind, lengths, tokens) in enumerate(
                zip(np.cumsum(waits), accounts, self._kinds, self._lengths, self._tokens, strict=True)
            )
        ]
