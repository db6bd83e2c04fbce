"""Everything outside that a paid request touches, handed in."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from embedmesh.flow.bill import waiters
from embedmesh.flow.cache import VectorCache
from embedmesh.flow.idempotency import Kept
from embedmesh.flow.retries import SingleFlight, Unread
from embedmesh.flow.turns import Turns
from embedmesh.rules.forwarding import Fleet, NodeClient, Observer
from embedmesh.rules.holds import Claim
from embedmesh.rules.jobs import Jobs
from embedmesh.rules.ports import (
    Catalogue,
    Clock,
    Decoder,
    Ledger,
    Prices,
    RateLimits,
    RememberedKeys,
    Slots,
    Tokenizer,
)
from embedmesh.rules.served import ORDINARY, ParseTerms
from embedmesh.rules.shares import Room, Shares

if TYPE_CHECKING:
    from embedmesh.flow.deliver import Done


class World(msgspec.Struct, frozen=True):
    """What the spine and the operations are given.

    `hash_user` hashes the field `user` with the store's secret; `claim_of` hashes an `Idempotency-Key` with its body.
    """

    keys: RememberedKeys
    rate_limits: RateLimits
    slots: Slots
    prices: Prices
    catalogue: Catalogue
    tokenizers: Mapping[str, Tokenizer]  # by model id
    cl100k: Decoder | None
    ledger: Ledger
    fleet: Fleet
    client: NodeClient
    observer: Observer
    clock: Clock
    single_flight: "SingleFlight[Done]"
    unread: "Unread[Kept]"
    replies: Shares  # bytes of replies that are being made or read
    cache: VectorCache
    hash_user: Callable[[str], str]
    claim_of: Callable[[str, bytes], Claim]
    terms: ParseTerms = ORDINARY
    turns: Turns = msgspec.field(default_factory=Turns)
    ask_max: int | None = None  # the most that a node is paid, in nano-USD per million tokens
    waiting: Room = msgspec.field(default_factory=waiters)  # requests that wait for the reply of another
    jobs: Jobs | None = None
