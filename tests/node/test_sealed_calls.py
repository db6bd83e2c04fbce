"""A node's answers to confidential calls, by the real handlers and tokenizer, over a scripted engine and clock."""

import asyncio
import base64
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.confidential.documents import read_keys
from embedmesh.confidential.hpke_scheme import padded_size
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.http.receive import BodyBudget
from embedmesh.node.app import NodeApp
from embedmesh.node.confidential import LateOpener, SealedCalls
from embedmesh.node.key_sets import REPLAYS_OF_SET_MAX, KeySets
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.opener import Opener
from embedmesh.node.refusals import REFUSAL_S, REFUSALS_WAITING_MAX
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME, Scheme, SealedAnswer, SealedCall, SignedKeys
from embedmesh.rules.errors import InvalidType, NodeBroke, NoNodeAvailable, Overloaded
from embedmesh.rules.limits import (
    CONFIDENTIAL_KEY_S,
    CONFIDENTIAL_OVERLAP_S,
    REQUEST_BODY_BYTES_MAX,
    SEALED_CALL_BYTES_MAX,
)
from embedmesh.rules.models import Model
from embedmesh.signing.identity import Identity
from tests.data import outside_data
from tests.engine.tiny import catalogue_entry, make_folder
from tests.node.sealing import ENCODE, LOCK, SCHEMES, SealedBy, asking, keys_of, seal
from tests.node.test_key_sets import TwoClocks

NODE = Identity(bytes(range(32)))
SENTINEL = "w7 w7 w7 w13"  # known words, so that it is embedded
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return catalogue_entry(make_folder(tmp_path_factory.mktemp("models") / "tiny"))


class Engine:
    """In place of a served model: its tokenizer is real, a vector is the sum of its input's ids; fails on demand."""

    def __init__(self, model: Model, tokenizer: ModelTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.normal = True
        self.shortage = ""
        self.threads = None
        self.asked: list[list[list[int]]] = []
        self.raises: Exception | None = None
        self.dropped = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def embed(self, ids: list[list[int]], *, alone: bool = False) -> bytes:
        assert alone, "a batch might be shared"
        self.asked.append(ids)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.dropped.set()
            raise
        if self.raises is not None:
            raise self.raises
        return b"".join(np.full(self.model.width, sum(one), "<f4").tobytes() for one in ids)


class Models:
    """The models that are served."""

    def __init__(self, *engines: Engine) -> None:
        self._engines = engines

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines)

    def up(self) -> list[Engine]:
        return list(self._engines)

    def find(self, model_id: str) -> Engine | None:
        return next((one for one in self._engines if one.model.id == model_id), None)


