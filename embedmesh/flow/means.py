"""What a caller can pay, asked before work that is large: who cannot pay the least that it may cost is told so at once.

The ledger decides, when money is held; what is said here is the same, earlier. A request that may cost nothing is not
judged: one that is answered from what the account has in the cache, or whose reply was paid before.
"""

from typing import NamedTuple, TypeVar

from embedmesh.flow.cache import VectorCache
from embedmesh.flow.retries import Asked, SingleFlight, Unread
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import InsufficientQuota
from embedmesh.rules.money import cost_nanousd, format_usd
from embedmesh.rules.ports import Caller

R = TypeVar("R")


class Means(NamedTuple):
    """`available` nano-USD for tokens of `price` nano-USD per million."""

    available: int
    price: int

    def check(self, tokens: int) -> None:
        """Raise InsufficientQuota where so many cannot be paid."""
        cost = cost_nanousd(tokens, self.price)
        if cost > max(0, self.available):  # what costs nothing is for the ledger to refuse
            raise InsufficientQuota(
                "The account's balance, or this API key's budget, does not cover this request: it needs at least "
                f"{format_usd(cost)}, and {format_usd(max(0, self.available))} is available. Add credit."
            )


def may_be_free(
    asked: Asked, caller: Caller, body: bytes, cache: VectorCache, single_flight: SingleFlight[R], unread: Unread
) -> bool:
    """Whether the request may be answered without new money. An Idempotency-Key is for the ledger to look up."""
    if caller.cache is CachePolicy.FREE and cache.has(caller.account_id):
        return True
    if asked.retries is None or not asked.retries:
        return False
    return single_flight.under_way(caller, body) or unread.find(caller, body) is not None
