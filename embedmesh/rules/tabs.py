"""A tab's life. A tab is a durable hold that covers several requests of one key at one gateway.

It is opened under the same conditions as a hold, spent in its gateway's memory, settled in batches, and ends exactly
once; what was not spent goes back then. A settlement is accepted until it has ended, and changes nothing afterwards.
"""

from enum import Enum

import msgspec


class TabState(Enum):
    """Where a tab stands. The last three are final."""

    OPEN = "open"  # its gateway spends it
    CLOSING = "closing"  # nothing new is spent: what is under way is settled, then it closes
    CLOSED = "closed"
    EXPIRED = "expired"
    RECOVERED = "recovered"

    @property
    def live(self) -> bool:
        """Whether money is held under it, and requests can be settled."""
        return self in (TabState.OPEN, TabState.CLOSING)


class TabMove(Enum):
    """What moves a tab on."""

    RECALL = "recall"  # a hold needs its money
    CLOSE = "close"  # its gateway has settled all that was spent
    EXPIRE = "expire"  # its deadline passed without a word from its gateway
    RECOVER = "recover"  # its gateway died; whatever was in flight is not charged


MOVES: dict[tuple[TabState, TabMove], TabState] = {
    (TabState.OPEN, TabMove.RECALL): TabState.CLOSING,
    (TabState.OPEN, TabMove.CLOSE): TabState.CLOSED,
    (TabState.OPEN, TabMove.EXPIRE): TabState.EXPIRED,
    (TabState.OPEN, TabMove.RECOVER): TabState.RECOVERED,
    (TabState.CLOSING, TabMove.CLOSE): TabState.CLOSED,
    (TabState.CLOSING, TabMove.EXPIRE): TabState.EXPIRED,
    (TabState.CLOSING, TabMove.RECOVER): TabState.RECOVERED,
}
"""What is not in this table cannot happen; the store's SQL is checked against it by a test."""

SHARE_OF_MONEY = 64  # a tab is at most this part of what is left: as many gateways and keys can have one each


class Tab(msgspec.Struct, frozen=True):
    """A tab that a gateway wants to open, or has: of one key, until a deadline (Unix time in milliseconds)."""

    tab_id: str
    account_id: str
    key_id: str
    deadline_ms: int
