"""A small world for the flow: real steps over scripted edges (a node that answers by rule, a ledger in a dict)."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from embedmesh.catalogue import Catalogue
from embedmesh.dialects.openai.dialect import OpenAI
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.cache import VectorCache
from embedmesh.flow.deliver import Done
from embedmesh.flow.embed import Embeddings
from embedmesh.flow.retries import SingleFlight, Unread
from embedmesh.flow.world import World
from embedmesh.rules.embeddings import ENDS_FIRST, Counted, EmbedVectors, Ids, bytes_of, numbers_of
from embedmesh.rules.errors import Failure, InsufficientQuota, RateLimited
from embedmesh.rules.exchange import Delivery, Reply, StreamedReply
from embedmesh.rules.forwarding import AttemptOwner, Part
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, Meter, PriorRequest, StreamNote
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller, RateLimit, SlotLimit
from embedmesh.rules.shares import Shares

MODEL = Model(
    id="acme/tiny",
    folder="/nowhere",
    width=4,
    max_tokens=8,
    price=1_500_000,
    digest="0" * 64,
    aliases=("tiny",),
    prompts={"query": "q: "},
)
NATIVE = Model(id="acme/native", folder="/nowhere", width=4, max_tokens=8, price=1, digest="1" * 64, token_ids="native")
CATALOGUE = Catalogue((MODEL, NATIVE))
GOOD_KEY = "em_good"
OTHER_KEY = "em_other"
POOR_KEY = "em_poor"
PENNY_KEY = "em_penny"
SCOPELESS_KEY = "em_scopeless"
NARROW_KEY = "em_narrow"
METERED_KEY = "em_metered"
SINGLE_KEY = "em_single"
POOR_SINGLE_KEY = "em_poor_single"
EMBEDDINGS = Embeddings(OpenAI())
REPLY_BYTES = 10**8


class LetterTokenizer:
    """One token a letter: `a` is 1, `b` is 2 and so on; 0 and 31 are special, two are added to each input."""

    specials = 2
    between = (0,)
    vocab_size = 32
    special_ids = frozenset({0, 31})

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) % 31 for letter in text] for text in texts]

    def packed(self, texts: Sequence[str]) -> list[bytes] | None:
        return [bytes_of(each) for each in self.ids(texts)] if sum(map(len, texts)) <= 4_096 else None

    def next_cut(self, text: str, start: int) -> int | None:
        return min(len(text), start + 1_000)

    def pair(self, query: Ids, document: Ids) -> bytes:
        return bytes_of(query) + bytes_of([ENDS_FIRST]) + bytes_of(document)

    def clip(self, text: str, tokens: int, *, end: bool) -> str:
        return text[len(text) - tokens :] if end else text[:tokens]


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return int(self.now * 1000)


class Shift3:
    """A foreign vocabulary: id 3 is `a`."""

    def decode(self, ids: Sequence[int]) -> str:
        if any(token > 30 for token in ids):
            raise ValueError("31 is no token id of this test.")
        return "".join(chr(ord("a") + token - 3) for token in ids)


class KeyRing:
    async def find(self, token: str) -> Caller | None:
        return self.known(token, 0.0)

    def known(self, token: str, now: float) -> Caller | None:
        return {
            GOOD_KEY: Caller("acct", "key_1", frozenset({"embeddings", "generate"})),
            OTHER_KEY: Caller("other", "key_8", frozenset({"generate"})),
            POOR_KEY: Caller("poor", "key_2", frozenset({"embeddings", "generate"})),
            PENNY_KEY: Caller("penny", "key_6", frozenset({"embeddings"})),
            SCOPELESS_KEY: Caller("acct", "key_3", frozenset()),
            NARROW_KEY: Caller("acct", "key_4", frozenset({"embeddings"}), frozenset({NATIVE.id})),
            SINGLE_KEY: Caller("acct", "key_7", frozenset({"embeddings"}), slots=(SlotLimit("key_7", 1),)),
            POOR_SINGLE_KEY: Caller("penny", "key_7", frozenset({"embeddings"}), slots=(SlotLimit("key_7", 1),)),
            METERED_KEY: Caller("acct", "key_5", frozenset({"embeddings"}), None, 2, 12),
        }.get(token)


class Allowed:
    """Counts, and refuses what is over a limit."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {"requests": 0, "tokens": 0}
        self.asked: list[int] = []  # tokens, whatever the limit
        self.in_vain: list[int] = []  # tokens

    async def take_request(self, caller: Caller) -> None:
        self.take("requests", 1, caller.requests_a_minute)

    async def take_tokens(self, caller: Caller, tokens: int) -> None:
        self.asked.append(tokens)
        self.take("tokens", tokens, caller.tokens_a_minute)

    def take_now(self, caller: Caller, tokens: int, *, look: bool = False) -> bool:
        asked = (("requests", 1, caller.requests_a_minute), ("tokens", tokens, caller.tokens_a_minute))
        if any(limit is not None and self.taken[what] + amount > limit for what, amount, limit in asked):
            return False
        for what, amount, limit in () if look else asked:
            self.take(what, amount, limit)
        return True

    def spend_tokens(self, caller: Caller, tokens: int) -> None:
        self.in_vain.append(tokens)

    def take(self, what: str, amount: int, limit: int | None) -> None:
        if limit is not None:
            if self.taken[what] + amount > limit:
                raise RateLimited("too much", retry_after_s=7.0)
            self.taken[what] += amount

    def left(self, caller: Caller) -> tuple[RateLimit, ...]:
        limits = {"requests": caller.requests_a_minute, "tokens": caller.tokens_a_minute}
        return tuple(
            RateLimit(what, limit, limit - self.taken[what], 7.0) for what, limit in limits.items() if limit is not None
        )