class SealingNode:
    """A node's side of confidential calls: all of it but sockets, and the engine."""

    def __init__(self, model: Model, *, drift_s: float = 0.0) -> None:
        self.clock = DriftingClock(drift_s)
        tokenizer = ModelTokenizer(Path(model.folder), model.max_tokens)
        other = msgspec.structs.replace(model, id="tests/other", aliases=())
        self.engine, self.other = Engine(model, tokenizer), Engine(other, tokenizer)
        self.metrics = NodeMetrics()
        self.keys = KeySets(NODE, self.clock)
        self.opener = LateOpener(lambda: Opener(NODE, self.keys, self.clock))
        self.bodies = BodyBudget(10**8)
        models: Any = Models(self.engine, self.other)
        self.app = NodeApp(models, Catalogue((model, other)), self.metrics, self.bodies, self.opener.signed_keys)
        self.slept: list[float] = []
        self.may_wake = asyncio.Event()
        self.may_wake.set()
        self.calls = SealedCalls(self.app, self.opener, self.metrics, self.bodies, self.clock, self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await self.may_wake.wait()

    @classmethod
    async def start(cls, model: Model, *, drift_s: float = 0.0) -> "SealingNode":
        node = cls(model, drift_s=drift_s)
        await node.opener.make()
        return node

    @property
    def signed(self) -> SignedKeys:
        keys = keys_of(self.app.list_bytes())
        assert keys is not None
        return keys

    def seal(self, scheme: Scheme, body: bytes | None = None, **words: Any) -> SealedBy:
        words.setdefault("expires_ms", self.clock.unix_ms() + 30_000)
        return seal(self.signed, scheme, body, **words)

    async def says(self, sealed: SealedBy) -> tuple[int, Any]:
        """The status in the statement, and the code in the sealed envelope: `vectors` of a reply, "" of nothing."""
        answer, tokens = await self.calls.answer(sealed.body)
        statement, body = sealed.read(answer)
        assert statement.tokens == tokens
        if not body:
            return statement.status, ""
        reply = json.loads(body)
        return statement.status, reply["error"]["code"] if "error" in reply else "vectors"

    def counted(self, outcome: str) -> float:
        page = self.metrics.text()[0].decode()
        return float(page.split(f'embedmesh_node_confidential_calls_total{{outcome="{outcome}"}} ')[1].split()[0])


class DriftingClock(TwoClocks):
    """Goes on by so much each time it is looked at."""

    def __init__(self, drift_s: float) -> None:
        super().__init__()
        self._drift_s = drift_s
        self.seen: list[float] = []

    def monotonic(self) -> float:
        self.now += self._drift_s
        self.seen.append(self.now)
        return self.now


# -- answers


@each_scheme
async def test_a_call_gets_the_ordinary_reply(scheme: Scheme, model: Model) -> None:
    """Sealed for its caller; the statement says what was counted, and the digests are over sealed bytes."""
    node = await SealingNode.start(model)
    sealed = node.seal(scheme, asking(input=["w1 w2", "w3"], encoding_format="base64"))
    answer, tokens = await node.calls.answer(sealed.body)
    statement, body = sealed.read(answer)
    assert (statement.status, statement.lock, statement.tokens, tokens) == (200, LOCK, 7, 7)
    reply = json.loads(body)
    assert (reply["object"], reply["model"]) == ("list", "tiny")
    assert reply["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    vectors = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in reply["data"]]
    assert [vector.tolist() for vector in vectors] == [[11.0] * 16, [7.0] * 16]
    assert node.engine.asked == [[[5, 6], [7]]]
    raw = msgspec.msgpack.decode(answer, type=SealedAnswer)
    assert statement.reply_digest == hashlib.sha256(raw.nonce + raw.sealed).digest()
    assert (node.counted("answered"), node.counted("refused")) == (1.0, 0.0)


@each_scheme
async def test_a_large_call_is_opened_and_printed_elsewhere(scheme: Scheme, model: Model) -> None:
    """With the same result: 2,048 inputs."""
    node = await SealingNode.start(model)
    sealed = node.seal(scheme, asking(input=["w1 w2 w3 w4 w5 w6 w7"] * 2_048), units=300_000)
    answer, tokens = await node.calls.answer(sealed.body)
    assert tokens == 2_048 * 9
    reply = sealed.reply(answer)
    assert len(reply["data"]) == 2_048
    assert reply["data"][-1]["embedding"] == [float(sum(range(5, 12)))] * 16


async def test_each_answer_has_a_nonce_of_its_own(model: Model) -> None:
    """Also of a call that is answered twice, because nothing of it was embedded."""
    node = await SealingNode.start(model)
    sealed = node.seal(SDK_SCHEME, asking(input=[]))
    answers = [msgspec.msgpack.decode((await node.calls.answer(sealed.body))[0], type=SealedAnswer) for _ in range(50)]
    assert len({answer.nonce for answer in answers}) == 50


# -- what cannot be opened


def flip(data: bytes, at: int = 0) -> bytes:
    """With one bit changed."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def lenient(data: bytes) -> bytes:
    """What a decoder that skips what it does not know makes of url-safe base64: something shorter."""
    text = base64.urlsafe_b64encode(b"\xfb\xef\xff" + data).decode().replace("-", "").replace("_", "")
    return base64.b64decode(text[: (len(text) - 1) // 4 * 4])


OTHER_KEY = bytes([9] + [0] * 31)  # the base point: a key of order enough
Change = Callable[[SealedCall], dict[str, Any]]
VECTORS: dict[str, Change] = {  # by the names of the file
    "ciphertext bit": lambda call: {"ciphertext": flip(call.ciphertext)},
    "tag bit": lambda call: {"ciphertext": flip(call.ciphertext, -1)},
    "nonce bit": lambda call: {"nonce": flip(call.nonce)},
    "salt bit": lambda call: {"salt": flip(call.salt)},
    "client key of another": lambda call: {"client_key": OTHER_KEY},
    "node key of another": lambda call: {"node_key": OTHER_KEY},
    "hash of another": lambda call: {"body_hash": hashlib.blake2b(b"other", digest_size=32).digest()},
    "nonce 11 bytes": lambda call: {"nonce": call.nonce[:-1]},
    "salt 15 bytes": lambda call: {"salt": call.salt[:-1]},
    "client key 31 bytes": lambda call: {"client_key": call.client_key[:-1]},
    "client key all zero (low order)": lambda call: {"client_key": bytes(32)},
    "ciphertext 15 bytes": lambda call: {"ciphertext": bytes(15)},
    "url-safe base64": lambda call: {"ciphertext": lenient(call.ciphertext)},
    "no padding": lambda call: {"salt": call.salt[:-1]},
}
OTHERS: dict[str, tuple[Scheme, Change]] = {
    "empty ciphertext": (SDK_SCHEME, lambda call: {"ciphertext": b""}),
    "no hash": (SDK_SCHEME, lambda call: {"body_hash": b""}),
    "another scheme's key": (SDK_SCHEME, lambda call: {"scheme": HPKE_SCHEME}),
    "a bit": (HPKE_SCHEME, lambda call: {"ciphertext": flip(call.ciphertext, -1)}),
    "another encapsulated key": (HPKE_SCHEME, lambda call: {"ciphertext": OTHER_KEY + call.ciphertext[32:]}),
    "low order": (HPKE_SCHEME, lambda call: {"ciphertext": bytes(32) + call.ciphertext[32:]}),
    "too short": (HPKE_SCHEME, lambda call: {"ciphertext": call.ciphertext[:47]}),
    "nothing": (HPKE_SCHEME, lambda call: {"ciphertext": b""}),
    "another lock": (HPKE_SCHEME, lambda call: {"lock": LOCK + 1}),
    "another name": (HPKE_SCHEME, lambda call: {"model_name": "tests/tiny"}),
    "another request": (HPKE_SCHEME, lambda call: {"request_id": "creq_2"}),
    "another expiry": (HPKE_SCHEME, lambda call: {"expires_ms": call.expires_ms + 1}),
    "unknown key": (HPKE_SCHEME, lambda call: {"node_key": OTHER_KEY}),
    "members of the other scheme": (HPKE_SCHEME, lambda call: {"salt": bytes(16)}),
}


def test_every_vector_is_tried() -> None:
    """What the file has that is to be refused."""
    vectors = json.loads(outside_data("atoma_confidential_vectors.json").read_bytes())
    assert {one["name"] for one in vectors["refuse"]} == VECTORS.keys()


CHANGES: dict[str, tuple[Scheme, Change]] = {name: (SDK_SCHEME, change) for name, change in VECTORS.items()} | OTHERS


def varying(answer: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the answers to any two calls may differ in, and what they may not."""
    message = msgspec.to_builtins(msgspec.msgpack.decode(answer, type=SealedAnswer), builtin_types=(bytes,))
    statement = json.loads(message.pop("statement"))
    may = {name: statement.pop(name) for name in ("request_digest", "lock", "time_ms")}
    return may | {"signature": message.pop("signature")}, message | statement


async def refusal_of(node: SealingNode, sealed: SealedBy) -> bytes:
    """It must be the uniform one."""
    answer, tokens = await node.calls.answer(sealed.body)
    assert (tokens, sealed.read(answer)[0].status) == (0, 400)
    return answer


async def replayed(node: SealingNode) -> SealedBy:
    sealed = node.seal(SDK_SCHEME)
    assert await node.says(sealed) == (200, "vectors")
    return sealed


async def expired(node: SealingNode) -> SealedBy:
    return node.seal(HPKE_SCHEME, expires_ms=node.clock.unix_ms() - 60_001)


async def without_room(node: SealingNode) -> SealedBy:
    sealed = node.seal(SDK_SCHEME)
    held = node.keys.find(SDK_SCHEME, sealed.call.node_key)
    assert held is not None
    for number in range(REPLAYS_OF_SET_MAX):
        held.of.remember(number.to_bytes(32, "big"))
    return sealed


async def forgotten(node: SealingNode) -> SealedBy:
    sealed = node.seal(HPKE_SCHEME, expires_ms=10**13)
    node.clock.now += CONFIDENTIAL_KEY_S
    assert node.signed
    node.clock.now += CONFIDENTIAL_OVERLAP_S
    return sealed


STATES = {each.__name__: each for each in (replayed, expired, without_room, forgotten)}


async def refused(node: SealingNode, name: str) -> SealedBy:
    """A call that is to be refused for the reason of that name."""
    if name in STATES:
        return await STATES[name](node)
    scheme, change = CHANGES[name]
    sealed = node.seal(scheme)
    return sealed.but(**change(sealed.call))


@pytest.mark.parametrize("name", [*CHANGES, *STATES])
async def test_what_cannot_be_opened_is_refused_in_one_way(name: str, model: Model) -> None:
    """Nothing is sealed, nothing is embedded, and the wait is REFUSAL_S less what it took."""
    node = await SealingNode.start(model)
    sealed = await refused(node, name)
    embedded = len(node.engine.asked)
    answer = await refusal_of(node, sealed)
    _, constant = varying(answer)
    empty = dict.fromkeys(("sealed", "nonce", "response_hash", "response_signature"), b"")
    nothing = base64.b64encode(hashlib.sha256(b"").digest()).decode()
    words = {"version": 1, "node_id": read_keys(node.signed).node_id, "reply_digest": nothing, "status": 400}
    assert constant == {**empty, **words, "tokens": 0}
    assert len(node.engine.asked) == embedded
    assert node.counted("refused") == 1.0
    assert node.slept == [REFUSAL_S]


async def test_all_refusals_have_the_same_length(model: Model) -> None:
    lengths = set()
    for name in CHANGES:
        node = await SealingNode.start(model)
        lengths.add(len((await node.calls.answer((await refused(node, name)).body))[0]))
    assert len(lengths) == 1


@pytest.mark.parametrize("drift_s", [0.0004, 0.007, 0.06])
async def test_a_refusal_leaves_at_the_same_time_whatever_was_wrong(drift_s: float, model: Model) -> None:
    """REFUSAL_S after the call came, or a multiple of it: by how long is waited, however long the look took."""
    multiples = set()
    for name in [*CHANGES, "replayed", "expired"]:
        node = await SealingNode.start(model, drift_s=drift_s)
        sealed = await refused(node, name)
        node.slept.clear()
        node.clock.seen.clear()
        await refusal_of(node, sealed)
        (slept,) = node.slept
        multiple = (node.clock.seen[-1] + slept - node.clock.seen[0]) / REFUSAL_S
        assert 0 < slept <= REFUSAL_S + 1e-9
        assert multiple == pytest.approx(round(multiple), abs=1e-6)
        multiples.add(round(multiple))
    assert len(multiples) == 1


async def test_only_so_many_refusals_wait(model: Model) -> None:
    """Then any call is told to come again, a good one as well: so that says nothing about it either."""
    node = await SealingNode.start(model)
    bad = node.seal(SDK_SCHEME).but(node_key=OTHER_KEY)
    node.may_wake.clear()
    waiting = [asyncio.create_task(node.calls.answer(bad.body)) for _ in range(REFUSALS_WAITING_MAX)]
    await asyncio.sleep(0)
    for sealed in (bad, node.seal(SDK_SCHEME)):
        with pytest.raises(Overloaded):
            await node.calls.answer(sealed.body)
    node.may_wake.set()
    await asyncio.gather(*waiting)
    assert await node.says(node.seal(SDK_SCHEME)) == (200, "vectors")


@pytest.mark.parametrize("body", [b"", b"{}", b"\xc1", ENCODE({"scheme": "hpke-2"}), ENCODE([1]), b"\x81" * 5_000])
async def test_what_is_no_sealed_call_is_told_so(body: bytes, model: Model) -> None:
    """By an ordinary error: the gateway that made it is at fault, not its caller."""
    node = await SealingNode.start(model)
    with pytest.raises(InvalidType):
        await node.calls.answer(body)


# -- what was opened, and is not as it should be

LONG = " ".join(["w1"] * 47)
TEXT_TOO_MUCH = b'{"model":"tiny","input":"' + b"w" * REQUEST_BODY_BYTES_MAX + b'"}'


@each_scheme
@pytest.mark.parametrize(
    ("body", "words", "code"),
    [
        (b"", {}, "invalid_json"),
        (b"{", {}, "invalid_json"),
        (b"\xff\xfe", {}, "invalid_json"),
        (b"[1]", {}, "invalid_type"),
        (b'{"model":"tiny"}', {}, "missing_parameter"),
        (b'{"input":"w1"}', {}, "missing_parameter"),
        (asking(input=[]), {}, "empty_input"),
        (asking(input=["w1", LONG]), {}, "context_length_exceeded"),
        (asking(shape=1), {}, "unknown_parameter"),
        (asking(model="none"), {"name": "none"}, "model_not_found"),
        (asking(model="tests/tiny"), {}, "invalid_value"),  # the same model by another name than outside
        (asking(model="tests/other"), {"name": "tests/other"}, "invalid_value"),  # means another model than outside
        (asking(), {"name": "tests/tiny"}, "invalid_value"),
        (asking(), {"model": "tests/other"}, "invalid_value"),
        (asking(), {"units": 3}, "max_tokens_per_request"),
        (TEXT_TOO_MUCH, {}, "body_too_large"),
    ],
)
async def test_what_is_wrong_inside_is_told_the_caller_alone(
    scheme: Scheme, body: bytes, words: dict[str, Any], code: str, model: Model
) -> None:
    """Sealed, with status 400 and no tokens. Nothing is embedded, and nothing is remembered of it."""
    node = await SealingNode.start(model)
    sealed = node.seal(scheme, body, **words)
    for _ in range(2):
        assert await node.says(sealed) == (400, code)
    assert node.engine.asked == node.other.asked == []
    assert node.slept == []
    assert node.counted("refused") == 2.0


async def test_no_more_is_counted_than_was_locked(model: Model) -> None:
    """A small lock is no way to have a large text counted for nothing."""
    node = await SealingNode.start(model)
    sealed = node.seal(HPKE_SCHEME, asking(input=["w1 w2 w3"] * 2_048), units=3)
    _, body = sealed.read((await node.calls.answer(sealed.body))[0])
    assert "have 4,096 or more tokens, and the lock covers 3" in json.loads(body)["error"]["message"]


async def test_exactly_the_tokens_of_the_lock_are_taken(model: Model) -> None:
    node = await SealingNode.start(model)
    assert await node.says(node.seal(HPKE_SCHEME, units=4)) == (200, "vectors")


async def test_a_reply_that_is_larger_than_an_answer_may_be_is_refused_before_it_is_made(model: Model) -> None:
    node = await SealingNode.start(msgspec.structs.replace(model, width=16_384))
    sealed = node.seal(HPKE_SCHEME, asking(input=["w1"] * 1_024), units=10_000)
    assert await node.says(sealed) == (400, "too_many_inputs")
    assert node.engine.asked == []


async def test_only_so_many_bytes_of_replies_are_awaited(model: Model) -> None:
    """Of the largest ones three; the fourth is told to come again, and comes."""
    node = await SealingNode.start(msgspec.structs.replace(model, width=8_192))
    node.engine.open.clear()
    bodies = [asking(input=["w1"] * 1_024)] * 3 + [asking(input=["w1"] * 760, encoding_format="base64")]
    sealed = [node.seal(HPKE_SCHEME, body, units=10_000) for body in bodies]
    waiting = [asyncio.create_task(node.calls.answer(one.body)) for one in sealed[:3]]
    while len(node.engine.asked) < 3:
        await asyncio.sleep(0.001)
    with pytest.raises(Overloaded):
        await node.calls.answer(sealed[3].body)
    node.engine.open.set()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert await node.says(sealed[3]) == (200, "vectors")


# -- once


@each_scheme
async def test_a_request_is_embedded_once(scheme: Scheme, model: Model) -> None:
    """Also where both come at the same time, one is changed in what no seal covers, or new keys were made meanwhile."""
    node = await SealingNode.start(model)
    sealed = node.seal(scheme)
    said = await asyncio.gather(*(node.says(sealed) for _ in range(3)))
    assert sorted(said) == [(200, "vectors"), (400, ""), (400, "")]
    node.clock.now += CONFIDENTIAL_KEY_S
    assert read_keys(node.signed).keys
    assert await node.says(sealed) == (400, "")
    if scheme == SDK_SCHEME:
        twin = sealed.call.client_key[:31] + bytes([sealed.call.client_key[31] ^ 0x80])  # X25519 ignores this bit
        for other in (sealed.but(client_key=twin), sealed.but(lock=LOCK + 1), sealed.but(request_id="again")):
            assert await node.says(other) == (400, "")
    assert len(node.engine.asked) == 1


@each_scheme
async def test_the_keys_of_yesterday_are_good_through_the_overlap(scheme: Scheme, model: Model) -> None:
    node = await SealingNode.start(model)
    early, late = (node.seal(scheme, expires_ms=10**13) for _ in range(2))
    node.clock.now += CONFIDENTIAL_KEY_S
    assert read_keys(node.signed).keys
    assert await node.says(early) == (200, "vectors")
    node.clock.now += CONFIDENTIAL_OVERLAP_S
    assert await node.says(late) == (400, "")


@each_scheme
async def test_a_request_that_found_no_room_may_come_again(scheme: Scheme, model: Model) -> None:
    node = await SealingNode.start(model)
    sealed = node.seal(scheme)
    node.engine.raises = Overloaded("full")
    with pytest.raises(Overloaded):
        await node.calls.answer(sealed.body)
    node.engine.raises = None
    assert await node.says(sealed) == (200, "vectors")


async def test_a_request_whose_work_failed_may_not(model: Model) -> None:
    """Nor one whose gateway hung up: it could have texts embedded again and again, and look at how long that takes."""
    node = await SealingNode.start(model)
    failed, dropped = node.seal(HPKE_SCHEME), node.seal(HPKE_SCHEME)
    node.engine.raises = NodeBroke("broke")
    with pytest.raises(NodeBroke):
        await node.calls.answer(failed.body)
    node.engine.raises = None
    node.engine.open.clear()
    task = asyncio.create_task(node.calls.answer(dropped.body))
    while len(node.engine.asked) < 2:
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    node.engine.open.set()
    assert [await node.says(one) for one in (failed, dropped)] == [(400, "")] * 2


async def test_an_expiry_has_a_minute_of_clocks_that_differ(model: Model) -> None:
    node = await SealingNode.start(model)
    assert await node.says(node.seal(HPKE_SCHEME, expires_ms=node.clock.unix_ms() - 60_000)) == (200, "vectors")


# -- start, list and residue


async def test_a_node_that_starts_has_no_keys_yet(model: Model) -> None:
    """Its list has none, and a call is told to come again."""
    node, other = SealingNode(model), await SealingNode.start(model)
    assert keys_of(node.app.list_bytes()) is None
    with pytest.raises(NoNodeAvailable):
        await node.calls.answer(other.seal(HPKE_SCHEME).body)


async def test_the_list_has_the_keys_for_the_models_in_it(model: Model) -> None:
    node = await SealingNode.start(model)
    assert read_keys(node.signed).models == {"tests/tiny": model.digest, "tests/other": model.digest}
    without: Any = Models()
    assert (
        keys_of(NodeApp(without, Catalogue(()), node.metrics, BodyBudget(1), node.opener.signed_keys).list_bytes())
        is None
    )


@each_scheme
async def test_no_text_is_left_behind(scheme: Scheme, model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Not in logs, metrics or failures, whether it was embedded, refused, or broke the engine."""
    caplog.set_level(logging.DEBUG)
    node = await SealingNode.start(model)
    failures = []
    for body in (asking(input=SENTINEL), asking(input=[SENTINEL, ""]), asking(input=SENTINEL, shape=SENTINEL)):
        await node.calls.answer(node.seal(scheme, body).body)
    node.engine.raises = NodeBroke("The node could not embed this: it breaks the engine.")
    with pytest.raises(NodeBroke) as failure:
        await node.calls.answer(node.seal(scheme, asking(input=SENTINEL)).body)
    failures.append(str(failure.value))
    page = node.metrics.text()[0].decode()
    assert "embedmesh_node_confidential_calls_total" in page
    assert SENTINEL not in page + caplog.text + "".join(failures)


def test_large_requests_fit() -> None:
    """The largest body, padded as ours is and with all members, is within what is read."""
    largest = padded_size(32 + 4 + REQUEST_BODY_BYTES_MAX) + 32 + 16
    members = SealedCall(HPKE_SCHEME, "m" * 200, "m" * 200, 10**15 - 1, 10**15 - 1, bytes(32), bytes(largest), "i" * 64)
    assert len(ENCODE(members)) <= SEALED_CALL_BYTES_MAX
