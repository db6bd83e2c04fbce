"""Which nodes are locked, under which keys, and which answers of theirs are believed: real seals and signatures."""

import random
from dataclasses import dataclass, field

import msgspec
import pytest

from embedmesh.confidential.documents import sign_keys
from embedmesh.confidential.node_keys import DhKey
from embedmesh.confidential.sdk_scheme import seal
from embedmesh.confidential.statements import request_digest, sign_answer
from embedmesh.fleet.registry import Node, Registry
from embedmesh.gateway.nodes.sealed import LASTS_MS, SKEW_MS, SealingNodes
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME, LockTerms, SealedAnswer, SealedCall, SignedKeys
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.nodes import NodeState
from embedmesh.signing.identity import Identity, node_id
from tests.flow.world import CATALOGUE, MODEL, Clock

IDENTITY, OTHER = Identity(bytes(32)), Identity(bytes(31) + b"\1")
KEY = DhKey.new()
DAY_MS = 86_400_000


def keys(
    identity: Identity = IDENTITY, *, begins_ms: int = 0, ends_ms: int = DAY_MS, models: dict[str, str] | None = None
) -> SignedKeys:
    return sign_keys(
        identity, {MODEL.id: MODEL.digest} if models is None else models, {SDK_SCHEME: KEY.public}, begins_ms, ends_ms
    )


@dataclass
class Sent:
    """Answers what the test says, and remembers what came."""

    answer: bytes = b""
    came: list[tuple[str, bytes, int]] = field(default_factory=list)

    async def post_sealed(self, node_id: str, body: bytes, limit: int, request_id: str) -> bytes:
        self.came.append((node_id, body, limit))
        return self.answer


class Fleet:
    """Nodes that are ready, and their keys."""

    def __init__(self) -> None:
        self.clock, self.sent = Clock(), Sent()
        self.registry = Registry(self.clock)
        self.nodes = SealingNodes(self.registry, self.sent, self.clock, random.Random(3))

    def add(self, name: str, signed: SignedKeys | None, kind: str = "remote") -> Node:
        node = self.registry.add(Node(name, "https://n.example", kind=kind, small_id=7))
        self.registry.answered_right(node, [model.id for model in CATALOGUE.models])
        assert node.state is NodeState.READY
        node.keys = signed
        return node


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


NAME = node_id(IDENTITY.public_key)


def test_a_node_is_locked_under_the_key_that_its_identity_has_signed(fleet: Fleet) -> None:
    fleet.add("node_without", None)
    fleet.add(NAME, keys())
    found = fleet.nodes.choose_sealing(MODEL, SDK_SCHEME)
    assert found is not None
    assert (found.node_id, found.small_id, found.document.keys[SDK_SCHEME]) == (NAME, 7, KEY.public)
    assert fleet.nodes.choose_sealing(MODEL, HPKE_SCHEME) is None


NOW_MS = 1_000_000  # of the clock of the small world


@pytest.mark.parametrize(
    "signed",
    [
        keys(OTHER),
        keys(models={}),
        keys(models={MODEL.id: "f" * 64}),
        keys(ends_ms=NOW_MS + LASTS_MS - 1),
        keys(begins_ms=NOW_MS + SKEW_MS + 1),
        SignedKeys(keys().document, keys(OTHER).signature),
        SignedKeys(keys().document + b" ", keys().signature),
        SignedKeys(b"{}", keys().signature),
    ],
    ids=["another's", "no model", "other weights", "ends soon", "not yet", "forged", "changed", "no document"],
)
def test_keys_that_are_not_good_are_not_given_out(fleet: Fleet, signed: SignedKeys) -> None:
    fleet.add(NAME, signed)
    assert fleet.nodes.choose_sealing(MODEL, SDK_SCHEME) is None


def test_a_caller_may_name_the_nodes_that_it_would_seal_for(fleet: Fleet) -> None:
    other = node_id(OTHER.public_key)
    fleet.add(NAME, keys())
    fleet.add(other, keys(OTHER))
    for name in (NAME, other) * 5:
        found = fleet.nodes.choose_sealing(MODEL, SDK_SCHEME, frozenset({name, "node_else"}))
        assert found is not None
        assert found.node_id == name
    assert fleet.nodes.choose_sealing(MODEL, SDK_SCHEME, frozenset({"node_else"})) is None


def test_a_local_node_is_known_by_its_socket(fleet: Fleet) -> None:
    fleet.add("local", keys(), kind="local")
    found = fleet.nodes.choose_sealing(MODEL, SDK_SCHEME)
    assert found is not None
    assert found.node_id == "local"


