"""Routers of others, as they are commonly built: each request goes at once to a node of the router's choice, and waits
there. They know what a router of requests can know: what it has sent where, and what came back.
"""

from collections.abc import Callable, Set
from random import Random

import numpy as np

from embedmesh.fleet.candidates import FULL_SCAN_NODES_MAX
from embedmesh.fleet.choose import TIE
from embedmesh.fleet.load import Load

Nobody: Set[int] = frozenset()


class Router:
    """Chooses; `shut` are nodes that have failed this request. Times are virtual seconds."""

    def __init__(self, nodes: int, dice: Random) -> None:
        self.nodes = nodes
        self._dice = dice

    def pick(self, tokens: int, shut: Set[int], now: float) -> int:
        raise NotImplementedError

    def began(self, node: int, tokens: int, now: float) -> None:
        """A request was sent there."""

    def ended(self, node: int, tokens: int, now: float, took_s: float, well: bool) -> None:
        """It is back."""

    def _any(self, shut: Set[int]) -> int:
        while True:
            node = int(self._dice.random() * self.nodes)
            if node not in shut:
                return node

    def _two(self, shut: Set[int]) -> tuple[int, int]:
        first = self._any(shut)
        return first, self._any(shut | {first}) if len(shut) + 1 < self.nodes else first


class RoundRobin(Router):
    """One after another."""

    _last = -1

    def pick(self, tokens: int, shut: Set[int], now: float) -> int:
        while True:
            self._last = (self._last + 1) % self.nodes
            if self._last not in shut:
                return self._last


class Chance(Router):
    """Any."""

    def pick(self, tokens: int, shut: Set[int], now: float) -> int:
        return self._any(shut)


class TwoChoices(Router):
    """Of two at random, the one with fewer requests outstanding (Mitzenmacher, 2001)."""

    def __init__(self, nodes: int, dice: Random) -> None:
        super().__init__(nodes, dice)
        self._requests = [0] * nodes

    def pick(self, tokens: int, shut: Set[int], now: float) -> int:
        first, second = self._two(shut)
        return first if self._requests[first] <= self._requests[second] else second

    def began(self, node: int, tokens: int, now: float) -> None:
        self._requests[node] += 1

    def ended(self, node: int, tokens: int, now: float, took_s: float, well: bool) -> None:
        self._requests[node] -= 1


class _Least(Router):
    """Of all, the one with least outstanding; equal ones by dice."""

    def __init__(self, nodes: int, dice: Random) -> None:
        super().__init__(nodes, dice)
        self._outstanding = np.zeros(nodes, dtype=np.int64)

    def pick(self, tokens: int, shut: Set[int], now: float) -> int:
        outstanding = self._outstanding
        if shut:
            outstanding = outstanding.copy()
            outstanding[list(shut)] = np.iinfo(np.int64).max
        least = np.flatnonzero(outstanding == outstanding.min())
        return int(least[int(self._dice.random() * len(least))])


class LeastRequests(_Least):
    """Fewest requests outstanding."""

    def began(self, node: int, tokens: int, now: float) -> None:
        self._outstanding[node] += 1

    def ended(self, node: int, tokens: int, now: float, took_s: float, well: bool) -> None:
        self._outstanding[node] -= 1


class LeastTokens(_Least):
    """Fewest tokens outstanding."""

    def began(self, node: int, tokens: int, now: float) -> None:
        self._outstanding[node] += tokens

    def ended(self, node: int, tokens: int, now: float, took_s: float, well: bool) -> None:
        self._outstanding[node] -= tokens


DECAY_S = 10.0  # Finagle's and Linkerd's default
UNKNOWN_S = 1.0  # what a node is thought to take that has something outstanding, and never answered


class PeakEwma(TwoChoices):
    """Of two at random, the one with the smaller product of latency and (requests outstanding, plus one). The latency
    is an average that jumps up to each peak and decays from there, by time (Finagle's `p2cPeakEwma`, and Linkerd's).
    """

    def __init__(self, nodes: int, dice: Random) -> None:
        super().__init__(nodes, dice)
        self._latency_s = [0.0] * nodes
        self._seen_at = [0.0] * nodes

    def pick(self, tokens: int, shut: Set[int], now: float) -> int:
        first, second = self._two(shut)
        return first if self._cost(first, now) <= self._cost(second, now) else second

    def ended(self, node: int, tokens: int, now: float, took_s: float, well: bool) -> None:
        super().ended(node, tokens, now, took_s, well)
        self._see(node, took_s, now)

    def _cost(self, node: int, now: float) -> float:
        self._see(node, 0.0, now)
        latency_s, outstanding = self._latency_s[node], self._requests[node]
        return (latency_s if latency_s or not outstanding else UNKNOWN_S) * (outstanding + 1)

    def _see(self, node: int, latency_s: float, now: float) -> None:
        known_s = self._latency_s[node]
        kept = float(np.exp((self._seen_at[node] - now) / DECAY_S))
        self._latency_s[node] = max(latency_s, known_s * kept + latency_s * (1 - kept))
        self._seen_at[node] = now


class ExpectedFinish(Router):
    """When it would be done there, by our own measure of load, but chosen at once: the scheduler without its queue."""

    def __init__(self, nodes: int, dice: Random) -> None:
        super().__init__(nodes, dice)
        self._loads = [Load() for _ in range(nodes)]

    def pick(self, tokens: int, shut: Set[int], now: float) -> int:
        looked_at = range(self.nodes) if self.nodes <= FULL_SCAN_NODES_MAX else self._two(shut)
        finish_s = {node: self._loads[node].finish_s(tokens, now) for node in looked_at if node not in shut}
        limit_s = min(finish_s.values()) * TIE
        good = [node for node, each_s in finish_s.items() if each_s <= limit_s]
        return good[int(self._dice.random() * len(good))]

    def began(self, node: int, tokens: int, now: float) -> None:
        self._loads[node].began(tokens, now)

    def ended(self, node: int, tokens: int, now: float, took_s: float, well: bool) -> None:
        self._loads[node].ended(tokens, now, well=well)


ROUTERS: dict[str, Callable[[int, Random], Router]] = {
    "round robin": RoundRobin,
    "random": Chance,
    "two choices": TwoChoices,
    "least requests": LeastRequests,
    "least tokens": LeastTokens,
    "peak EWMA": PeakEwma,
    "expected finish": ExpectedFinish,
}
