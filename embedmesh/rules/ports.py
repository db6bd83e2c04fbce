"""What the flow needs of the world, as protocols. Whatever decides takes its clock, dice and store as arguments."""

from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Protocol

import msgspec

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, PriorRequest
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


class Above(msgspec.Struct, frozen=True):
    """A key from whose limits a minute those draw that it made. None is: no limit."""

    key_id: str
    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None


class Caller(msgspec.Struct, frozen=True):
    """Who asks: a key of an account, and what that key may do.

    `models` are those that it may use, by id; None is: all. None of a limit is: no limit. `cache` is the account's.
    `above` are the limited keys among those that it was made by, the nearest first.
    """

    account_id: str
    key_id: str
    scopes: frozenset[str]
    models: frozenset[str] | None = None
    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None
    cache: CachePolicy = CachePolicy.OFF
    above: tuple[Above, ...] = ()


class Keys(Protocol):
    """Which bearer keys are good now."""

    async def find(self, token: str) -> Caller | None:
        """The caller behind a key, or None whatever is wrong with it. Malformed keys die without a query.

        Raises StoreUnavailable where keys cannot be looked up, Overloaded where too many wait to be.
        """
        ...


class RateLimit(msgspec.Struct, frozen=True):
    """A limit of a key or one above, `requests` or `tokens` a minute: what is left, and seconds until it is whole."""

    what: str
    limit: int
    left: int
    reset_s: float


class RateLimits(Protocol):
    """How often a key may ask, and for how many tokens, in a minute. Nothing that was taken is given back."""

    async def take_request(self, caller: Caller) -> None:
        """Raises RateLimited, also where no token is left, or StoreUnavailable."""
        ...

    async def take_tokens(self, caller: Caller, tokens: int) -> None:
        """Raises RateLimited or StoreUnavailable."""
        ...

    def spend_tokens(self, caller: Caller, tokens: int) -> None:
        """Take tokens for work that was done in vain; where there are too few, all that
        are left. Takes nothing for fewer than one. Must not wait."""
        ...

    def left(self, caller: Caller) -> tuple[RateLimit, ...]:
        """The limit of requests and that of tokens of which least is left, as far as this gateway knows."""
        ...


class Prices(Protocol):
    """What tokens cost."""

    def of(self, model: Model, account_id: str) -> int:
        """Nano-USD per million tokens of a model, for an account, now."""
        ...


class Ledger(Protocol):
    """Holds and what becomes of them. Amounts are nano-USD."""

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        """Durably set money aside, or raise InsufficientQuota, RateLimited or StoreUnavailable; nothing is held then.

        Nor when it is cancelled: the caller may go while the hold is being written. Nor where another request answers
        for the `claim` already: that one is returned.
        """
        ...

    async def available_nanousd(self, account_id: str, key_id: str) -> int:
        """What a hold for the key may be at most now: of the account's money and of the key's budgets the least.

        Whatever was released before is counted. Raises StoreUnavailable.
        """
        ...

    async def prior_request(self, hold: Hold, claim: Claim) -> PriorRequest | None:
        """The request that answers for a claim of the hold's account now. Raises StoreUnavailable."""
        ...

    async def kept_bytes(self, account_id: str) -> int:
        """How many bytes of an account's replies are kept. Raises StoreUnavailable."""
        ...

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        """End an open hold by charging it; written with the next batch, in order after its hold.

        `reply` is kept with it, for the claim that the hold was placed with.
        """
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
        """Ids that only the model itself may ticket."""
        ...

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """One list of ids a text, without special tokens. May take long: call it off the event loop for long texts."""
        ...

    def soon(self, texts: Sequence[str]) -> list[list[int]] | None:
        """The same, where they are found within about a millisecond whatever the texts are; else None."""
        ...

    def next_cut(self, text: str, start: int) -> int | None:
        """Where the next piece of a text ends, from where the last one ended: the ids of all pieces are the text's.

        None where that piece would be too large to be looked at.
        """
        ...

    def clip(self, text: str, tokens: int, *, end: bool) -> str:
        """The piece of `text` that its first `tokens` tokens stand for, or its last where its `end` is to be kept."""
        ...


class Decoder(Protocol):
    """Turns token ids of a foreign vocabulary back into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Raise ValueError, in words for the caller, for an id that is special or out of the vocabulary."""
        ...


