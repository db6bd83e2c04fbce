"""What a caller can pay, asked before work that is large: if it cannot pay the least cost, it is refused at once.

The ledger decides when money is held; this is the same answer, earlier.
"""

from typing import NamedTuple

from embedmesh.rules.errors import InsufficientQuota
from embedmesh.rules.money import cost_nanousd, format_usd


class Means(NamedTuple):
    """`available` nano-USD for tokens of `price` nano-USD per million."""

    available: int
    price: int

    def check(self, tokens: int) -> None:
        """Raise InsufficientQuota if that many tokens cannot be paid."""
        cost = cost_nanousd(tokens, self.price)
        if cost > max(0, self.available):  # what costs nothing is for the ledger to refuse
            raise InsufficientQuota(
                "The account's balance, or this API key's budget, does not cover this request: it needs at least "
                f"{format_usd(cost)}, and {format_usd(max(0, self.available))} is available. Add credit."
            )