class CountedSlots:
    """Counts how many requests of each place have a slot, and refuses what is over its limit."""

    def __init__(self) -> None:
        self.in_use: Counter[str] = Counter()
        self.waited = 0

    def take_now(self, caller: Caller, until_ms: int) -> bool:
        if any(self.in_use[each.place_id] >= each.limit for each in caller.slots):
            return False
        self.in_use.update(each.place_id for each in caller.slots)
        return True

    async def take(self, caller: Caller, until_ms: int) -> None:
        self.waited += 1
        await asyncio.sleep(0)
        if not self.take_now(caller, until_ms):
            raise RateLimited("all slots are in use", retry_after_s=1.0)

    def give_back(self, caller: Caller) -> None:
        self.in_use.subtract(each.place_id for each in caller.slots)


class CataloguePrices:
    def of(self, model: Model, account_id: str) -> int:
        return model.price

    def meter(self, model: Model, account_id: str, meter: Meter) -> int:
        cached = model.price if model.cached_price is None else model.cached_price
        return {Meter.INPUT: model.price, Meter.CACHED: cached, Meter.OUTPUT: model.output_price}[meter]

    def image(self, model: Model, account_id: str, size: str) -> int:
        return model.image_prices[size] * 1_000_000

    def search(self, model: Model, account_id: str) -> int:
        assert model.search_price is not None
        return model.search_price * 1_000_000


@dataclass
class MemoryLedger:
    """Says what happened, in order."""

    log: list[tuple[str, int]] = field(default_factory=list)
    charges: list[Charge] = field(default_factory=list)
    notes: list[StreamNote] = field(default_factory=list)
    ended_ids: set[str] = field(default_factory=set)  # of holds
    claims: dict[bytes, PriorRequest] = field(default_factory=dict)
    poor: set[str] = field(default_factory=lambda: {"poor"})  # accounts without money
    looked_at: int = 0  # how often somebody asked what there is
    kept: int = 0
    tabs: bool = False  # whether every key that can pay has a tab

    def has_tab(self, key_id: str) -> bool:
        return self.tabs

    def spend(self, hold: Hold) -> Hold | None:
        if not self.tabs or hold.account_id in self.poor:
            return None
        self.log.append(("spend", hold.amount_nanousd))
        return msgspec.structs.replace(hold, tab_id="tab")

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        if hold.account_id in self.poor | {"penny"} and claim is None:  # what seemed to be there is gone
            raise InsufficientQuota("no money")
        if claim is not None:
            prior = self.claims.get(claim.key_hash)
            if prior is not None and (
                prior.reply is not None or prior.state == "open" or prior.body_hash != claim.body_hash
            ):
                return prior
            self.claims[claim.key_hash] = PriorRequest(claim.body_hash, hold.hold_id, "open", None)
        self.log.append(("hold", hold.amount_nanousd))
        return None

    async def available_nanousd(self, account_id: str, key_id: str) -> int:
        self.looked_at += 1
        return 0 if account_id in self.poor else 4 if account_id == "penny" else 10**12

    async def prior_request(self, hold: Hold, claim: Claim) -> PriorRequest | None:
        return self.claims.get(claim.key_hash)

    async def kept_bytes(self, account_id: str) -> int:
        return self.kept

    async def extend(self, notes: Sequence[StreamNote]) -> frozenset[str]:
        self.notes += notes
        return frozenset(note.hold.hold_id for note in notes) - self.ended_ids

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        self.log.append(("capture", charge.cost_nanousd))
        self.charges.append(charge)
        self.end(hold, "captured", reply)

    def release(self, hold: Hold, why: HoldEnd) -> None:
        self.log.append(("release", hold.amount_nanousd))
        self.end(hold, "released", None)

    def end(self, hold: Hold, state: str, reply: bytes | None) -> None:
        self.ended_ids.add(hold.hold_id)
        for key, prior in self.claims.items():
            if prior.hold_id == hold.hold_id:
                self.claims[key] = PriorRequest(prior.body_hash, prior.hold_id, state, reply)

    def healthy(self) -> bool:
        return True


