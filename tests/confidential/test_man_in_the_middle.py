"""No attack of a man in the middle is accepted (`make confidential`), and the search for one finds bugs."""

import base64
from collections.abc import Callable, Generator, Iterator
from typing import Any

import msgspec
import pytest

from bench.middle import parties
from bench.middle.world import KINDS, World, attack, honest
from embedmesh.client import core
from embedmesh.client import steps as client_steps
from embedmesh.client.core import LockStep, Trust
from embedmesh.client.errors import EmbedmeshError
from embedmesh.client.steps import ToSend
from embedmesh.client.wanted import Wanted
from embedmesh.confidential import documents, sdk_scheme
from embedmesh.rules.confidential import AnswerStatement, KeyDocument, SealedAnswer, SignedKeys
from tests.data import quick_or

ATTACKS = quick_or(50, quick=5)  # of each kind
TRIES = 40  # within as many a bug is found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_is_noticed(world: World, kind: str) -> None:
    """See `python -m bench.middle --only SEED` for one of the long run that is not."""
    assert {seed: attack(world, seed, kind).wrong for seed in range(ATTACKS)} == {seed: [] for seed in range(ATTACKS)}


def test_a_call_that_nobody_attacks_is_answered(world: World) -> None:
    assert [wrong for seed in range(20) for wrong in honest(world, seed)] == []


def found(world: World, kind: str, what: str) -> bool:
    """Whether that is what goes wrong."""
    return any(what in wrong for seed in range(TRIES) for wrong in attack(world, seed, kind).wrong)


def document_unchecked(signed: SignedKeys) -> KeyDocument:
    return msgspec.json.decode(signed.document, type=KeyDocument)


def answer_unchecked(answer: SealedAnswer, *_: object) -> AnswerStatement:
    return msgspec.json.decode(answer.statement, type=AnswerStatement)


def trusts_everybody(step: LockStep, signed: SignedKeys, document: KeyDocument) -> None:
    pass


def breaks(*_: object) -> None:
    raise KeyError("statement")


BUGS: list[tuple[object, str, object, str, str]] = [
    (documents, "read_keys", document_unchecked, "lock: the nodes document with his key", "he can open the request"),
    (LockStep, "_check_who", trusts_everybody, "lock: a node of his", "he can open the request"),
    (core, "read_answer", answer_unchecked, "answer: a statement of his", "accepted"),
    (core, "read_answer", breaks, "answer: a statement of his", "the client broke"),
    (core, "decode64", lambda text, *_: base64.b64decode(text), "reply: another form of a reply", "accepted"),
    (sdk_scheme, "check_response", lambda *_: None, "answer: a bit of an answer", "accepted"),
]


@pytest.mark.parametrize(("where", "name", "bug", "kind", "what"), BUGS)
def test_it_finds_a_client_that_does_not_look(
    world: World, monkeypatch: pytest.MonkeyPatch, where: object, name: str, bug: object, kind: str, what: str
) -> None:
    """One check is left out, and one kind of attack gets through."""
    monkeypatch.setattr(where, name, bug)
    assert found(world, kind, what)


def test_it_finds_a_client_that_shows_texts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the request for a lock, for instance."""

    class Talkative(LockStep):
        def __init__(self, wanted: Wanted, trust: Trust) -> None:
            super().__init__(wanted, trust)
            self.body = msgspec.json.encode(msgspec.json.decode(self.body) | {"text": wanted.body.decode()})

    monkeypatch.setattr(parties, "LockStep", Talkative)
    assert "/nodes/lock has the texts" in honest(world, 0)


def test_it_finds_a_client_that_calls_in_the_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no node can be locked."""
    confidential: Callable[..., Any] = client_steps.confidential

    def falls_back(wanted: Wanted, *rest: Any) -> Generator[Any, Any, Any]:
        try:
            return (yield from confidential(wanted, *rest))
        except EmbedmeshError:
            return (yield ToSend("/embeddings", wanted.body))

    monkeypatch.setattr(client_steps, "confidential", falls_back)
    assert found(world, "locked: no lock", "/embeddings has the texts")


def test_it_finds_vectors_of_another_call(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were there some, it would be seen."""
    monkeypatch.setattr(parties, "vector_of", lambda model, ids: [9.0] * parties.WIDTH)
    assert honest(world, 0) == ["the vectors are others"]