class Part(msgspec.Struct, frozen=True, eq=False):
    """Some inputs of a request, for one node: what one attempt asks for.

    `places` says which inputs; `tokens` counts theirs; `expected_s` is when the node should be done, in seconds from
    when the part was given to it; `ask` is what the node wants for it, in nano-USD per million tokens.
    """

    node_id: str
    places: tuple[int, ...]
    tokens: int
    expected_s: float
    ask: int = 0


class Asker(Protocol):
    """Who waits in line for nodes. Called back at once or later; must not wait."""

    def take(self, part: Part) -> None:
        """These inputs are to be asked of that node now. Whoever takes a part says how it `ended`."""
        ...

    def give_up(self, last: NodeFailure | None) -> None:
        """No node is left for some of the inputs; `last` is why the last one failed, if any was asked."""
        ...


class Ticket(Protocol):
    """A request's place in line."""

    def ended(self, part: Part, failure: NodeFailure | None) -> bool:
        """A part was answered right, or failed. Whether what failed waits in line again, for another node."""
        ...

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        """A part was given up for a reason that says no ill of the node. In place of `ended`.

        With `late` the request's time was over: that says how slow the node is at least.
        """
        ...

    def may_ask_another(self, part: Part) -> bool:
        """Whether another node would be asked for a part that is late, if it ended now."""
        ...

    def hedge_after_s(self, part: Part) -> float | None:
        """How long to wait for a part before another node is asked, too; None to wait for this one only."""
        ...

    def hedge(self, part: Part) -> None:
        """A part is late: perhaps another node gets it, too."""
        ...

    def leave(self) -> None:
        """Want no more parts. Those that were taken still end."""
        ...


class Fleet(Protocol):
    """Which nodes there are, how loaded they are, and which to ask."""

    def serves(self, model: Model) -> bool:
        """Whether a live node serves the model now."""
        ...

    def may_come(self, model: Model) -> bool:
        """Whether waiting for a node may help: one has served the model, or has yet to say what it serves."""
        ...

    def may_wait(self, model: Model, tokens: int, account_id: str) -> None:
        """Raises Overloaded where too much of the account's is waiting already."""
        ...

    def expected_s(self, model: Model, tokens: int) -> float | None:
        """Seconds until a request of so many tokens would be done, behind all that waits; None without a node."""
        ...

    def enter(self, model: Model, counted: Counted, account_id: str, asker: Asker) -> Ticket:
        """Stand in line. Parts come at once where a node has room. Raises Overloaded. End by leaving the ticket."""
        ...


class NodeClient(Protocol):
    """One exchange with one node."""

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        """What the node says of a part of what was counted, not yet checked. Raises a NodeFailure.

        `request_id` is our own, the hold's; it is the same for all parts and attempts of a request.
        """
        ...


class Share(msgspec.Struct, frozen=True):
    """What one node did of a request, and what it wants for it, in nano-USD per million tokens."""

    node_id: str
    tokens: int
    ask: int = 0


class Observer(Protocol):
    """Sees what nodes answer to callers."""

    def answered(self, model: Model, counted: Counted, part: Part, reply: EmbedVectors) -> None:
        """A right answer, as far as one can tell by itself. Must not wait."""
        ...


class Answer(msgspec.Struct, frozen=True):
    """A checked answer: little-endian float32, `width` components an input, row after row.

    `tokens` were really embedded; `shares` says by whom, the node that did most first.
    """

    data: bytes
    width: int
    tokens: int
    shares: tuple[Share, ...]


Verify = Callable[[EmbedVectors, Model, Part, bool], None]
"""Answer, model, what was asked, and whether its tokens were counted exactly or are a bound. Raises WrongAnswer."""


REQUEST_HEADER = "x-embedmesh-request"  # our own id of the request, as the ledger has it


class Reply(msgspec.Struct, frozen=True):
    """A whole reply for a caller, always status 200."""

    headers: dict[str, str]
    body: bytes


class Delivery(Enum):
    """How the delivery of a reply ended that the caller has to pay for: something of its body is in the kernel."""

    WHOLE = "whole"  # to its last byte
    BROKEN_OFF = "broken_off"  # the caller closed, reset or did not read


Deliver = Callable[[Reply], Awaitable[Delivery]]
"""Hand a reply to the caller's socket. Raises where nothing of its body got there, or we end it ourselves."""