def vector_for(ids: list[int]) -> Any:
    """What the scripted node answers for some ids: a unit vector that depends on all of them."""
    seed = sum((position + 1) * token for position, token in enumerate(ids))
    vector = np.random.default_rng(seed).standard_normal(4)
    return (vector / np.linalg.norm(vector)).astype("<f4")


def right_reply(ids: list[list[int]]) -> EmbedVectors:
    tokens = sum(map(len, ids)) + 2 * len(ids)
    return EmbedVectors(tokens=tokens, data=b"".join(vector_for(each).tobytes() for each in ids))


class NeverAtOnce:
    """The part of a `NodeClient` whose attempts begin by `embed` alone."""

    def link_to(self, node_id: str) -> Any:
        return self

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Any:
        return None


class ScriptedNodes(NeverAtOnce):
    """Answers by a script: each step is a failure to raise, a reply to give, or None for the right reply."""

    def __init__(self, *script: Failure | EmbedVectors | BaseException | None) -> None:
        self._script = itertools.chain(script, itertools.repeat(None))
        self.asked: list[tuple[str, list[list[int]]]] = []

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        assert counted.ids is not None
        ids = [numbers_of(counted.ids[row]) for row in part.rows]
        self.asked.append((part.node_id, ids))
        step = next(self._script)
        if isinstance(step, BaseException):
            raise step
        return step or right_reply(ids)


async def undelivered(reply: Reply | StreamedReply) -> Delivery:
    """For what must end before a reply is delivered."""
    raise AssertionError("a reply was delivered")


class Bystander:
    """Sees all answers, and minds none."""

    def answered(self, model: Model, counted: Counted, part: Part, reply: EmbedVectors) -> None: ...


def call_later(seconds: float, then: Callable[[], None]) -> asyncio.TimerHandle:
    """On the loop that runs then."""
    return asyncio.get_running_loop().call_later(seconds, then)


class ScriptedWorld(World, frozen=True, kw_only=True):
    """A world whose edges are those of this module, for tests that look at them."""

    rate_limits: Allowed
    slots: CountedSlots
    ledger: MemoryLedger
    fleet: Scheduler
    client: ScriptedNodes
    clock: Clock

    def node(self, node_id: str) -> Node:
        """The node of that name."""
        node = self.fleet.registry.find(node_id)
        assert node is not None
        return node


def make_world(client: ScriptedNodes | None = None, *, nodes: int = 1, decoder: Shift3 | None = None) -> ScriptedWorld:
    clock = Clock()
    registry, replies = Registry(clock), Shares(REPLY_BYTES)
    for number in range(nodes):
        registry.answered_right(registry.add(Node(f"n{number}", "unix:/nowhere")), [m.id for m in CATALOGUE.models])
    return ScriptedWorld(
        keys=KeyRing(),
        rate_limits=Allowed(),
        slots=CountedSlots(),
        prices=CataloguePrices(),
        catalogue=CATALOGUE,
        tokenizers={m.id: LetterTokenizer() for m in CATALOGUE.models},
        cl100k=decoder,
        ledger=MemoryLedger(),
        fleet=Scheduler(registry, clock, random.Random(7), call_later),
        client=client or ScriptedNodes(),
        observer=Bystander(),
        clock=clock,
        single_flight=SingleFlight(Done.close, replies),
        unread=Unread(call_later),
        replies=replies,
        cache=VectorCache(10**6, registry.generation),
        hash_user=lambda user: "hash",
        claim_of=lambda key, body: Claim(key.encode(), body),
    )
