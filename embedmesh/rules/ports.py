"""What the flow needs of the world, as protocols. Code that decides takes its clock, dice and store as arguments."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.embeddings import Ids
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, Meter, PriorRequest, StreamNote
from embedmesh.rules.models import Model

EMBED_SCOPE = "embeddings"


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
    """A key whose limits a minute are shared by the keys that it made. None is no limit."""

    key_id: str
    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None


class SlotLimit(msgspec.Struct, frozen=True):
    """How many requests may be under way at one time, for a key and those whose place it took. `above`: not its own."""

    place_id: str
    limit: int
    above: bool = False


class Caller(msgspec.Struct, frozen=True):
    """The caller: a key of an account, and what that key may do.

    `models` are the ids of those that it may use, None for all. A limit of None is no limit. `cache` is the account's.
    `above` are the limited keys from which this key descends, the nearest first. `slots`: a request takes one of each,
    its own first; ordinary keys have none of these limits.
    """

    account_id: str
    key_id: str
    scopes: frozenset[str]
    models: frozenset[str] | None = None
    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None
    cache: CachePolicy = CachePolicy.OFF
    above: tuple[Above, ...] = ()
    slots: tuple[SlotLimit, ...] = ()
    limited: bool = False  # whether the key or one above has a limit a minute
    embeds: bool = False  # whether it may have something embedded, and nothing is looked for in a cache before

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "embeds", EMBED_SCOPE in self.scopes and self.cache is CachePolicy.OFF)
        if self.requests_a_minute is not None or self.tokens_a_minute is not None or self.above:
            msgspec.structs.force_setattr(self, "limited", True)


class Keys(Protocol):
    """The bearer keys that are good now."""

    async def find(self, token: str) -> Caller | None:
        """The caller behind a key, or None whatever is wrong with it. Malformed keys die without a query.

        Raises StoreUnavailable where keys cannot be looked up, Overloaded where too many wait to be.
        """
        ...


class RememberedKeys(Keys, Protocol):
    """Keys that are remembered for a while."""

    def known(self, token: str, now: float) -> Caller | None:
        """The caller behind a key that was found a moment ago; None for any other. Must not wait.

        `now` is on the monotonic clock.
        """
        ...


class RateLimit(msgspec.Struct, frozen=True):
    """A limit of a key or one above, `requests` or `tokens` a minute: what is left, and seconds until it is whole."""

    what: str
    limit: int
    left: int
    reset_s: float


class RateLimits(Protocol):
    """How many requests and tokens a key may have in a minute. Nothing that was taken is given back."""

    async def take_request(self, caller: Caller) -> None:
        """Raises RateLimited, also where no token is left, or StoreUnavailable."""
        ...

    async def take_tokens(self, caller: Caller, tokens: int) -> None:
        """Raises RateLimited or StoreUnavailable."""
        ...

    def take_now(self, caller: Caller, tokens: int, *, look: bool = False) -> bool:
        """Take a request and its tokens, if both can be had without waiting; else nothing. `look`: only say so."""
        ...

    def spend_tokens(self, caller: Caller, tokens: int) -> None:
        """Take tokens for work that was done in vain: at most those that are left. Must not wait."""
        ...

    def left(self, caller: Caller) -> tuple[RateLimit, ...]:
        """The limit of requests and that of tokens of which least is left, as far as this gateway knows."""
        ...


class Slots(Protocol):
    """How many requests of a key may be under way at one time. What was taken is given back, once: `flow.bill` does it.

    `until_ms`, in Unix milliseconds, is when the request is over at the latest: a lease must last as long.
    """

    def take_now(self, caller: Caller, until_ms: int) -> bool:
        """Take a slot of each limit of `caller.slots`, if this gateway has them free; else take none: ask `take`."""
        ...

    async def take(self, caller: Caller, until_ms: int) -> None:
        """Take them, though other gateways may have to give some back; waits a second for each at most.

        Raises RateLimited or StoreUnavailable; nothing is taken then, nor if this is cancelled.
        """
        ...

    def give_back(self, caller: Caller) -> None:
        """The request is over. Must not wait."""
        ...


class Prices(Protocol):
    """Prices of a model for an account, now: the store's, or the catalogue's. All are nano-USD per million."""

    def of(self, model: Model, account_id: str) -> int:
        """Of a million tokens of input."""
        ...

    def meter(self, model: Model, account_id: str, meter: Meter) -> int:
        """Of a million tokens of a meter. Cached input never costs more than other input.

        Images and searches: see `image`, `search`.
        """
        ...

    def image(self, model: Model, account_id: str, size: str) -> int:
        """Of a million images of one of the sizes of `Model.image_prices`. Raises KeyError for another size."""
        ...

    def search(self, model: Model, account_id: str) -> int:
        """Of a million searches of a model that has a `search_price`."""
        ...


class Ledger(Protocol):
    """Holds and what becomes of them. Amounts are nano-USD."""

    def has_tab(self, key_id: str) -> bool:
        """Whether there is an open tab of the key, whatever is left of it. Must not wait."""
        ...

    def spend(self, hold: Hold) -> Hold | None:
        """Set `hold` aside from an open tab of its key, exactly, in memory; or None: then `await hold(hold)` decides.

        The hold that is returned names its tab: it is the one to capture or to release. Must not wait.
        """
        ...

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        """Durably set money aside, or raise InsufficientQuota, RateLimited or StoreUnavailable; nothing is held then.

        Nothing is held either if this is cancelled, or if another request has the `claim` already: that one is
        returned.
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

    async def extend(self, notes: Sequence[StreamNote]) -> frozenset[str]:
        """Have the holds of some streams last longer, and durably note what these have delivered.

        The holds are not parts of tabs. Returns the ids of those that are still open: they last at least until then,
        and are captured at that note if nobody ends them. The others have ended, or do not cover their note. Raises
        StoreUnavailable; nobody knows then which were extended, and the same may be tried again.
        """
        ...

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        """End an open hold, of either kind, by charging it; written with the next batch, in order after its hold.

        `reply` is kept with it, for the claim that the hold was placed with.
        """
        ...

    def release(self, hold: Hold, why: HoldEnd) -> None:
        """End an open hold, of either kind, without charging; written with the next batch. Harmless after a capture."""
        ...

    def healthy(self) -> bool:
        """Whether the last write to the store succeeded."""
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
        """How many special tokens the model adds to each input; of a model that reranks, around a pair."""
        ...

    @property
    def between(self) -> tuple[int, ...]:
        """The special tokens between the texts of a pair; none where the model takes no pairs."""
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

    def packed(self, texts: Sequence[str]) -> list[bytes] | None:
        """The same as little-endian uint32, if it takes at most about a millisecond whatever the texts are; else None.

        These are an input's `Ids` as a node is sent them, four bytes each.
        """
        ...

    def pair(self, query: Ids, document: Ids) -> bytes:
        """The ids of a pair, as a node is sent them: `query`, the special tokens between, `document`.

        The last of those between has ENDS_FIRST. Special tokens around the pair are not yet added.
        """
        ...

    def next_cut(self, text: str, start: int) -> int | None:
        """Where the piece of a text that begins at `start` ends; the ids of all pieces are the ids of the text.

        None if that piece would be too large.
        """
        ...

    def clip(self, text: str, tokens: int, *, end: bool) -> str:
        """The part of `text` that its first `tokens` tokens stand for, or its last ones if the `end` is to be kept."""
        ...


class Decoder(Protocol):
    """Turns token ids of a foreign vocabulary back into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Raises ValueError, in words for the caller, for an id that is special or out of the vocabulary."""
        ...
