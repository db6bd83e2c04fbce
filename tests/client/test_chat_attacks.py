"""A gateway in the middle of a sealed chat: our client raises, and takes no part for the whole. Real seals."""

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from embedmesh.client.chat_answer import ChatCompletionChunk
from embedmesh.client.chat_core import ChatReader, check_scheme, want_chat
from embedmesh.client.core import LockStep, Trust
from embedmesh.client.errors import CallRefused, ReplyNotTrusted, WrongCall
from embedmesh.client.event_lines import EventLines
from embedmesh.client.pins import Pins
from embedmesh.dialects import confidential_generation
from embedmesh.node.key_sets import KeySets
from embedmesh.node.opener import Opener
from embedmesh.node.seen_generation import SeenGeneration
from embedmesh.rules.base64s import decode64, encode64
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME, SealedAnswer
from embedmesh.rules.sealed_generation import GenerationStatement, SealedGeneration, SignedCounts
from embedmesh.signing.identity import Identity
from embedmesh.signing.public_lines import node_line

MODEL, UNITS = "acme/chat", 1_000
WORDS = ("one", " two", " three", " four")
Event = dict[str, Any]
NODE, OTHER = Identity(bytes(range(32))), Identity(bytes(32))


class Middle:
    """One answer that a node has sealed for our client, on its way through a gateway, which may change its `events`."""

    def __init__(self, lock: int = 41, *, stream: bool = True, node: Identity = NODE) -> None:
        clock = SystemClock()
        keys = KeySets(NODE, clock)
        signed = keys.signed({MODEL: ""})
        wanted = want_chat(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=stream, lock_tokens=UNITS, fields={}
        )
        document = json.loads(signed.document)
        reply = {
            "public_key": document["keys"][HPKE_SCHEME],
            "stack_small_id": lock,
            "scheme": HPKE_SCHEME,
            "expires_ms": clock.unix_ms() + 30_000,
            "max_num_tokens": UNITS,
            "model": MODEL,
            "keys": json.loads(msgspec.json.encode(signed)),
        }
        pins = Pins.parse(node_line(NODE.public_key).encode())
        sealed = LockStep(wanted, Trust(pins)).read(json.dumps(reply).encode(), clock.unix_ms())
        self.sealed = sealed, wanted
        self.reader = ChatReader(sealed, wanted)
        call, self.streams = confidential_generation.parse(sealed.body)
        call = msgspec.structs.replace(call, model=MODEL, units=UNITS)
        opener = Opener(node, keys, clock)
        if node is not NODE:
            opener._node_id = Opener(NODE, keys, clock)._node_id  # it has stolen the key, not the identity
        held = opener.find(call)
        assert held is not None
        self.seen: SeenGeneration = opener.look_at_generation(SealedGeneration(call, stream), "chat", held.key)
        assert self.seen.body is not None
        self.events = [self.event(at, word) for at, word in enumerate(WORDS)] if stream else [self.whole()]

    def event(self, at: int, word: str) -> Event:
        """The next event, as the gateway tells it."""
        final = at == len(WORDS) - 1
        delta = {"content": word}
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": "stop" if final else None}]
        return self.told(json.dumps(chunk).encode(), SignedCounts(9, at + 1, estimated=not final), final=final)

    def whole(self) -> Event:
        """A whole reply."""
        usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
        message = {"role": "assistant", "content": "".join(WORDS)}
        reply = {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "usage": usage}
        reply["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return self.told(json.dumps(reply).encode(), SignedCounts(9, 4), final=True)

    def told(self, body: bytes, counts: SignedCounts, *, final: bool) -> Event:
        message = self.seen.seal(body, counts, 1, final=final)
        answer = msgspec.msgpack.decode(message, type=SealedAnswer)
        told = confidential_generation.event(HPKE_SCHEME, answer, counts, known=final)
        return dict(json.loads(told))

    def read(self, events: list[Event]) -> list[ChatCompletionChunk]:
        """What our client returns of these, to the end. Raises what it raises."""
        lines = EventLines()
        chunks: list[ChatCompletionChunk] = []
        for event in events:
            found = lines.feed(b": \n\ndata: " + json.dumps(event).encode() + b"\n\n")
            chunks += map(self.reader.event, found)
        self.reader.end()
        return chunks


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def with_statement(event: Event, **changes: Any) -> Event:
    """The same with other words in its statement."""
    statement = msgspec.json.decode(decode64(event["statement"]), type=GenerationStatement)
    changed = msgspec.structs.replace(statement, **changes)
    return event | {"statement": encode64(msgspec.json.encode(changed))}


def test_a_right_stream_is_read() -> None:
    middle = Middle()
    chunks = middle.read(middle.events)
    assert text_of(chunks) == "".join(WORDS)
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 13
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 3


def test_a_right_whole_answer_is_read() -> None:
    middle = Middle(stream=False)
    reply = middle.reader.whole(json.dumps(middle.events[0]).encode())
    assert reply.choices[0].message.content == "".join(WORDS)


STREAM_ATTACKS: dict[str, tuple[Callable[[list[Event], list[Event]], list[Event]], str]] = {
    "drops the first": (lambda mine, _: mine[1:], "order"),
    "drops one": (lambda mine, _: mine[:1] + mine[2:], "order"),
    "drops the last": (lambda mine, _: mine[:-1], "cut"),
    "drops all": (lambda mine, _: [], "cut"),
    "repeats": (lambda mine, _: [mine[0], mine[0], *mine[1:]], "order"),
    "repeats the last": (lambda mine, _: [*mine, mine[-1]], "after"),
    "reorders": (lambda mine, _: [mine[0], mine[2], mine[1], mine[3]], "order"),
    "ends with the last at once": (lambda mine, _: [mine[0], mine[3]], "order"),
    "mixes another stream in": (lambda mine, other: [mine[0], other[1], *mine[2:]], "lock"),
    "gives another stream": (lambda mine, other: other, "lock"),
    "swaps ciphertexts": (
        lambda mine, _: [
            mine[0] | {"ciphertext": mine[1]["ciphertext"]},
            mine[1] | {"ciphertext": mine[0]["ciphertext"]},
            *mine[2:],
        ],
        "reply",
    ),
    "says that it ends": (lambda mine, _: [mine[0], with_statement(mine[1], final=True)], "signature"),
    "changes counts": (lambda mine, _: [*mine[:3], with_statement(mine[3], output=400)], "signature"),
    "tells another usage": (
        lambda mine, _: [
            *mine[:3],
            mine[3] | {"usage": {"prompt_tokens": 9, "completion_tokens": 90, "total_tokens": 99}},
        ],
        "usage",
    ),
    "leaves the statement out": (lambda mine, _: [{"ciphertext": mine[0]["ciphertext"]}], "form"),
    "says something else": (lambda mine, _: [{"choices": []}], "form"),
}


@pytest.mark.parametrize("attack", STREAM_ATTACKS)
def test_a_stream_that_is_changed_raises(attack: str) -> None:
    change, reason = STREAM_ATTACKS[attack]
    middle = Middle()
    with pytest.raises(ReplyNotTrusted) as refused:
        middle.read(change(middle.events, Middle(lock=42).events))
    assert refused.value.reason == reason


def test_a_stream_of_the_same_lock_sealed_for_another_request_raises() -> None:
    """The gateway has its own client ask the same node under a lock of the same number."""
    middle, other = Middle(), Middle()
    with pytest.raises(ReplyNotTrusted) as refused:
        middle.read([middle.events[0], *other.events[1:]])
    assert refused.value.reason == "request"


def test_an_answer_of_who_has_the_key_and_not_the_identity_raises() -> None:
    middle = Middle(node=OTHER)
    with pytest.raises(ReplyNotTrusted) as refused:
        middle.read(middle.events)
    assert refused.value.reason == "signature"


def test_a_whole_answer_is_no_stream_and_the_other_way_around() -> None:
    whole, stream = Middle(stream=False), Middle()
    with pytest.raises(ReplyNotTrusted):
        stream.read(whole.events)
    with pytest.raises(ReplyNotTrusted):
        Middle(stream=False).reader.whole(json.dumps(stream.events[-1]).encode())


def test_an_error_in_mid_stream_raises_and_is_the_gateway_s_word() -> None:
    middle = Middle()
    error = {"error": {"message": "it broke", "type": "server_error", "param": None, "code": "no_node_available"}}
    with pytest.raises(CallRefused) as refused:
        middle.read([middle.events[0], error])
    assert refused.value.code == "no_node_available" and not refused.value.sealed


def test_no_changed_stream_is_returned_whole() -> None:
    """3,000 seeded attacks: of bits, of places, of mixtures. What is returned is the right text, or nothing is."""
    dice = random.Random(29)
    kinds = ("bit", "drop", "repeat", "swap", "cut", "mix", "none")
    other = Middle(lock=42).events
    middle = Middle()
    for number in range(3_000):
        if not number % 50:
            middle = Middle()
        events = [dict(event) for event in middle.events]
        kind, at = dice.choice(kinds), dice.randrange(len(events))
        if kind == "bit":
            name = dice.choice(("ciphertext", "statement", "statement_signature"))
            raw = bytearray(decode64(events[at][name]))
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            events[at][name] = encode64(bytes(raw))
        elif kind == "drop":
            del events[at]
        elif kind == "repeat":
            events.insert(at, events[dice.randrange(len(events))])
        elif kind == "swap":
            to = (at + dice.randrange(1, len(events))) % len(events)
            events[at], events[to] = events[to], events[at]
        elif kind == "cut":
            events = events[:at]
        elif kind == "mix":
            events[at] = other[at]
        middle.reader = ChatReader(*middle.sealed)
        if kind == "none":
            assert text_of(middle.read(events)) == "".join(WORDS)
            continue
        with pytest.raises(ReplyNotTrusted):
            middle.read(events)


def test_the_sdks_scheme_is_not_for_chats() -> None:
    """It has no end that could be checked: there is no way to a weaker seal."""
    with pytest.raises(WrongCall):
        check_scheme(Trust(None, SDK_SCHEME))
