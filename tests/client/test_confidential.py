"""Sealed calls: every check, by a gateway or a node that does one thing wrong. Both clients."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embedmesh.client import (
    CallNotAnswered,
    CallRefused,
    NodeNotTrusted,
    NotTrusted,
    Pins,
    ReplyNotTrusted,
    WrongCall,
)
from embedmesh.client.core import LockStep, Trust
from embedmesh.client.wanted import want
from embedmesh.confidential.attestation import KeyAttester
from embedmesh.confidential.node_keys import DhKey
from embedmesh.confidential.statements import reply_digest
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME
from embedmesh.signing.identity import Identity
from tests.client.conftest import Call
from tests.client.gateway import (
    ALIAS,
    DAY_MS,
    MODEL,
    TEXT,
    Members,
    Raw,
    Received,
    ScriptedGateway,
    ScriptedNode,
    b64,
    embed,
    envelope,
    now_ms,
    vector_of,
)

Do = Callable[[ScriptedGateway], object]
SCHEMES = [HPKE_SCHEME, SDK_SCHEME]


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def nothing_left(gateway: ScriptedGateway) -> bool:
    """Only locks were asked for, and their bodies have the model's name and a bound alone."""
    locks = all(path == "/nodes/lock" for path in gateway.paths)
    names = {"model", "max_num_tokens", "timeout", "scheme"}
    return locks and all(one.body.keys() - {"nodes"} == names for one in gateway.received) and not seen(gateway)


def seen(gateway: ScriptedGateway) -> bool:
    """Whether the text, in the clear or in base64, is in anything that arrived."""
    forms = [TEXT.encode(), base64.b64encode(TEXT.encode())[:24]]
    return any(form in one.raw for one in gateway.received for form in forms)


# -- the right way -----------------------------------------------------------------------------------------------------


def test_a_sealed_call_gives_what_a_plain_one_gives(
    gateway: ScriptedGateway, call: Call, pins: Path, scheme: str
) -> None:
    given: Members = {"model": ALIAS, "input": [TEXT, "two"], "dimensions": 8, "user": "u"}
    sealed = call(**given, confidential=True, pins=pins, scheme=scheme)
    assert not seen(gateway)
    assert gateway.paths == ["/nodes/lock", "/confidential/embeddings"]
    plain = call(**given)
    assert (sealed.data, sealed.usage, sealed.model) == (plain.data, plain.usage, plain.model)
    assert (sealed.node_id, plain.node_id) == (gateway.node.node_id, None)
    assert gateway.node.opened[0] == gateway.received[-1].body


def test_the_client_itself_may_be_confidential(gateway: ScriptedGateway, pins: Path) -> None:
    from embedmesh.client import Client

    with Client(base_url=gateway.base_url, api_key="k", pins=Pins.read(pins), confidential=True) as client:
        client.embeddings.create(model=ALIAS, input=TEXT)
        client.embeddings.create(model=ALIAS, input="public", confidential=False)
    assert gateway.paths == ["/nodes/lock", "/confidential/embeddings", "/embeddings"]


def test_a_lock_is_for_no_more_tokens_than_the_text_can_have(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    for arguments, most in (
        ({"input": "äb"}, 256),  # all short texts
        ({"input": ["x" * 1_000, "c"]}, 1_152),  # 1,001 bytes and 64 an input, in the next step
        ({"input": [[5, 6, 7]] * 40}, 3_072),  # 4 an id
        ({"input": ["x" * 400_000]}, 300_000),
        ({"input": "x" * 99, "lock_tokens": 20}, 20),
    ):
        call(model=ALIAS, confidential=True, pins=pins, **arguments)
        assert gateway.received[-2].body["max_num_tokens"] == most


def test_every_call_is_sealed_anew(gateway: ScriptedGateway, call: Call, pins: Path, scheme: str) -> None:
    for _ in range(2):
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins, scheme=scheme)
    sealed = [one.body for one in gateway.received if one.path.endswith("confidential/embeddings")]
    for name in sealed[0].keys() - {"model_name", "node_dh_public_key", "scheme", "expires_ms", "plaintext_body_hash"}:
        assert sealed[0][name] != sealed[1][name], name


