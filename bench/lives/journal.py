"""What happened in one world, seen from outside the gateways; the judge compares it with the ledger."""

import hashlib
from collections import Counter
from typing import NamedTuple

import msgspec

from embedmesh.rules.errors import Failure
from embedmesh.rules.generation import TokenCounts


class Errand(NamedTuple):
    """What a caller wants: one body, with one key of an account.

    Or a lock for so many `tokens` and seconds; a sealed body has its lock's name in place of an `Idempotency-Key`.
    """

    account: str
    key_id: str
    token: str
    body: bytes
    tokens: int
    idem: str | None
    sdk: bool  # an SDK that sends how often it has retried
    wants: str = "embeddings"
    span_s: int = 0


class DeliveryNote(NamedTuple):
    """A reply of which a byte went to a caller's socket: all of it, or the caller broke it off."""

    at: float
    life: int
    errand: Errand
    gateway: str
    hold_id: str | None  # None for one that was kept of an earlier request, or known and free
    cost: int
    body: bytes
    whole: bool
    again: bool  # as an SDK's retry
    began: float  # when the request was sent


class Said(NamedTuple):
    """One event of a node: the text in it, and its word on usage until now. `shown`: callers get it."""

    text_bytes: int
    usage: TokenCounts | None = None
    shown: bool = True


class Speech(msgspec.Struct):
    """What one attempt's node has said, as far as its gateway has read it."""

    gateway: str
    said: list[Said] = []
    over: float | None = None  # when it was closed, or had failed


class Streamed(msgspec.Struct):
    """A stream on its way to a caller. Parts without JSON are comments and `[DONE]`."""

    life: int
    errand: Errand
    gateway: str
    began: float
    handed: list[tuple[float, int]] = []  # when the kernel had an event, and how much the node had said by then
    offered: int = 0  # how much the node had said when the last event was about to be handed over
    text_bytes: int = 0  # that the kernel had
    usage: TokenCounts | None = None  # that the caller was told
    failed: bool = False  # its last event says so
    end: str = ""  # "whole", "broken off" or "cancelled"; else its gateway died before
    ended: float = 0.0
    noticed: float | None = None  # when its gateway knew that the caller had gone


class Noted(msgspec.Struct):
    """What a gateway had noted of a stream. `durable`: the gateway knows that it is."""

    at: float
    gateway: str
    cost: int
    durable: bool = False


class Attempt(msgspec.Struct):
    """One request to one gateway. `failure` is what the caller got in place of a reply."""

    life: int
    errand: Errand
    gateway: str
    began: float
    ended: float | None = None
    failure: Failure | None = None


class Taken(NamedTuple):
    """What a rate limit granted a key in one minute."""

    key_id: str
    minute: int
    what: str
    amount: int
    limit: int


class SlotNote(NamedTuple):
    """A request of a key has begun at a gateway, or is over there."""

    at: float
    place_id: str
    gateway: str
    change: int
    limit: int


class Journal:
    """Everything that was seen, and a trace of it for people."""

    def __init__(self) -> None:
        self.trace: list[str] = []
        self.deliveries: list[DeliveryNote] = []
        self.attempts: list[Attempt] = []
        self.taken: list[Taken] = []
        self.slots: list[SlotNote] = []
        self.credited: Counter[str] = Counter()  # by account, in the operator's books
        self.refunded: Counter[str] = Counter()
        self.prices: list[int] = []
        self.speeches: dict[str, list[Speech]] = {}  # of nodes, by request: one an attempt
        self.streams: dict[str, Streamed] = {}  # by hold
        self.notes: dict[str, list[Noted]] = {}  # by hold
        self.revoked: dict[str, float] = {}  # by key, when that was durable
        self.died: dict[str, float] = {}  # gateways that did not stop in peace
        self.wrong: list[str] = []  # found on the way
        self.seen: Counter[str] = Counter()

    def say(self, at: float, name: str, what: str) -> None:
        """For the trace."""
        self.trace.append(f"{at:11.6f} {name:<6} {what}")

    def digest(self) -> str:
        """The same for the same trace."""
        return hashlib.blake2b("\n".join(self.trace).encode(), digest_size=16).hexdigest()
