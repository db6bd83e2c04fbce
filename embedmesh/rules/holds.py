"""A hold's life. Every hold ends exactly once: captured or released.

A hold sets aside money for one request before any node is asked. It is written durably first, so that no work is done
for money that is not there, and no crash can lose track of it.
"""

from enum import Enum

import msgspec


class HoldState(Enum):
    """Where a hold stands. `CAPTURED` and `RELEASED` are final."""

    OPEN = "open"
    CAPTURED = "captured"
    RELEASED = "released"


class HoldEnd(Enum):
    """What ends a hold."""

    CAPTURE = "capture"  # the reply was delivered: whole, or broken off by the caller after its first byte
    RELEASE = "release"  # no reply was delivered, or we broke it off
    EXPIRE = "expire"  # its deadline passed without a word from its gateway
    RECOVER = "recover"  # its gateway died; whatever was in flight is not charged
    EXPIRE_NOTED = "expire_noted"  # its deadline passed; what was noted of its stream is charged
    RECOVER_NOTED = "recover_noted"  # its gateway died; what was noted of its stream is charged


MOVES: dict[tuple[HoldState, HoldEnd], HoldState] = {
    (HoldState.OPEN, HoldEnd.CAPTURE): HoldState.CAPTURED,
    (HoldState.OPEN, HoldEnd.RELEASE): HoldState.RELEASED,
    (HoldState.OPEN, HoldEnd.EXPIRE): HoldState.RELEASED,
    (HoldState.OPEN, HoldEnd.RECOVER): HoldState.RELEASED,
    (HoldState.OPEN, HoldEnd.EXPIRE_NOTED): HoldState.CAPTURED,
    (HoldState.OPEN, HoldEnd.RECOVER_NOTED): HoldState.CAPTURED,
}
"""What is not in this table cannot happen; the store's SQL is checked against it by a test."""

NOTED = {HoldEnd.EXPIRE: HoldEnd.EXPIRE_NOTED, HoldEnd.RECOVER: HoldEnd.RECOVER_NOTED}
"""By what ends a hold without its gateway: what that is called where the hold has a note."""


class Hold(msgspec.Struct, frozen=True):
    """Money set aside for one request. `hold_id` is our own request id; deadline is Unix time in milliseconds.

    `tab_id` names the tab of which it is a part; None: it is written in the store by itself.
    """

    hold_id: str
    account_id: str
    amount_nanousd: int
    deadline_ms: int
    key_id: str | None = None
    tab_id: str | None = None


class Claim(msgspec.Struct, frozen=True):
    """That a request came with an `Idempotency-Key`: keyed hashes of that key and of the body, 32 bytes each."""

    key_hash: bytes
    body_hash: bytes


class PriorRequest(msgspec.Struct, frozen=True):
    """The request that came first with an `Idempotency-Key`: where its hold stands, and its reply once it is kept."""

    body_hash: bytes
    hold_id: str
    state: str
    reply: bytes | None


class Payable(msgspec.Struct, frozen=True):
    """What a node gets of a captured hold."""

    node_id: str
    nanousd: int


class Meter(Enum):
    """What a request is charged for."""

    INPUT = "input"  # tokens that are sent
    CACHED = "cached"  # tokens of the input that were known already
    OUTPUT = "output"  # tokens that are made
    IMAGES = "images"
    SEARCHES = "searches"  # of a reranker that is priced so: a query with up to a hundred documents


NOT_TOKENS = (Meter.IMAGES, Meter.SEARCHES)


class Metered(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """A quantity of one meter, at its price in nano-USD per million. `estimated`: it is our count, not the node's."""

    meter: Meter
    quantity: int
    price: int
    estimated: bool = False


class Charge(msgspec.Struct, frozen=True):
    """What a captured hold was for. `cost_nanousd` is at most the hold's amount; the usage record keeps the rest.

    `node_id` is the node that did most of it; `payables`, at most one a node, are together at most the cost. `price` is
    in nano-USD per million tokens. Where a request has other meters than tokens of one price, `meters` names them all,
    `tokens` is their sum without images and searches, and `price` is None.
    """

    cost_nanousd: int
    tokens: int
    model: str
    key_id: str
    node_id: str
    user_hash: str | None = None
    price: int | None = None
    meters: tuple[Metered, ...] = ()
    payables: tuple[Payable, ...] = ()

    def is_sound(self, amount_nanousd: int) -> bool:
        """Whether a hold of that amount can be captured for it: nothing is negative, each part is within the whole."""
        shares = [payable.nanousd for payable in self.payables]
        nodes = {payable.node_id for payable in self.payables}
        return (
            0 <= sum(shares) <= self.cost_nanousd <= amount_nanousd
            and len(nodes) == len(shares)
            and all(number >= 0 for number in (self.tokens, self.price or 0, *shares))
            and not (self.meters and self.price is not None)
        )


class StreamNote(msgspec.Struct, frozen=True):
    """What a stream has delivered by now, as its `charge`, and until when its hold shall last (Unix milliseconds).

    A hold whose gateway dies or falls silent is captured at its last durable note.
    """

    hold: Hold
    charge: Charge
    deadline_ms: int