def test_another_node_of_the_same_name_is_not_the_one_that_was_locked(fleet: Fleet) -> None:
    """Of another gateway: it could not open the request, and would be found lying for it."""
    node = fleet.add("local", keys(), kind="local")
    assert fleet.nodes.is_here(terms_of("local", IDENTITY))
    assert not fleet.nodes.is_here(terms_of("local", OTHER))
    assert not fleet.nodes.is_here(terms_of("local-1", IDENTITY))
    node.keys = None
    assert not fleet.nodes.is_here(terms_of("local", IDENTITY))


def test_new_keys_take_the_place_of_old_ones(fleet: Fleet) -> None:
    node = fleet.add(NAME, keys(ends_ms=NOW_MS))
    assert fleet.nodes.choose_sealing(MODEL, SDK_SCHEME) is None
    node.keys = keys()
    assert fleet.nodes.choose_sealing(MODEL, SDK_SCHEME) is not None
    node.keys = None
    assert fleet.nodes.choose_sealing(MODEL, SDK_SCHEME) is None


def test_a_node_that_is_quarantined_or_drains_is_not_locked(fleet: Fleet) -> None:
    node = fleet.add(NAME, keys())
    fleet.registry.drain(node, True)
    assert fleet.nodes.choose_sealing(MODEL, SDK_SCHEME) is None
    fleet.registry.drain(node, False)
    fleet.registry.quarantine(node, "lies")
    assert fleet.nodes.choose_sealing(MODEL, SDK_SCHEME) is None


def call_of() -> SealedCall:
    sealed, _ = seal(b"{}", KEY.public)
    return SealedCall(
        SDK_SCHEME,
        MODEL.id,
        "tiny",
        5,
        100,
        KEY.public,
        sealed.ciphertext,
        client_key=sealed.client_key,
        salt=sealed.salt,
        nonce=sealed.nonce,
        body_hash=sealed.body_hash,
    )


CALL = call_of()
TERMS = LockTerms(5, "a", "k", "h", NAME, IDENTITY.public_key, KEY.public, SDK_SCHEME, MODEL.id, 100, 1, 10**6)


def terms_of(name: str, identity: Identity) -> LockTerms:
    return msgspec.structs.replace(TERMS, node_id=name, identity=identity.public_key)


def answer_of(
    identity: Identity = IDENTITY, *, lock: int = 5, digest: bytes | None = None, tokens: int = 9, status: int = 200
) -> SealedAnswer:
    digest = request_digest(CALL) if digest is None else digest
    return SealedAnswer(*sign_answer(identity, lock, digest, b"sealed", status, tokens, 1), b"sealed")


async def test_a_right_answer_is_believed(fleet: Fleet) -> None:
    node = fleet.add(NAME, keys())
    fleet.sent.answer = msgspec.msgpack.encode(answer_of())
    checked = await fleet.nodes.answer(TERMS, CALL, 10, 4_096, "req")
    assert (checked.statement.tokens, checked.answer.sealed) == (9, b"sealed")
    assert (node.counts["sealed_tokens"], node.counts["sealed_bytes"]) == (9, len(CALL.ciphertext))
    ((name, body, limit),) = fleet.sent.came
    assert (name, limit) == (NAME, 4_096)
    assert msgspec.msgpack.decode(body, type=SealedCall) == CALL


@pytest.mark.parametrize(
    "answer",
    [
        answer_of(OTHER),
        answer_of(lock=6),
        answer_of(digest=bytes(32)),
        answer_of(tokens=11),
        answer_of(status=400, tokens=9),
        msgspec.structs.replace(answer_of(), sealed=b"other"),
        msgspec.structs.replace(answer_of(), signature=bytes(64)),
        msgspec.structs.replace(answer_of(), statement=answer_of().statement + b" "),
    ],
    ids=["another's", "lock", "request", "too many", "refused and counted", "reply", "signature", "statement"],
)
async def test_an_answer_that_is_not_the_nodes_own_to_this_call_is_wrong(fleet: Fleet, answer: SealedAnswer) -> None:
    fleet.sent.answer = msgspec.msgpack.encode(answer)
    with pytest.raises(WrongAnswer):
        await fleet.nodes.answer(TERMS, CALL, 10, 4_096, "req")


@pytest.mark.parametrize("raw", [b"", b"\xc0", b"{}", msgspec.msgpack.encode({"statement": b"a"})])
async def test_what_is_no_answer_is_wrong(fleet: Fleet, raw: bytes) -> None:
    fleet.sent.answer = raw
    with pytest.raises(WrongAnswer):
        await fleet.nodes.answer(TERMS, CALL, 10, 4_096, "req")
