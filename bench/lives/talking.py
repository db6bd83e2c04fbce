"""Chats and their streams in a world: what callers say, nodes that speak by dice, and what they said, for the judge."""

import asyncio
import random
from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import msgspec
import orjson

from bench.lives.journal import Errand, Said, Speech
from bench.lives.nodes import FAILURES
from embedmesh.rules.errors import NodeBroke
from embedmesh.rules.forwarding import Part
from embedmesh.rules.generation import GenerationRequest, StreamEnd, TokenCounts
from embedmesh.rules.models import Model
from tests.flow.speaking import answer, event

STREAM, CHAT = "stream", "chat"  # what an errand wants
CHAT_ODDS = 0.2  # of a chat that is not streamed
KEEPS_ODDS = 0.3  # of those: with an Idempotency-Key

TALK = Model(
    id="acme/talk",
    width=0,
    max_tokens=400,
    price=1_000_000,  # a nano-USD a token
    modalities=("chat",),
    output_price=3_000_000,
    cached_price=400_000,
    output_max=20,
    template_tokens=10,
)
PARTLY = msgspec.structs.replace(TALK, id="acme/partly", charge_partial=True)
TALKS = {model.id: model for model in (TALK, PARTLY)}

# Long times of the flow, in seconds, so short that they are met.
FIRST_EVENT_S, OPENING_S, BETWEEN_S, STREAM_S = 40.0, 70.0, 25.0, 150.0

FINISHED = event(finish="stop")
USAGE = b'{"id":"x","object":"chat.completion.chunk","choices":[],"usage":%b}'
ERROR = b'{"error":{"message":"by dice","type":"server_error"}}'
NONSENSE = (b"<html>", b"[1]", b'{"choices":7}', b'{"choices":[{"index":99,"delta":{}}]}')
PACES = (0.05, 0.05, 1.5, 6.0)  # the most between two events, in seconds
EVENTS_MAX = 30
ENDLESS = 200  # more than are ever asked for
ALL_ODDS = 0.03  # of a node that says nothing before its end


class Terms(NamedTuple):
    """What a caller has asked for, as far as it decides the cost."""

    model: Model
    text_bytes: int
    output_max: int
    wants_usage: bool

    @property
    def most(self) -> tuple[int, int]:
        """The most tokens of input and output."""
        return self.text_bytes + 2 * self.model.template_tokens, self.output_max

    @property
    def held(self) -> int:
        """What is set aside, in nano-USD."""
        return self.cost(TokenCounts(*self.most))

    def owed(self, said: Sequence[Said]) -> int:
        """What a caller owes that has got all of this."""
        text_bytes = sum(each.text_bytes for each in said)
        usage = next((each.usage for each in reversed(said) if each.usage is not None), None)
        most_input, most_output = self.most
        events = sum(each.text_bytes > 0 for each in said)  # each is a token at least
        counted = TokenCounts(ceil(self.text_bytes / 4) + 8, min(max(ceil(text_bytes / 4), events), most_output))
        if usage is None:
            return self.cost(counted)
        if usage.cached <= usage.input <= most_input:
            counted = msgspec.structs.replace(counted, input=usage.input, cached=usage.cached)
        if ceil(text_bytes / 128) <= usage.output <= most_output:
            counted = msgspec.structs.replace(counted, output=usage.output)
        return self.cost(counted)

    def cost(self, counts: TokenCounts) -> int:
        """In nano-USD."""
        of_input = (counts.input - counts.cached) * self.model.price + counts.cached * (self.model.cached_price or 0)
        return ceil((of_input + counts.output * self.model.output_price) / 1_000_000)


class Step(NamedTuple):
    """What a node does after `after_s` seconds: an event, or a failure."""

    after_s: float
    data: bytes | Exception | None  # None: it falls silent
    said: Said = Said(0)


def terms_of(errand: Errand) -> Terms:
    """Of a chat."""
    body = orjson.loads(errand.body)
    model = TALKS[body["model"]]
    (message,) = body["messages"]
    options = body.get("stream_options") or {}
    return Terms(model, len(message["content"]), body.get("max_tokens", model.output_max), "include_usage" in options)


def talk(dice: random.Random, account: str, key_id: str, token: str, number: int) -> Errand:
    """A chat like no other."""
    body: dict[str, Any] = {
        "model": dice.choice((TALK.id, PARTLY.id)),
        "messages": [{"role": "user", "content": "a" * (1 + int(dice.random() ** 2 * 40))}],
        "user": f"u{number}",
    }
    if dice.random() < 0.5:
        body["max_tokens"] = 1 + int(dice.random() * 30)
    if dice.random() < CHAT_ODDS:
        idem = f"talk {number}" if dice.random() < KEEPS_ODDS else None
        return Errand(account, key_id, token, orjson.dumps(body), 0, idem, dice.random() < 0.5, CHAT)
    body["stream"] = True
    if dice.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    return Errand(account, key_id, token, orjson.dumps(body), 0, None, dice.random() < 0.5, STREAM)


