"""Confidential requests through the spine: a lock pays, once; nobody but the node reads; what is wrong is free."""

import asyncio
import json
from binascii import a2b_base64
from typing import Any
from unicodedata import normalize

import msgspec
import numpy as np
import pytest
from pytest import MonkeyPatch

from embedmesh.confidential.hpke_scheme import pad
from embedmesh.dialects.openai.render import render as render_embeddings
from embedmesh.engine.cl100k import Cl100k
from embedmesh.flow import paid
from embedmesh.flow.confidential import TOKENS_OF_BYTE_MAX, ConfidentialEmbeddings, token_bounds
from embedmesh.flow.lock import lock_node
from embedmesh.flow.paid import serve
from embedmesh.gateway.api.confidential_api import ConfidentialApi, EnvelopeForm, LockRequest
from embedmesh.gateway.api.routes import ApiCall
from embedmesh.http.bodies import CALLER
from embedmesh.provision.assets import find_cl100k
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME, LockTerms, SealedAnswer
from embedmesh.rules.embeddings import Call
from embedmesh.rules.errors import Failure, NodeBroke, NodeBusy, Overloaded, WrongAnswer
from embedmesh.rules.exchange import Deliver, Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Answer, Share
from embedmesh.rules.holds import Hold
from embedmesh.rules.limits import BYTES_A_TOKEN_MAX, KEPT_REPLIES_BYTES_MAX
from embedmesh.rules.ports import Caller
from embedmesh.rules.shares import Room
from tests.flow.sealed import DictLocks, SealedNode, envelope
from tests.flow.world import GOOD_KEY, MODEL, SINGLE_KEY, ScriptedWorld, make_world, undelivered

TEXT = b'{"input":"abc","model":"tiny"}'
OTHER_KEYS = "em_penny"  # of another account


class Scene:
    """A world with one node that takes confidential requests."""

    def __init__(self) -> None:
        self.world: ScriptedWorld = make_world()
        self.node = SealedNode(self.world)
        self.locks = DictLocks(self.world)
        self.operation = ConfidentialEmbeddings(EnvelopeForm(), self.locks, self.node, "embeddings")

    async def lock(self, units: int = 100, span_s: int = 30, key: str = GOOD_KEY) -> LockTerms:
        caller = self.world.keys.known(key, 0.0)
        assert isinstance(caller, Caller)
        terms, _ = await lock_node(self.world, self.locks, self.node, caller, "tiny", units, span_s, SDK_SCHEME)
        return terms

    async def send(self, body: bytes, key: str = GOOD_KEY, deliver: Deliver | None = None) -> dict[str, Any]:
        replies: list[Reply] = []

        async def receive(account_id: str) -> bytes:
            return body

        async def take(reply: Reply | StreamedReply) -> Delivery:
            assert isinstance(reply, Reply)
            replies.append(reply)
            return Delivery.WHOLE

        await serve(self.world, self.operation, RequestHead(f"Bearer {key}"), receive, deliver or take)
        return json.loads(replies[0].body) if replies else {}

    async def refused(self, body: bytes, key: str = GOOD_KEY) -> str:
        with pytest.raises(Failure) as failure:
            await self.send(body, key)
        error = json.loads(self.operation.envelope(failure.value))["error"]
        assert error["code"] == failure.value.code
        assert error["message"]
        return str(error["code"])

    @property
    def log(self) -> list[tuple[str, int]]:
        return self.world.ledger.log


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_a_lock_pays_for_one_request_and_the_rest_goes_back(scene: Scene) -> None:
    terms = await scene.lock(units=100)
    assert scene.log == [("hold", 150)]
    body, replies = envelope(TEXT, terms.node_key, terms.lock_id)
    reply = await scene.send(body)
    opened = replies.open(*(a2b_base64(reply[name]) for name in ("nonce", "ciphertext", "response_hash")))
    assert opened == TEXT.upper()
    assert reply["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert scene.log == [("hold", 150), ("capture", 8)]  # five tokens, rounded up


async def test_the_node_gets_the_locks_words_and_not_the_callers(scene: Scene) -> None:
    terms = await scene.lock(units=64)
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id, num_compute_units=10**9)
    await scene.send(body)
    (call,) = scene.node.asked
    assert (call.model, call.model_name, call.units, call.lock) == (MODEL.id, "tiny", 64, terms.lock_id)


