"""What the flow needs of the world, as protocols. Whatever decides takes its clock, dice and store as arguments."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

import msgspec

from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import Failure
from embedmesh.rules.holds import Charge, Hold, HoldEnd
from embedmesh.rules.models import Model


class Clock(Protocol):
    """Two clocks: one that never jumps, to measure spans; one that agrees with other machines, for deadlines."""

    def monotonic(self) -> float:
        """Seconds; only differences mean anything."""
        ...

    def unix_ms(self) -> int:
        """Milliseconds since 1970."""
        ...


class Dice(Protocol):
    """Chance, handed in so that a test can replay it."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


class Caller(msgspec.Struct, frozen=True):
    """Who asks: a key of an account, and what that key may do."""

    account_id: str
    key_id: str
    scopes: frozenset[str]


class Keys(Protocol):
    """Which bearer keys are good now."""

    def find(self, token: str) -> Caller | None:
        """The caller behind a key, or None whatever is wrong with it. Malformed keys die without a query.

        Raises StoreUnavailable where keys cannot be looked up.
        """
        ...


class Ledger(Protocol):
    """Holds and what becomes of them. Amounts are nano-USD."""

    async def hold(self, hold: Hold) -> None:
        """Durably set money aside, or raise InsufficientQuota or StoreUnavailable; then nothing stays held.

        Nor when it is cancelled: the caller may go while the hold is being written.
        """
        ...

    def capture(self, hold: Hold, charge: Charge) -> None:
        """End an open hold by charging it; written with the next batch, in order after its hold."""
        ...

    def release(self, hold: Hold, why: HoldEnd) -> None:
        """End an open hold without charging; written with the next batch. Harmless after a capture."""
        ...

    def healthy(self) -> bool:
        """Whether the store took the last thing it was asked to write."""
        ...


class Catalogue(Protocol):
    """The operator's models."""

    @property
    def models(self) -> Sequence[Model]:
        """All of them, in the catalogue's order."""
        ...

    def find(self, name: str) -> Model | None:
        """The model of that id, alias, or id or alias with a tier suffix (`:exact`), or None."""
        ...


class Tokenizer(Protocol):
    """A model's own tokenizer. No padding, no truncation."""

    @property
    def specials(self) -> int:
        """How many special tokens the model adds to each input."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that only the model itself may place."""
        ...

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """One list of ids a text, without special tokens. May take long: call it off the event loop for long texts."""
        ...


class Decoder(Protocol):
    """Turns token ids of a foreign vocabulary back into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Raise ValueError, in words for the caller, for an id that is special or out of the vocabulary."""
        ...


class Candidate(msgspec.Struct, frozen=True):
    """A node that may take the work, and when it would be done: seconds from now, from its load and learned speed."""

    node_id: str
    address: str
    expected_s: float


class Fleet(Protocol):
    """Which nodes there are, how loaded they are, and which to ask."""

    def serves(self, model: Model) -> bool:
        """Whether a live node serves the model now."""
        ...

    def pick(self, model: Model, tokens: int, tried: Collection[str]) -> Candidate | None:
        """The live node that would be done first, those already tried left out; None when there is none."""
        ...

    def began(self, node_id: str, tokens: int) -> None:
        """An attempt of that many tokens is on its way."""
        ...

    def ended(self, node_id: str, tokens: int, seconds: float, failure: Failure | None) -> None:
        """It ended: well, or with what went wrong. Called once for each `began`, also when the caller has gone."""
        ...

    def abandoned(self, node_id: str, tokens: int) -> None:
        """It was given up for a reason that says nothing about the node. In place of `ended`."""
        ...


class NodeClient(Protocol):
    """One exchange with one node."""

    async def embed(self, candidate: Candidate, model: Model, ids: list[list[int]]) -> EmbedVectors:
        """What the node says, not yet checked. Raises a NodeFailure."""
        ...


class Answer(msgspec.Struct, frozen=True):
    """A checked answer: little-endian float32, `width` components an input, row after row."""

    data: bytes
    width: int
    node_id: str


Verify = Callable[[EmbedVectors, Model, Counted], None]
"""Returns for a right answer; raises WrongAnswer for any other."""


class Reply(msgspec.Struct, frozen=True):
    """A whole reply for a caller, always status 200."""

    headers: dict[str, str]
    body: bytes


Deliver = Callable[[Reply], Awaitable[None]]
"""Hand a reply to the caller's socket; returns when its last byte is in the kernel, raises if it never got there."""