class SpeakingNodes:
    """All nodes, for one gateway. Implements the port `GeneratingClient`."""

    def __init__(
        self, dice: random.Random, gateway: str, bad_odds: float, slow_odds: float, speeches: dict[str, list[Speech]]
    ) -> None:
        """`speeches` are by request, one an attempt."""
        self._dice = dice
        self._gateway = gateway
        self._bad_odds, self._slow_odds = bad_odds, slow_odds
        self._speeches = speeches
        self._mine: list[Speech] = []

    @property
    def speaking(self) -> int:
        """How many have not been stopped."""
        return sum(each.over is None for each in self._mine)

    async def generate(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> bytes:
        speech, dice = self._speech(request_id), self._dice
        speech.over = asyncio.get_running_loop().time()
        await asyncio.sleep(dice.random() * (9.0 if dice.random() < self._slow_odds else 0.05))
        if dice.random() < self._bad_odds:
            raise dice.choice(FAILURES)("by dice")
        text = "word" * int(dice.random() * (asked.body["max_tokens"] + 1))
        usage = None if dice.random() < 0.3 else self._usage(asked, len(text))
        speech.said.append(Said(len(text), usage))
        return answer(text) if usage is None else answer(text, **_members(usage))

    async def stream(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> "SimStream":
        speech, dice = self._speech(request_id), self._dice
        try:
            await asyncio.sleep(dice.random() * 0.02)
            if dice.random() < self._bad_odds:
                raise dice.choice(FAILURES)("by dice")
        except BaseException:
            speech.over = asyncio.get_running_loop().time()
            raise
        ends: tuple[StreamEnd, ...] = ("done", "done", "whole", "closed")
        return SimStream(speech, self._script(asked), dice.choice(ends))

    def _speech(self, request_id: str) -> Speech:
        self._speeches.setdefault(request_id, []).append(speech := Speech(self._gateway))
        self._mine.append(speech)
        return speech

    def _script(self, asked: GenerationRequest) -> list[Step]:
        dice = self._dice
        pace_s = dice.choice(PACES)
        counts = dice.choice(("never", "last", "last", "each", "twice"))  # its word on usage
        steps: list[Step] = []
        text_bytes, number = 0, int(dice.random() ** 2 * EVENTS_MAX)
        bad = dice.random() < self._bad_odds * 2
        if bad and dice.random() < 0.1:
            number = ENDLESS
        for _ in range(number):
            text = "abcdefghijkl"[: int(dice.random() * 12)] if number < ENDLESS else "on"
            text_bytes += len(text)
            usage = self._usage(asked, text_bytes) if counts == "each" else None
            data = event(text, None if usage is None else _members(usage))
            steps.append(Step(dice.random() * pace_s, data, Said(len(text), usage)))
        for _ in range(("never", "last", "twice").index(counts) if counts != "each" else 0):
            usage = self._usage(asked, text_bytes)
            steps.append(
                Step(dice.random() * pace_s, USAGE % orjson.dumps(_members(usage)), Said(0, usage, shown=False))
            )
        if steps and dice.random() < self._slow_odds:
            steps[0] = steps[0]._replace(after_s=dice.random() * 1.3 * FIRST_EVENT_S)
        if dice.random() >= ALL_ODDS:
            steps.insert(min(number, len(steps)), Step(0.0, FINISHED))  # some have usage after it
        if bad and number < ENDLESS:
            fault = dice.choice((NodeBroke("by dice"), ERROR, dice.choice(NONSENSE), None))
            steps.insert(int(dice.random() * (len(steps) + 1)), Step(dice.random() * pace_s, fault))
        return steps

    def _usage(self, asked: GenerationRequest, text_bytes: int) -> TokenCounts:
        """Mostly right; too much, too little, or the most that can be."""
        dice, most = self._dice, int(asked.body["max_tokens"])
        given = len(asked.body["messages"][0]["content"])
        how = dice.random()
        if how < 0.1:
            return TokenCounts(given + 20 + int(dice.random() * 2) * 1_000, most + 1)
        if how < 0.2:
            return TokenCounts(1 + int(dice.random() * given), 0)
        if how < 0.3:
            return TokenCounts(given + 20, most)
        cached = int(dice.random() * given) if dice.random() < 0.3 else 0
        return TokenCounts(1 + given, min(most, ceil(text_bytes / (3 + dice.random()))), cached)


class SimStream:
    """Implements `NodeStream`."""

    def __init__(self, speech: Speech, steps: list[Step], end: StreamEnd) -> None:
        self._speech = speech
        self._steps = steps
        self._end: StreamEnd = end
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.end: StreamEnd | None = None

    async def next(self) -> bytes | None:
        if not self._steps:
            self.end = self._end
            return None
        after_s, data, said = self._steps.pop(0)
        await asyncio.wait({self._closed}, timeout=None if data is None else after_s)
        if self._closed.done():
            raise NodeBroke("closed")
        if isinstance(data, Exception):
            raise data
        assert data is not None
        self._speech.said.append(said)
        return data

    def close(self) -> None:
        self._speech.over = self._speech.over or asyncio.get_running_loop().time()
        if not self._closed.done():
            self._closed.set_result(None)


def _members(usage: TokenCounts) -> dict[str, Any]:
    """As nodes write it."""
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