async def test_the_same_body_again_gets_the_same_ciphertext_and_no_second_charge(scene: Scene) -> None:
    terms = await scene.lock()
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    first = await scene.send(body)
    assert await scene.send(body) == first
    assert len(scene.node.asked) == 1
    assert [what for what, _ in scene.log] == ["hold", "capture"]


async def test_another_body_under_a_used_lock_is_refused(scene: Scene) -> None:
    terms = await scene.lock()
    await scene.send(envelope(TEXT, terms.node_key, terms.lock_id)[0])
    assert await scene.refused(envelope(TEXT, terms.node_key, terms.lock_id)[0]) == "lock_used"
    assert [what for what, _ in scene.log] == ["hold", "capture"]


async def test_a_failed_request_uses_the_lock_up_and_frees_its_money(scene: Scene) -> None:
    terms = await scene.lock()
    scene.node.script.append(NodeBroke("broke"))
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    assert await scene.refused(body) == "no_node_available"
    assert [what for what, _ in scene.log] == ["hold", "release"]
    assert await scene.refused(body) == "lock_used"


@pytest.mark.parametrize(
    ("failure", "code"),
    [(NodeBusy("busy", retry_after_s=1.0), "overloaded"), (WrongAnswer("forged"), "bad_node_response")],
)
async def test_only_the_locked_node_is_asked(failure: BaseException, code: str) -> None:
    scene = Scene()
    scene.world = make_world(nodes=3)
    scene.node.world = scene.locks.world = scene.world
    terms = await scene.lock()
    scene.node.script.append(failure)
    assert await scene.refused(envelope(TEXT, terms.node_key, terms.lock_id)[0]) == code
    assert len(scene.node.asked) == 1
    assert scene.log[-1] == ("release", 150)


async def test_what_the_node_refuses_is_free_and_its_reason_goes_on_sealed(scene: Scene) -> None:
    terms = await scene.lock()
    scene.node.refuse = True
    with pytest.raises(Failure) as refused:
        await scene.send(envelope(TEXT, terms.node_key, terms.lock_id)[0])
    error = json.loads(scene.operation.envelope(refused.value))["error"]
    assert error["code"] == "confidential_refused"
    assert error["sealed"]["ciphertext"] == ""
    assert scene.log == [("hold", 150), ("release", 150)]
    assert scene.world.fleet.registry.find("n0").failures_in_a_row == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("counted", "charged"), [(5, 23), (1, 23), (24, 24), (100, 100)])
