"""What a gateway believes of a sidecar: real signatures, and a node or a network that changes what is signed."""

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from embedmesh.confidential.generation_statements import AnsweredRequest, sign_event
from embedmesh.confidential.statements import request_digest
from embedmesh.gateway.nodes.sealed_generation import Sidecars
from embedmesh.node.sidecar_answers import framed
from embedmesh.rules.confidential import SDK_SCHEME, LockTerms, SealedAnswer, SealedCall
from embedmesh.rules.errors import NodeBroke, NodeFailure, WrongAnswer
from embedmesh.rules.generation import Generating
from embedmesh.rules.sealed_generation import SealedBounds, SignedCounts
from embedmesh.signing.identity import Identity

NODE, OTHER = Identity(bytes(range(32))), Identity(bytes(32))
CALL = SealedCall(SDK_SCHEME, "m", "m", 41, 1_000, bytes(32), b"c" * 40)
TERMS = LockTerms(41, "a", "k", "req_1", "n0", NODE.public_key, bytes(32), SDK_SCHEME, "m", 1_000, 1, 10**13)
BOUNDS = SealedBounds(50, 1_000, 10_000, ("1x1",))
EVENTS = 5


def message(
    number: int = 0,
    *,
    final: bool = False,
    by: Identity = NODE,
    lock: int = 41,
    call: SealedCall = CALL,
    modality: Generating = "chat",
    stream: bool = True,
    status: int = 200,
    sealed: bytes = b"sealed for the caller",
    **counts: Any,
) -> bytes:
    """One event as a node writes it."""
    said = SignedCounts(**{"input": 10, "output": 2 * number} | counts)
    answered = AnsweredRequest(by.public_key, lock, request_digest(call), modality, stream)
    sealed += b"%d" % number
    statement, signature = sign_event(by, answered, sealed, said, number=number, final=final, status=status, time_ms=1)
    return msgspec.msgpack.encode(SealedAnswer(statement, signature, sealed))


def good() -> list[bytes]:
    """The events of one right stream."""
    return [message(number, final=number == EVENTS - 1) for number in range(EVENTS)]


class Body:
    """A reply's body, in pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.closed = False

    async def read(self) -> bytes | None:
        return self._pieces.pop(0) if self._pieces else None

    def close(self) -> None:
        self.closed = True


class Sent:
    """In place of the links to nodes: answers with these bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.body = Body(list(pieces))

    def is_here(self, terms: LockTerms) -> bool:
        return True

    async def generate_sealed(
        self, node_id: str, modality: Generating, body: bytes, limit: int, request_id: str
    ) -> bytes:
        return await self.body.read() or b""

    async def stream_sealed(self, node_id: str, modality: Generating, body: bytes, limit: int, request_id: str) -> Any:
        return self.body


async def read(*pieces: bytes) -> list[int]:
    """The numbers of the events that are believed, to the end. Raises a NodeFailure."""
    sent = Sent(*pieces)
    stream = await Sidecars(sent, sent).stream(TERMS, CALL, "chat", BOUNDS, "req_1")
    numbers = []
    while (event := await stream.next()) is not None:
        numbers.append(event.statement.number)
    assert stream.end == "whole"
    return numbers


async def test_a_right_stream_however_it_is_cut() -> None:
    whole = b"".join(map(framed, good()))
    for size in (1, 2, 3, 7, 100, len(whole)):
        assert await read(*(whole[at : at + size] for at in range(0, len(whole), size))) == list(range(EVENTS))


def _swap(events: list[bytes]) -> list[bytes]:
    return [events[0], events[2], events[1], *events[3:]]


ATTACKS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "dropped": lambda events: events[:2] + events[3:],
    "the first dropped": lambda events: events[1:],
    "repeated": lambda events: [*events[:2], events[1], *events[2:]],
    "reordered": _swap,
    "cut": lambda events: events[:-1],
    "nothing": lambda events: [],
    "more after the end": lambda events: [*events, message(EVENTS, final=True)],
    "of another lock": lambda events: [*events[:2], message(2, lock=42), *events[3:]],
    "of another request": lambda events: [
        *events[:2],
        message(2, call=msgspec.structs.replace(CALL, ciphertext=b"d" * 40)),
        *events[3:],
    ],
    "of another node": lambda events: [*events[:2], message(2, by=OTHER), *events[3:]],
    "a whole answer": lambda events: [message(0, final=True, stream=False)],
    "a completion": lambda events: [message(0, final=True, modality="completions")],
    "more than was locked": lambda events: [message(0, final=True, output=991)],
    "more input than there can be": lambda events: [message(0, final=True, input=51)],
    "more cached than input": lambda events: [message(0, final=True, cached=11)],
    "no input": lambda events: [message(0, final=True, input=0)],
    "an image": lambda events: [message(0, final=True, images=1, size="1x1")],
    "refused, and counted": lambda events: [message(0, final=True, status=400)],
    "refused in the middle": lambda events: [events[0], message(1, final=True, status=400, input=0, output=0)],
    "no form": lambda events: [b"x"],
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_does_not_fit_is_refused(attack: str) -> None:
    with pytest.raises(NodeFailure) as refused:
        await read(*map(framed, ATTACKS[attack](good())))
    assert type(refused.value) in (WrongAnswer, NodeBroke)


async def test_changed_bytes_are_refused() -> None:
    """2,000 seeded changes of one byte anywhere but in a frame's length: none is believed to its end."""
    dice = random.Random(17)
    for _ in range(2_000):
        events = [bytearray(event) for event in good()]
        event = dice.choice(events)
        at = dice.randrange(len(event))
        event[at] ^= 1 << dice.randrange(8)
        with pytest.raises(NodeFailure):
            await read(*(framed(bytes(each)) for each in events))


@pytest.mark.parametrize(
    "wrong",
    [
        message(0, final=True, stream=False, modality="images", input=0, images=1, size="9x9"),
        message(0, final=True, stream=False, modality="images", input=0, images=2, size="1x1"),
        message(0, final=True, stream=False, modality="images", input=5, images=1, size="1x1"),
        message(0, final=False, stream=False, modality="images", input=0, images=1, size="1x1"),
    ],
)
async def test_one_image_of_a_size_that_there_is(wrong: bytes) -> None:
    right = message(0, final=True, stream=False, modality="images", input=0, images=1, size="1x1")
    sent = Sent(right)
    event = await Sidecars(sent, sent).generate(TERMS, CALL, "images", BOUNDS, "req_1")
    assert event.statement.images == 1
    sent = Sent(wrong)
    with pytest.raises(WrongAnswer):
        await Sidecars(sent, sent).generate(TERMS, CALL, "images", BOUNDS, "req_1")


async def test_an_event_has_a_size() -> None:
    """A length that no event has is refused before so much is read."""
    with pytest.raises(WrongAnswer):
        await read((2**31).to_bytes(4, "big"), b"x")
