"""What a row is tried on: a gateway in front of two nodes, a third server that nobody may ask, and the truth."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.conformance.caller import Answer, Broken, NotClaimed, Target, check_right
from bench.conformance.node import ConformanceNode, Truth

REQUESTS = 12  # of a row about a node that fails: each node gets half of them, more or less
REQUESTS_MAX = 60  # until the node in question has been asked
AT_ONCE = 4

RIGHT = "right"
_NUMBERS = itertools.count()


def fresh() -> str:
    """A text that was never sent before, so that no cache knows it."""
    return f"Sentence number {next(_NUMBERS)} of the conformance run, about a harbour."


@dataclass
class Bed:
    """`money` tells requests and tokens that were charged so far, where there is money at all. `keys`, `lists` and
    `repeats` say whether it claims to check keys, to list models, and to know an Idempotency-Key; `hides_key` that the
    nodes do not check the same key. `rejoin` has the first node join as a new one.
    """

    target: Target
    first: ConformanceNode
    second: ConformanceNode
    third: ConformanceNode
    truth: Truth
    keys: bool = False
    hides_key: bool = True
    lists: bool = True
    money: Callable[[], tuple[int, int]] | None = None
    rejoin: Callable[[], None] | None = None
    repeats: bool = False

    @property
    def nodes(self) -> tuple[ConformanceNode, ConformanceNode]:
        """Both that it may ask."""
        return self.first, self.second

    def check_embeds(self, texts: list[str], encoding: str = "base64", **more: Any) -> Answer:
        """The answer to these texts. Raises Broken unless it is right."""
        answer = self.target.embed(texts, encoding_format=encoding, **more)
        check_right(answer, self.truth.vectors(texts), encoding)
        return answer

    @contextmanager
    def both(self, fault: str) -> Iterator[None]:
        """Both nodes in this fault."""
        with self.first.being(fault), self.second.being(fault):
            yield

    def several(self, encoding: str = "base64", count: int = REQUESTS) -> Counter[str]:
        """What came of requests with two texts each, sent a few at a time: `right`, or words."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return Counter(pool.map(lambda _: self._one(encoding), range(count)))

    def _one(self, encoding: str) -> str:
        try:
            self.check_embeds([fresh(), fresh()], encoding)
        except Broken as what:
            return str(what)
        return RIGHT

    def several_until_met(self, encoding: str = "base64") -> Counter[str]:
        """The same, until the first node has been wrong at least once. Raises Broken."""
        found: Counter[str] = Counter()
        while found.total() < REQUESTS_MAX:
            found += self.several(encoding)
            if self.first.met:
                return found
        raise Broken("the node was never asked")

    def need_keys(self) -> None:
        """Raises NotClaimed where it checks no keys."""
        if not self.keys:
            raise NotClaimed

    def need_list(self) -> None:
        """Raises NotClaimed where it lists no models."""
        if not self.lists:
            raise NotClaimed

    def need_money(self) -> Callable[[], tuple[int, int]]:
        """Raises NotClaimed where it charges nothing."""
        if self.money is None:
            raise NotClaimed
        return self.money


def settle(bed: Bed, within_s: float) -> bool:
    """Whether both nodes get work within that time, each honest again."""
    ended = threading.Event()
    watch = threading.Timer(within_s, ended.set)
    watch.start()
    try:
        while not ended.is_set():
            with bed.both("honest"):
                found = bed.several(count=AT_ONCE)
                if (
                    all(any(seen.from_caller for seen in node.seen) for node in bed.nodes)
                    and found[RIGHT] == found.total()
                ):
                    return True
            ended.wait(0.2)
        return False
    finally:
        watch.cancel()