async def test_the_nodes_count_is_charged_or_the_least(scene: Scene, counted: int, charged: int) -> None:
    """At least a token for every BYTES_A_TOKEN_MAX; the gateway's node client refuses a count above the most."""
    terms = await scene.lock(units=100)
    scene.node.tokens = counted
    text = TEXT + b" " * (256 + 23 * BYTES_A_TOKEN_MAX)
    reply = await scene.send(envelope(text, terms.node_key, terms.lock_id)[0])
    assert reply["usage"]["total_tokens"] == counted
    assert scene.log[-1] == ("capture", -(-charged * 3 // 2))


def test_bounds_follow_from_length_and_lock() -> None:
    assert token_bounds(256 + 1_280, 300_000, 2) == (10, 1_536 + 384 * 2, 1_536 * TOKENS_OF_BYTE_MAX + 384 * 2)
    assert token_bounds(256 + 1_280, 100, 2) == (10, 100, 100)
    assert token_bounds(256 + 127, 100, 2) == (0, 100, 100)
    assert token_bounds(256 + 128_000, 100, 2) == (100, 8_000, 100)
    assert token_bounds(0, 100, 2) == (0, 1, 1)


def test_no_text_has_more_tokens_than_its_bytes_can_be() -> None:
    """Else a caller could have an honest node found lying: by what normalising makes longer, or by ids of cl100k."""
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assert max(len(normalize("NFKC", each).encode()) / len(each.encode()) for each in letters) < TOKENS_OF_BYTE_MAX
    ranks = find_cl100k()
    if ranks is None:
        pytest.skip("cl100k is not installed")
    decoder = Cl100k(ranks)
    spelled = [len(decoder.decode([number]).encode()) / len(f"{number},") for number in range(100_256)]
    assert 20 < max(spelled) < TOKENS_OF_BYTE_MAX


async def test_an_honest_count_of_ids_that_stand_for_long_words_is_believed(scene: Scene) -> None:
    """The id 67307 of cl100k is five digits and 113 bytes: a node that counts them has not lied."""
    terms = await scene.lock(units=100_000)
    text = b'{"input":[' + b",".join([b"[67307]"] * 10) + b'],"model":"tiny"}'
    scene.node.tokens = 10 * 114
    await scene.send(envelope(text, terms.node_key, terms.lock_id)[0])
    assert scene.node.tokens_max[0] >= 10 * 114
    plaintext_likely = token_bounds(len(text), 100_000, 2 + len("q: ")).likely
    assert scene.world.rate_limits.in_vain == [10 * 114 - plaintext_likely]  # the rest of what was embedded


@pytest.mark.parametrize("inputs", [1, 3, 300, 2_048])
async def test_no_honest_answer_is_longer_than_is_read_of_one(scene: Scene, inputs: int) -> None:
    """Shortest inputs, longest numbers: else a caller could have a node found lying by what its model is."""
    text = msgspec.json.encode({"input": ["a"] * inputs, "model": "tiny"})
    answer = Answer(np.full(4 * inputs, -1.1754944e-38, "<f4").tobytes(), 4, inputs, (Share("n0", inputs),))
    reply = render_embeddings(Call(model="tiny", texts=["a"] * inputs), 0, answer, {}).body
    assert reply.count(b"-1.1754944e-38") == 4 * inputs
    terms = await scene.lock()
    await scene.send(envelope(text, terms.node_key, terms.lock_id)[0])
    answered = msgspec.msgpack.encode(SealedAnswer(bytes(1_000), bytes(64), bytes(len(pad(reply)) + 32)))
    assert len(answered) <= scene.node.bytes_max[0]


@pytest.mark.parametrize("refuse", [True, False])
async def test_a_small_lock_does_not_make_a_large_request_cheap_for_its_limits(scene: Scene, refuse: bool) -> None:
    """A node opens, parses and counts what is refused then: it takes what any refused body takes."""
    terms = await scene.lock(units=1)
    scene.node.refuse = refuse
    body, _ = envelope(TEXT + b" " * (160_000 + 256), terms.node_key, terms.lock_id)
    if refuse:
        assert await scene.refused(body) == "confidential_refused"
    else:
        scene.node.script.append(NodeBroke("broke"))
        assert await scene.refused(body) == "no_node_available"
    assert scene.world.rate_limits.asked == [10_000 + len(TEXT) // 16]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"stack_small_id": 1}, "lock_not_found"),
        ({"node_dh_public_key": "B6N8vBQgk8i3VdwbEOhstCY3StFqqFPtC9/AsrhtHHw="}, "key_mismatch"),
        ({"model_name": "acme/native"}, "key_mismatch"),
        ({"model_name": "acme/other"}, "model_not_found"),
        ({"stream": True}, "invalid_value"),
        ({"salt": None}, "missing_parameter"),
        ({"salt": "EBESExQVFhcYGRobHB0e"}, "invalid_value"),
        ({"nonce": "ICEiIyQlJicoKSo="}, "invalid_value"),
        ({"nonce": "ICEiIyQlJicoKSor\n"}, "invalid_value"),
        ({"nonce": "ICEiIyQlJicoKSo"}, "invalid_value"),
        ({"ciphertext": "AAAA"}, "invalid_value"),
        ({"ciphertext": 5}, "invalid_type"),
        ({"stack_small_id": 10**15}, "invalid_type"),
        ({"stack_small_id": -1}, "invalid_type"),
        ({"scheme": HPKE_SCHEME}, "missing_parameter"),
        ({"scheme": HPKE_SCHEME, "request_id": "r", "expires_ms": 1}, "key_mismatch"),
        ({"scheme": "none"}, "invalid_type"),
    ],
)
async def test_a_wrong_envelope_is_refused_by_name_and_the_lock_stays(
    scene: Scene, change: dict[str, Any], code: str
) -> None:
    terms = await scene.lock()
    text = TEXT + b" " * 64
    assert await scene.refused(envelope(text, terms.node_key, terms.lock_id, **change)[0]) == code
    assert scene.log == [("hold", 150)]
    assert not scene.node.asked
    await scene.send(envelope(text, terms.node_key, terms.lock_id)[0])
    assert scene.log[-1][0] == "capture"


@pytest.mark.parametrize(("later_ms", "code"), [(0, "confidential_refused"), (1, "key_mismatch"), (-1, "key_mismatch")])
async def test_what_is_sealed_for_another_expiry_is_not_for_this_lock(scene: Scene, later_ms: int, code: str) -> None:
    """In our scheme the client has sealed it: somebody has told it another one than the gateway's."""
    terms = await scene.lock()
    scene.locks.locks[terms.lock_id] = msgspec.structs.replace(terms, scheme=HPKE_SCHEME)
    scene.node.refuse = True
    more = {"scheme": HPKE_SCHEME, "request_id": "r", "expires_ms": terms.expires_ms + later_ms}
    assert await scene.refused(envelope(TEXT + b" " * 64, terms.node_key, terms.lock_id, **more)[0]) == code


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'"a"', b"\xff", b"[" * 2_000])
async def test_what_is_no_envelope_is_refused(scene: Scene, body: bytes) -> None:
    assert await scene.refused(body) in ("invalid_json", "invalid_type", "missing_parameter")
    assert not scene.log


