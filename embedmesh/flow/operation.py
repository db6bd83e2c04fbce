"""What differs by operation and by dialect, as the spine (`paid.serve`) sees it."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from embedmesh.flow.bill import Bill, Redeem
from embedmesh.flow.world import World
from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import Reply, RequestHead, StreamedReply
from embedmesh.rules.holds import Metered
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller

CanPay = Callable[[int], None]
"""Raises InsufficientQuota if the caller cannot pay that many tokens."""
CanPayFor = Callable[[Model], Awaitable[CanPay | None]]
"""`CanPay` for a model; None if only the ledger can say."""


class Bound(NamedTuple):
    """What a request may cost and take at most. `free` is its result if that is known already and costs nothing."""

    metered: tuple[Metered, ...]
    within_s: float  # for the work, all attempts together
    free: msgspec.Struct | None = None


class PayingLock(NamedTuple):
    """The lock that a request uses: its money is set aside already.

    `redeem` uses it, as `Locks.redeem` says. `kept`: whether there is room to keep the reply. `here`: whether the node
    is one of this gateway's.
    """

    terms: LockTerms
    redeem: Redeem
    kept: bool
    here: bool


class Invocation(Protocol):
    """One valid request of an operation. The spine calls its methods in this order, each at most once."""

    @property
    def model(self) -> Model:
        """The model that is asked for."""
        ...

    @property
    def user(self) -> str | None:
        """The caller's own id of the person behind the request; only a keyed hash of it is kept."""
        ...

    @property
    def lock(self) -> PayingLock | None:
        """The lock that pays, once the request is counted; None where money is still to be set aside."""
        ...

    @property
    def streams(self) -> bool:
        """Whether the reply is a stream. A stream is neither kept nor shared with a retry."""
        ...

    @property
    def reply_bytes_max(self) -> int:
        """The memory that the reply takes while it is made and read, in bytes."""
        ...

    def check_served(self, world: World) -> None:
        """Raise ModelNotFound if nothing serves the model and waiting would not help."""
        ...

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        """Count the tokens that the request takes from the key's limits. Raises a CallerFailure."""
        ...

    @property
    def kept_bytes(self) -> int:
        """The size of the result, if it is kept for an `Idempotency-Key` or a retry; known once it is counted."""
        ...

    def bound(self, world: World, caller: Caller, *, claimed: bool) -> Bound:
        """Bound the cost and the time. Raises a Failure if the work cannot begin soon.

        `claimed`: the request has an `Idempotency-Key`, so its result may be there already.
        """
        ...

    async def work(self, world: World, bill: Bill) -> Any:
        """Have the work done and say what it costs (`bill.owe`). Returns the result, or the stream's parts.

        A stream says what it owes again and again, as its parts are made.
        """
        ...

    def render(self, result: Any, headers: dict[str, str]) -> Reply | StreamedReply:
        """The reply, in the dialect of the request, with these headers and its own."""
        ...

    def paid(self, world: World, caller: Caller) -> None:
        """Remember what the work has taught: called in the step that captures, never before."""
        ...


class Operation(Protocol):
    """Something that callers can ask for, in one dialect."""

    @property
    def scope(self) -> str:
        """What the caller's key must be allowed to do."""
        ...

    @property
    def result(self) -> type[msgspec.Struct]:
        """The type of a result that is kept. Streams have none: they say `msgspec.Struct`."""
        ...

    @property
    def envelope(self) -> Callable[[Failure], bytes] | None:
        """How failures are told in this dialect; None for OpenAI's envelope."""
        ...

    def parse(self, world: World, head: RequestHead, body: bytes) -> Invocation:
        """Validate the request: pure. Raises a CallerFailure."""
        ...

    def price_min(self, world: World, account_id: str, model: Model | None) -> int:
        """The least price of a million tokens, in nano-USD: of this model, or of all."""
        ...

    def may_be_free(self, world: World, caller: Caller) -> bool:
        """Whether a request of this caller may cost nothing."""
        ...