def test_short_texts_look_alike(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    sizes = set()
    for text in ("a", "some words more", "x" * 50):
        call(model=ALIAS, input=text, confidential=True, pins=pins)
        sizes.add(len(gateway.received[-1].body["ciphertext"]))
    assert len(sizes) == 1


# -- whom to seal for --------------------------------------------------------------------------------------------------


def keys(**more: Any) -> Do:
    """The node's document, signed by the node, but with these arguments."""

    def do(gateway: ScriptedGateway) -> None:
        def change(reply: Members) -> Members:
            signed = gateway.node.keys(**{name: it() if callable(it) else it for name, it in more.items()})
            return reply | {"keys": msgspec.json.decode(msgspec.json.encode(signed))}

        gateway.on_lock = change

    return do


def lock(**members: Any) -> Do:
    """The lock's reply with these members; a function makes the value."""

    def do(gateway: ScriptedGateway) -> None:
        def change(reply: Members) -> Members:
            return reply | {name: value() if callable(value) else value for name, value in members.items()}

        gateway.on_lock = change

    return do


def without(name: str) -> Do:
    def do(gateway: ScriptedGateway) -> None:
        gateway.on_lock = lambda reply: {key: value for key, value in reply.items() if key != name}

    return do


def spoilt(member: str) -> Do:
    """One bit of `keys.MEMBER` is another."""

    def do(gateway: ScriptedGateway) -> None:
        def change(reply: Members) -> Members:
            raw = bytearray(base64.b64decode(reply["keys"][member]))
            raw[len(raw) // 2] ^= 1
            return reply | {"keys": reply["keys"] | {member: b64(bytes(raw))}}

        gateway.on_lock = change

    return do


def own_key(gateway: ScriptedGateway) -> None:
    """The gateway's own key beside the node's document."""
    lock(public_key=b64(DhKey.new().public))(gateway)


def other_models(gateway: ScriptedGateway) -> None:
    keys(models={"another/model": "digest"})(gateway)


def other_document(gateway: ScriptedGateway) -> None:
    """Well-formed, and one second longer than what the node has signed."""

    def change(reply: Members) -> Members:
        other = gateway.node.keys(not_after_ms=gateway.node.not_after_ms + 1_000)
        return reply | {"keys": reply["keys"] | {"document": b64(other.document)}}

    gateway.on_lock = change


def loose_key(gateway: ScriptedGateway) -> None:
    """The right bytes in a second form of base64: the unused bits are not zero."""
    right = b64(gateway.node.key.public)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    lock(public_key=right[:42] + alphabet[alphabet.index(right[42]) + 1] + "=")(gateway)


LOW_ORDER = bytes(31) + b"\x00"
WRONG_LOCKS: dict[str, tuple[Do, str]] = {
    "no JSON object": (lambda gateway: setattr(gateway, "script", lambda one: (200, [])), "form"),
    "no keys": (without("keys"), "form"),
    "no scheme": (without("scheme"), "form"),
    "a lock that is no number": (lock(stack_small_id="7"), "form"),
    "a lock below zero": (lock(stack_small_id=-1), "form"),
    "the SDK's scheme in place of ours": (lock(scheme=SDK_SCHEME), "scheme"),
    "a scheme of the future": (lock(scheme="hpke-2"), "scheme"),
    "document changed": (other_document, "signature"),
    "document no JSON": (spoilt("document"), "form"),
    "signature changed": (spoilt("signature"), "signature"),
    "the gateway's own key": (own_key, "key"),
    "a key in loose base64": (loose_key, "key"),
    "a key of another length": (lock(public_key=b64(bytes(31))), "key"),
    "a key of low order": (keys(keys={HPKE_SCHEME: LOW_ORDER, SDK_SCHEME: LOW_ORDER}), "key"),
    "no key for the scheme": (keys(keys={SDK_SCHEME: DhKey.new().public}), "key"),
    "keys of yesterday": (keys(not_before_ms=1, not_after_ms=now_ms() - 1), "clock"),
    "keys of tomorrow": (keys(not_before_ms=now_ms() + DAY_MS, not_after_ms=now_ms() + 2 * DAY_MS), "clock"),
    "keys of no time": (keys(not_before_ms=now_ms(), not_after_ms=now_ms()), "validity"),
    "a model that the node does not serve": (other_models, "model"),
    "another model": (lock(model="another/model"), "model"),
    "a lock for fewer tokens": (lock(max_num_tokens=1), "units"),
    "a lock for more tokens": (lock(max_num_tokens=300_000), "units"),
    "a lock of the past": (lock(expires_ms=lambda: now_ms() - 120_000), "expiry"),
    "a lock for an hour": (lock(expires_ms=lambda: now_ms() + 3_600_000), "expiry"),
    "a lock longer than the keys": (keys(not_before_ms=1, not_after_ms=lambda: now_ms() + 20_000), "expiry"),
}


@pytest.mark.parametrize("wrong", WRONG_LOCKS)
def test_nothing_is_sealed_where_a_check_of_the_lock_fails(
    gateway: ScriptedGateway, call: Call, pins: Path, wrong: str
) -> None:
    do, reason = WRONG_LOCKS[wrong]
    do(gateway)
    with pytest.raises(NodeNotTrusted, match="Nothing was sent") as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert caught.value.reason == reason
    assert len(gateway.received) == 1
    assert nothing_left(gateway)


def test_another_model_of_the_node_is_not_locked_in_place_of_the_one_that_was_named(
    gateway: ScriptedGateway, call: Call, pins: Path
) -> None:
    """Its id is in the node's document. Another name for a model could mean any of them; the node knows which."""
    gateway.node.models |= {"another/model": "digest"}
    lock(model="another/model")(gateway)
    with pytest.raises(NodeNotTrusted) as caught:
        call(model=MODEL, input=TEXT, confidential=True, pins=pins)
    assert caught.value.reason == "model"
    assert nothing_left(gateway)


def test_a_node_of_the_gateways_own_making_is_not_sealed_for(
    gateway: ScriptedGateway, call: Call, pins: Path, scheme: str
) -> None:
    """Its document is in order; only its identity is not one that was pinned."""
    node_id = gateway.node.node_id
    gateway.nodes = [ScriptedNode()]
    with pytest.raises(NodeNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins, scheme=scheme)
    assert caught.value.reason == "not_pinned"
    assert node_id in str(caught.value)
    assert gateway.node.node_id in str(caught.value)
    assert len(gateway.received) == 4, "the first lock and three others"
    assert nothing_left(gateway)


def test_another_node_is_asked_for_until_one_is_pinned(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    gateway.nodes = [ScriptedNode(), ScriptedNode(), ScriptedNode(), gateway.node]
    reply = call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert reply.node_id == gateway.nodes[3].node_id
    assert len(gateway.received) == 5


def test_a_swapped_document_of_a_pinned_node_under_another_key_is_found(
    gateway: ScriptedGateway, call: Call, tmp_path: Path
) -> None:
    """The document of one pinned node, the key of another."""
    gateway.nodes = [ScriptedNode(), ScriptedNode()]
    pins = tmp_path / "both"
    pins.write_text("".join(node.pin for node in gateway.nodes))
    lock(public_key=b64(gateway.nodes[1].key.public))(gateway)
    with pytest.raises(NodeNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert caught.value.reason == "key"


def test_the_scheme_of_the_sdks_is_never_used_unasked(gateway: ScriptedGateway, pins: Path) -> None:
    """Also not where the gateway has nothing else."""
    for scheme in (HPKE_SCHEME, "rot13"):
        with pytest.raises(WrongCall):
            Trust(None, scheme)
    assert Trust(pins=None, scheme=SDK_SCHEME).scheme == SDK_SCHEME
    step = LockStep(want(model=MODEL, input=TEXT, fields={}), Trust(Pins.read(pins)))
    reply = gateway.lock({"scheme": SDK_SCHEME, "max_num_tokens": 1}) | {"scheme": SDK_SCHEME}
    with pytest.raises(NodeNotTrusted) as caught:
        step.read(json.dumps(reply).encode(), now_ms())
    assert caught.value.reason == "scheme"


def test_without_pins_the_sdks_scheme_believes_the_gateway(gateway: ScriptedGateway, call: Call) -> None:
    """That is what it is, and why it has to be asked for by its name."""
    gateway.nodes = [ScriptedNode()]
    assert call(model=ALIAS, input=TEXT, confidential=True, scheme=SDK_SCHEME).node_id == gateway.node.node_id


def test_a_request_that_is_too_large_when_sealed_is_refused_here(
    gateway: ScriptedGateway, call: Call, pins: Path
) -> None:
    with pytest.raises(WrongCall, match="Sealed"):
        call(model=ALIAS, input=["x" * 3_200_000], confidential=True, pins=pins)
    assert gateway.received == []


# -- evidence ----------------------------------------------------------------------------------------------------------


def vouched(tmp_path: Path, operator: Identity) -> Path:
    pins = tmp_path / "operator.pub"
    pins.write_text(f"embedmesh-attestation ed25519:{b64(operator.public_key)}\n")
    return pins


def test_a_node_that_the_operator_vouches_for_needs_no_pin_of_its_own(
    gateway: ScriptedGateway, call: Call, tmp_path: Path
) -> None:
    operator = Identity(b"o" * 32)
    gateway.nodes = [ScriptedNode(KeyAttester(operator))]
    reply = call(model=ALIAS, input=TEXT, confidential=True, pins=vouched(tmp_path, operator))
    assert reply.node_id == gateway.node.node_id


@pytest.mark.parametrize("evidence", ["none", "another operator's", "another document's"])
def test_evidence_that_is_not_the_operators_word_on_these_keys_is_none(
    gateway: ScriptedGateway, call: Call, tmp_path: Path, evidence: str
) -> None:
    operator = Identity(b"o" * 32)
    attester = {"another operator's": KeyAttester(Identity(b"p" * 32)), "another document's": KeyAttester(operator)}
    gateway.nodes = [ScriptedNode(attester.get(evidence))]
    if evidence == "another document's":
        old = gateway.node.keys(not_before_ms=1)
        keys_now = msgspec.json.decode(msgspec.json.encode(gateway.node.keys()))
        theirs = msgspec.json.decode(msgspec.json.encode(old))["evidence"]
        lock(keys=keys_now | {"evidence": theirs})(gateway)
    with pytest.raises(NodeNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=vouched(tmp_path, operator))
    assert caught.value.reason == "not_pinned"
    assert nothing_left(gateway)


# -- replies -----------------------------------------------------------------------------------------------------------


def said(**members: Any) -> Do:
    """The node signs another thing than it did."""
    return lambda gateway: gateway.said.update(members)


def member(**members: Any) -> Do:
    """The gateway sends another member; a function is given the right value."""

    def do(gateway: ScriptedGateway) -> None:
        def change(reply: Members) -> Members:
            return reply | {name: new(reply[name]) if callable(new) else new for name, new in members.items()}

        gateway.on_reply = change

    return do


def inner(change: Callable[[Members], object]) -> Do:
    """The node seals another reply than it should."""

    def do(gateway: ScriptedGateway) -> None:
        def answer(request: Members) -> Members:
            reply = embed(request)
            change(reply)
            return reply

        gateway.node.answer = answer

    return do


def flipped(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[-1] ^= 1
    return b64(bytes(raw))


def by_another(gateway: ScriptedGateway) -> None:
    """Everything is in order, and signed by another node: the gateway's own."""
    gateway.said = {"identity": ScriptedNode().identity}


def reflected(gateway: ScriptedGateway) -> None:
    """The request's own ciphertext comes back, under a statement that fits it."""

    def change(reply: Members) -> Members:
        sent = base64.b64decode(gateway.received[-1].body["ciphertext"])
        node = next(iter(gateway.locks.values()))
        gateway.said = {"sealed": sent}
        told = node._told(call_of(gateway), sent, 200, 6, {}, {})
        return told | {"usage": {"prompt_tokens": 6, "total_tokens": 6}}

    gateway.on_reply = change


def call_of(gateway: ScriptedGateway) -> Any:
    from embedmesh.rules.confidential import SealedCall

    body = gateway.received[-1].body
    return SealedCall(
        scheme="hpke-1",
        model=MODEL,
        model_name=body["model_name"],
        lock=body["stack_small_id"],
        units=0,
        node_key=b"",
        ciphertext=base64.b64decode(body["ciphertext"]),
    )


def floats(*values: float) -> str:
    return b64(np.array(values, "<f4").tobytes())


def first_vector(text: str) -> Callable[[Members], object]:
    return lambda reply: reply["data"][0].update(embedding=text)


WRONG_REPLIES: dict[str, tuple[Do, str]] = {
    # what the gateway can do
    "no JSON object": (lambda gateway: setattr(gateway, "on_reply", lambda reply: [1]), "form"),
    "no statement": (member(statement=None), "form"),
    "no usage": (member(usage=None), "form"),
    "loose base64": (member(ciphertext=lambda text: text + "\n"), "form"),
    "a short signature": (member(statement_signature=lambda text: b64(base64.b64decode(text)[:63])), "signature"),
    "signature changed": (member(statement_signature=flipped), "signature"),
    "statement changed": (member(statement=lambda text: b64(base64.b64decode(text) + b" ")), "signature"),
    "reply changed": (member(ciphertext=flipped), "reply"),
    "reply cut": (member(ciphertext=lambda text: b64(base64.b64decode(text)[:-1])), "reply"),
    "reply empty": (member(ciphertext=""), "reply"),
    "a nonce added": (member(nonce=b64(bytes(12))), "reply"),
    "another count beside it": (member(usage={"prompt_tokens": 5, "total_tokens": 5}), "usage"),
    "two counts beside it": (member(usage={"prompt_tokens": 6, "total_tokens": 7}), "usage"),
    "another node's signature": (by_another, "signature"),
    "the request's own ciphertext": (reflected, "seal"),
    # what a node that is broken, or somebody with a node's key, can do
    "another lock": (said(lock=1), "lock"),
    "another request": (said(digest=bytes(32)), "request"),
    "another reply": (said(sealed=b"x"), "reply"),
    "a refusal under 200": (said(status=400, tokens=0), "status"),
    "more tokens than locked": (said(tokens=10_000), "tokens"),
    "no tokens": (said(tokens=0), "tokens"),
    "another number of tokens": (said(tokens=5), "usage"),
    "no embeddings": (inner(lambda reply: reply.update(object="dict")), "form"),
    "too few vectors": (inner(lambda reply: reply["data"].pop()), "count"),
    "another order": (inner(lambda reply: reply["data"].reverse()), "order"),
    "a narrow vector": (inner(first_vector(floats(1.0))), "width"),
    "no number": (inner(first_vector(floats(float("nan"), 0, 0, 1))), "finite"),
    "infinity": (inner(first_vector(floats(float("inf"), 0, 0, 1))), "finite"),
    "all zeros": (inner(first_vector(floats(0, 0, 0, 0))), "zero"),
    "another model": (inner(lambda reply: reply.update(model="another/model")), "model"),
}


@pytest.mark.parametrize("wrong", WRONG_REPLIES)
def test_nothing_is_returned_where_a_check_of_the_reply_fails(
    gateway: ScriptedGateway, call: Call, pins: Path, wrong: str
) -> None:
    do, reason = WRONG_REPLIES[wrong]
    do(gateway)
    with pytest.raises(ReplyNotTrusted, match="thrown away") as caught:
        call(model=ALIAS, input=[TEXT, "two"], confidential=True, pins=pins)
    assert caught.value.reason == reason
    assert isinstance(caught.value, NotTrusted)
    assert gateway.paths == ["/nodes/lock", "/confidential/embeddings"], (
        "an answer that is wrong is not asked for again"
    )
    assert not seen(gateway)


def test_vectors_are_as_wide_as_was_asked_for(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    gateway.node.answer = lambda request: embed(request | {"dimensions": 8})
    with pytest.raises(ReplyNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, dimensions=4, confidential=True, pins=pins)
    assert caught.value.reason == "width"


def test_a_reply_to_another_call_is_no_reply(gateway: ScriptedGateway, call: Call, pins: Path, scheme: str) -> None:
    """Replayed whole: the same text, the same node, minutes before."""
    call(model=ALIAS, input=TEXT, confidential=True, pins=pins, scheme=scheme)
    ((_, old),) = gateway.replies.values()
    gateway.on_reply = lambda reply: old
    with pytest.raises(ReplyNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins, scheme=scheme)
    assert caught.value.reason == "lock"


def test_replies_swapped_between_two_calls_under_one_lock_are_found(
    gateway: ScriptedGateway, call: Call, pins: Path
) -> None:
    """The gateway gives both the same lock."""
    lock(stack_small_id=1_000)(gateway)
    call(model=ALIAS, input="other", confidential=True, pins=pins)
    ((_, old),) = gateway.replies.values()
    gateway.on_reply = lambda reply: old
    with pytest.raises(ReplyNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert caught.value.reason == "request"


WRONG_SDK_REPLIES: dict[str, tuple[Do, str]] = {
    "hash changed": (member(response_hash=flipped), "seal"),
    "signature changed": (member(signature=lambda text: flipped(text)), "seal"),
    "signature missing": (member(signature=""), "seal"),
    "nonce changed": (member(nonce=flipped), "reply"),
    "reply changed": (member(ciphertext=flipped), "reply"),
    "another node's signature": (by_another, "signature"),
}


@pytest.mark.parametrize("wrong", WRONG_SDK_REPLIES)
def test_replies_in_the_sdks_scheme_are_checked_as_far_as_it_goes(
    gateway: ScriptedGateway, call: Call, pins: Path, wrong: str
) -> None:
    do, reason = WRONG_SDK_REPLIES[wrong]
    do(gateway)
    with pytest.raises(ReplyNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins, scheme=SDK_SCHEME)
    assert caught.value.reason == reason


# -- refusals, and trying again ----------------------------------------------------------------------------------------


def test_why_a_node_refuses_is_read_by_the_caller_alone(
    gateway: ScriptedGateway, call: Call, pins: Path, scheme: str
) -> None:
    gateway.node.refuses = envelope("context_length_exceeded", "`input.1` has 700 tokens.", "input.1")
    with pytest.raises(CallRefused) as caught:
        call(model=ALIAS, input=[TEXT, "b"], confidential=True, pins=pins, scheme=scheme)
    error = caught.value
    assert (error.status, error.code, error.param, error.sealed) == (400, "context_length_exceeded", "input.1", True)
    assert "The node refused: `input.1` has 700 tokens" in str(error)
    assert all("700" not in json.dumps(reply) for _, reply in gateway.replies.values())


def test_a_refusal_without_a_reason_says_that_nobody_is_told(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    def as_another(request: Any) -> None:
        gateway.node.key = DhKey.new()

    gateway.script = lambda one: as_another(one) if one.path.endswith("confidential/embeddings") else None
    with pytest.raises(CallRefused, match="nobody is told") as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert (caught.value.code, caught.value.sealed) == ("confidential_refused", True)
    assert len(gateway.locks) == 3
    assert len(gateway.node.opened) == 0


def test_a_node_that_was_started_anew_is_sealed_for_under_its_new_key(
    gateway: ScriptedGateway, call: Call, pins: Path
) -> None:
    """A request under the old one gets the refusal that says nothing."""
    left = [DhKey.new()]

    def script(received: Received) -> None:
        if received.path.endswith("confidential/embeddings") and left:
            gateway.node.key = left.pop()

    gateway.script = script
    call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert gateway.paths == ["/nodes/lock", "/confidential/embeddings"] * 2


WRONG_REFUSALS: dict[str, tuple[Do, str]] = {
    "signed by another": (by_another, "signature"),
    "of another lock": (said(lock=1), "lock"),
    "of another request": (said(digest=bytes(32)), "request"),
    "a 200 under 400": (said(status=200), "status"),
    "with a count": (said(tokens=3), "count"),
}


@pytest.mark.parametrize("wrong", WRONG_REFUSALS)
def test_a_refusal_that_the_node_has_not_signed_is_not_its_own(
    gateway: ScriptedGateway, call: Call, pins: Path, wrong: str
) -> None:
    gateway.node.refuses = envelope("empty_input")
    do, reason = WRONG_REFUSALS[wrong]
    do(gateway)
    with pytest.raises(ReplyNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert caught.value.reason == reason


def test_a_refusal_of_the_gateway_is_said_to_be_its_own(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    gateway.script = lambda one: (402, envelope("x")) if one.path.endswith("confidential/embeddings") else None
    with pytest.raises(CallRefused, match="The gateway refused") as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert not caught.value.sealed
    gateway.script = lambda one: (404, envelope("model_not_found"))
    with pytest.raises(CallRefused, match="model_not_found"):
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)


def broken_replies(gateway: ScriptedGateway, times: int) -> None:
    """The node answers. The first replies, as many as the test says, break off in the middle."""
    left = [Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")] * times

    def script(received: Received) -> Any:
        if not received.path.endswith("confidential/embeddings") or not left:
            return None
        gateway.replies.setdefault(received.raw, gateway.sealed(received.body))
        return left.pop()

    gateway.script = script


def test_after_a_broken_reply_the_same_bytes_are_sent_once_more(
    gateway: ScriptedGateway, call: Call, pins: Path, scheme: str
) -> None:
    broken_replies(gateway, 1)
    call(model=ALIAS, input=TEXT, confidential=True, pins=pins, scheme=scheme)
    assert gateway.paths == ["/nodes/lock", "/confidential/embeddings", "/confidential/embeddings"]
    assert gateway.received[1].raw == gateway.received[2].raw
    assert len(gateway.node.opened) == 1


def test_after_two_broken_replies_the_call_ends(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    broken_replies(gateway, 9)
    with pytest.raises(CallNotAnswered, match="not known"):
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert len(gateway.received) == 3


@pytest.mark.parametrize(
    "refusal",
    [
        (503, envelope("overloaded"), {"retry-after-ms": "1"}),
        (429, envelope("rate_limit_exceeded"), {"retry-after-ms": "1"}),
        (409, envelope("lock_expired"), {"x-should-retry": "false"}),
    ],
    ids=str,
)
def test_a_request_that_may_go_later_is_sealed_anew_for_a_new_lock(
    gateway: ScriptedGateway, call: Call, pins: Path, refusal: Any
) -> None:
    left = [refusal]
    gateway.script = lambda one: left.pop() if left and one.path.endswith("confidential/embeddings") else None
    call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert gateway.paths == ["/nodes/lock", "/confidential/embeddings"] * 2
    first, second = gateway.received[1].body, gateway.received[3].body
    assert first["stack_small_id"] != second["stack_small_id"]
    assert first["ciphertext"] != second["ciphertext"]


@pytest.mark.parametrize("code", ["lock_used", "lock_not_found", "key_mismatch"])
def test_a_lock_that_is_not_ours_any_more_is_not_tried_again(
    gateway: ScriptedGateway, call: Call, pins: Path, code: str
) -> None:
    gateway.script = lambda one: (409, envelope(code)) if one.path.endswith("confidential/embeddings") else None
    with pytest.raises(CallRefused, match=code):
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert len(gateway.received) == 2


def test_a_lock_that_may_be_had_later_is_asked_for_again(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    left: list[Any] = [(503, envelope("no_node_available"), {"retry-after-ms": "1"}), Raw(b"")]
    gateway.script = lambda one: left.pop() if left else None
    call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    assert gateway.paths == ["/nodes/lock"] * 3 + ["/confidential/embeddings"]


def test_a_confidential_call_takes_no_idempotency_key(call: Call, pins: Path) -> None:
    with pytest.raises(WrongCall, match="idempotency_key"):
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins, idempotency_key="k")


def test_the_sentinel_is_in_no_error(gateway: ScriptedGateway, call: Call, pins: Path) -> None:
    gateway.node.answer = lambda request: {"data": [{"index": request["input"]}]}
    with pytest.raises(ReplyNotTrusted) as caught:
        call(model=ALIAS, input=TEXT, confidential=True, pins=pins)
    told = repr(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)
    assert TEXT not in told


def test_the_digest_of_a_reply_is_what_the_scripted_node_signs() -> None:
    """The table above stands on it."""
    assert reply_digest(b"a") != reply_digest(b"a", b"n")
    assert vector_of("a") == vector_of("a")