async def test_a_lock_of_another_account_is_not_there(scene: Scene) -> None:
    terms = await scene.lock()
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    assert await scene.refused(body, OTHER_KEYS) == "lock_not_found"
    assert scene.log == [("hold", 150)]


async def test_an_expired_lock_is_refused(scene: Scene) -> None:
    terms = await scene.lock(span_s=5)
    scene.world.clock.now += 6
    assert await scene.refused(envelope(TEXT, terms.node_key, terms.lock_id)[0]) == "lock_expired"


@pytest.mark.parametrize(
    ("units", "span_s", "code"),
    [(0, 30, "invalid_value"), (300_001, 30, "invalid_value"), (1, 4, "invalid_value"), (1, 61, "invalid_value")],
)
async def test_locks_are_bounded(scene: Scene, units: int, span_s: int, code: str) -> None:
    with pytest.raises(Failure) as refused:
        await scene.lock(units, span_s)
    assert refused.value.code == code
    assert not scene.log


async def test_whichever_key_uses_a_lock_the_budget_of_the_key_that_has_it_pays(scene: Scene) -> None:
    """Else two keys could spend without end: what one has held would never be counted as spent, nor checked."""
    terms = await scene.lock()
    await scene.send(envelope(TEXT, terms.node_key, terms.lock_id)[0], SINGLE_KEY)
    assert [charge.key_id for charge in scene.world.ledger.charges] == ["key_1"]


async def test_a_gateway_that_has_another_node_of_that_name_leaves_the_lock_unused(scene: Scene) -> None:
    """Each gateway may have a node `local`. A reply that was kept is found at any of them."""
    terms = await scene.lock()
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    scene.node.here = False
    assert await scene.refused(body) == "no_node_available"
    assert not scene.node.asked
    scene.node.here = True
    reply = await scene.send(body)
    scene.node.here = False
    assert await scene.send(body) == reply
    assert await scene.refused(envelope(TEXT, terms.node_key, terms.lock_id)[0]) == "lock_used"
    assert len(scene.node.asked) == 1


async def test_locks_under_way_have_a_share_for_each_account(scene: Scene) -> None:
    """Each is a write in the queue that all requests wait for."""
    embeddings: Any = None
    api = ConfidentialApi(scene.world, embeddings, Room(1, "full"), scene.locks, scene.node)
    request: Any = {CALLER: scene.world.keys.known(GOOD_KEY, 0.0)}
    may_open, open_lock = asyncio.Event(), scene.locks.open

    async def slow(terms: LockTerms, hold: Hold) -> None:
        await may_open.wait()
        await open_lock(terms, hold)

    scene.locks.open = slow  # type: ignore[method-assign]
    first = asyncio.create_task(api.lock_node(ApiCall(request, "", LockRequest("tiny"), None)))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await api.lock_node(ApiCall(request, "", LockRequest("tiny"), None))
    may_open.set()
    await first
    assert (await api.lock_node(ApiCall(request, "", LockRequest("tiny"), None))).max_num_tokens


async def test_a_caller_that_goes_before_the_first_byte_pays_nothing(scene: Scene) -> None:
    terms = await scene.lock()

    async def gone(reply: Reply | StreamedReply) -> Delivery:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await scene.send(envelope(TEXT, terms.node_key, terms.lock_id)[0], deliver=gone)
    assert scene.log == [("hold", 150), ("release", 150)]


async def test_a_caller_that_goes_after_the_first_byte_pays(scene: Scene) -> None:
    terms = await scene.lock()

    async def broken(reply: Reply | StreamedReply) -> Delivery:
        return Delivery.BROKEN_OFF

    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    await scene.send(body, deliver=broken)
    assert scene.log == [("hold", 150), ("capture", 8)]
    assert (await scene.send(body))["usage"]["total_tokens"] == 5  # the kept reply
    assert scene.log == [("hold", 150), ("capture", 8)]


async def test_a_key_with_one_slot_gives_it_back(scene: Scene) -> None:
    terms = await scene.lock(key=SINGLE_KEY)
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    await scene.send(body, SINGLE_KEY)
    await scene.send(body, SINGLE_KEY)
    assert not +scene.world.slots.in_use


async def test_a_full_account_is_served_and_its_reply_not_kept(scene: Scene) -> None:
    terms = await scene.lock()
    scene.world.ledger.kept = 10**12
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    await scene.send(body)
    assert await scene.refused(body) == "lock_used"
    assert scene.log == [("hold", 150), ("capture", 8)]


async def test_replies_to_confidential_requests_leave_room_for_those_to_idempotency_keys(scene: Scene) -> None:
    """Nobody asks for them to be kept: they must not have requests refused that do."""
    terms = await scene.lock()
    scene.world.ledger.kept = KEPT_REPLIES_BYTES_MAX // 2
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    await scene.send(body)
    assert await scene.refused(body) == "lock_used"


async def test_a_reply_that_is_too_large_for_the_store_is_not_kept(scene: Scene, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(paid, "KEPT_REPLY_BYTES_MAX", 1_000)
    terms = await scene.lock()
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)
    await scene.send(body)
    await scene.send(body)  # kept
    terms = await scene.lock()
    body, _ = envelope(TEXT + b" " * 1_000, terms.node_key, terms.lock_id)
    await scene.send(body)
    assert await scene.refused(body) == "lock_used"


async def test_an_idempotency_key_is_refused(scene: Scene) -> None:
    terms = await scene.lock()
    body, _ = envelope(TEXT, terms.node_key, terms.lock_id)

    async def receive(account_id: str) -> bytes:
        return body

    head = RequestHead(f"Bearer {GOOD_KEY}", idempotency_key="a")
    with pytest.raises(Failure, match="leave the Idempotency-Key out"):
        await serve(scene.world, scene.operation, head, receive, undelivered)
