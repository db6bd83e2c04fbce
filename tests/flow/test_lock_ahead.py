"""A lock for the next sealed request, in the reply to this one: opened by the same rules, told once, or dropped."""

import asyncio
import base64
import json
from typing import Any

import msgspec
import pytest

from embedmesh.flow.confidential import ConfidentialEmbeddings
from embedmesh.flow.lock import lock_node
from embedmesh.flow.lock_ahead import LockAhead, read_wanted
from embedmesh.flow.paid import serve
from embedmesh.gateway.api.confidential_api import EnvelopeForm
from embedmesh.rules.confidential import (
    HPKE_SCHEME,
    NODES_LOCKED_MAX,
    SDK_SCHEME,
    FoundLock,
    KeyDocument,
    LockTerms,
)
from embedmesh.rules.errors import Failure, InsufficientQuota, InvalidValue, NodeBroke, NoNodeAvailable, RateLimited
from embedmesh.rules.exchange import Deliver, Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.holds import Hold, PriorRequest
from embedmesh.rules.limits import LOCK_S, REQUEST_TOKENS_MAX
from embedmesh.rules.ports import Caller
from tests.flow.sealed import DictLocks, HpkeNode, hpke_envelope
from tests.flow.sealed import envelope as sdk_envelope
from tests.flow.world import GOOD_KEY, MODEL, ScriptedWorld, make_world

TEXT = b'{"input":"abc","model":"tiny"}'


class OrderedLocks(DictLocks):
    """Notes the order of what is done, and lets the test refuse, or hold up, the locks after the first."""

    def __init__(self, world: ScriptedWorld) -> None:
        super().__init__(world)
        self.did: list[str] = []
        self.refuses: Failure | None = None
        self.may_open = asyncio.Event()
        self.may_open.set()

    async def open(self, terms: LockTerms, hold: Hold) -> None:
        self.did.append("open")
        await self.may_open.wait()
        if self.refuses is not None:
            raise self.refuses
        await super().open(terms, hold)

    async def redeem(self, found: FoundLock, body_hash: bytes, deadline_ms: int) -> Hold | PriorRequest:
        await asyncio.sleep(0)  # until it is durable
        self.did.append("redeem")
        return await super().redeem(found, body_hash, deadline_ms)


class Scene:
    """A world with one node, and a caller of our scheme."""

    def __init__(self) -> None:
        self.world = make_world()
        self.node = HpkeNode(self.world)
        self.locks = OrderedLocks(self.world)
        self.operation = ConfidentialEmbeddings(EnvelopeForm(), self.locks, self.node, "embeddings")

    async def lock(self, units: int = 100) -> LockTerms:
        caller = self.world.keys.known(GOOD_KEY, self.world.clock.monotonic())
        assert isinstance(caller, Caller)
        terms, _ = await lock_node(self.world, self.locks, self.node, caller, "tiny", units, LOCK_S, HPKE_SCHEME)
        self.locks.did.clear()
        return terms

    def seal(self, terms: LockTerms) -> bytes:
        return hpke_envelope(TEXT, terms, self.document.node_id)

    @property
    def document(self) -> KeyDocument:
        return self.node.document

    async def send(self, body: bytes, header: str | None = "256", deliver: Deliver | None = None) -> dict[str, Any]:
        replies: list[Reply] = []

        async def receive(account_id: str) -> bytes:
            return body

        async def take(reply: Reply | StreamedReply) -> Delivery:
            assert isinstance(reply, Reply)
            replies.append(reply)
            return Delivery.WHOLE

        head = RequestHead(f"Bearer {GOOD_KEY}", next_lock=header)
        await serve(self.world, self.operation, head, receive, deliver or take)
        return json.loads(replies[0].body) if replies else {}

    @property
    def log(self) -> list[tuple[str, int]]:
        return self.world.ledger.log


@pytest.fixture
async def scene() -> Scene:
    return Scene()


# -- what may be asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "units", "among"),
    [
        ("1", 1, None),
        (str(REQUEST_TOKENS_MAX), REQUEST_TOKENS_MAX, None),
        ("007", 7, None),
        ("256 node_a", 256, {"node_a"}),
        ("256 node_a node_b", 256, {"node_a", "node_b"}),
        ("256 " + " ".join(f"n{number}" for number in range(NODES_LOCKED_MAX)), 256, NODES_LOCKED_MAX),
    ],
)
def test_what_a_header_asks_for(header: str, units: int, among: Any) -> None:
    wanted = read_wanted(header, HPKE_SCHEME)
    assert wanted is not None
    assert wanted.units == units
    assert wanted.among == among or len(wanted.among or ()) == among


NONSENSE = [
    "", " ", "x", "0", "-1", "+1", "1.5", "1e3", "0x10", "²", "٣", str(REQUEST_TOKENS_MAX + 1), "9" * 5_000,
    "256,node_a", " 256", "256 ", "256  node_a", "256 " + "n" * 65,
    "256 " + " ".join(f"n{at}" for at in range(NODES_LOCKED_MAX + 1)),
]  # fmt: skip


@pytest.mark.parametrize("header", NONSENSE)
async def test_nonsense_is_refused_before_anything_is_done(scene: Scene, header: str) -> None:
    """The lock is as it was: the same request without the header, or with a good one, may use it."""
    terms = await scene.lock()
    body = scene.seal(terms)
    with pytest.raises(InvalidValue) as caught:
        await scene.send(body, header)
    assert caught.value.param == "x-embedmesh-next-lock"
    assert scene.locks.did == []
    assert "next_lock" in await scene.send(body)


async def test_the_sdks_scheme_has_no_locks_ahead(scene: Scene) -> None:
    terms = await scene.lock()
    body, _ = sdk_envelope(TEXT, terms.node_key, terms.lock_id)
    with pytest.raises(InvalidValue, match="atoma-sdk-1"):
        await scene.send(body)


def test_no_header_asks_for_nothing() -> None:
    assert read_wanted(None, HPKE_SCHEME) is None
    assert read_wanted(None, SDK_SCHEME) is None


# -- the right way -----------------------------------------------------------------------------------------------------


async def test_the_next_lock_is_opened_before_this_one_is_redeemed_and_told_in_the_reply(scene: Scene) -> None:
    """Both are asked for at one moment, so that one batch has both. What is told is what the lock's route tells."""
    terms = await scene.lock()
    reply = await scene.send(scene.seal(terms), f"256 {scene.document.node_id}")
    assert scene.locks.did == ["open", "redeem"]
    assert scene.log == [("hold", 150), ("hold", 384), ("capture", 8)]
    told = reply["next_lock"]
    lock = scene.locks.locks[told["stack_small_id"]]
    assert told == {
        "public_key": base64.b64encode(lock.node_key).decode(),
        "node_small_id": 7,
        "stack_small_id": lock.lock_id,
        "stack_entry_digest": None,
        "scheme": HPKE_SCHEME,
        "model": MODEL.id,
        "max_num_tokens": 256,
        "expires_ms": scene.world.clock.unix_ms() + LOCK_S * 1000,
        "keys": json.loads(msgspec.json.encode(scene.node.signed)),
    }
    assert scene.node.among[-1] == frozenset((scene.document.node_id,))
    second = await scene.send(scene.seal(lock), None)
    assert second["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert "next_lock" not in second


async def test_it_counts_against_the_keys_requests(scene: Scene) -> None:
    """As one that asks for a lock does: there is no way around that limit."""
    terms = await scene.lock()
    taken: list[str] = []
    take = scene.world.rate_limits.take_request

    async def counted(caller: Caller) -> None:
        taken.append(caller.key_id)
        await take(caller)

    scene.world.rate_limits.take_request = counted  # type: ignore[method-assign]
    await scene.send(scene.seal(terms))
    assert len(taken) == 2


# -- the bad ways ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        InsufficientQuota("no money"),
        RateLimited("as many locks as a key may have", retry_after_s=1.0),
        NoNodeAvailable("no node"),
    ],
    ids=lambda failure: failure.code,
)
async def test_where_there_is_none_the_reply_is_without_it(scene: Scene, refusal: Failure) -> None:
    terms = await scene.lock()
    scene.locks.refuses = refusal
    reply = await scene.send(scene.seal(terms))
    assert "next_lock" not in reply
    assert reply["usage"]["total_tokens"] == 5
    assert scene.log == [("hold", 150), ("capture", 8)]


async def test_of_nodes_that_are_not_here_there_is_none(scene: Scene) -> None:
    terms = await scene.lock()
    assert "next_lock" not in await scene.send(scene.seal(terms), "256 node_of_somebody")
    assert scene.locks.did == ["redeem"]


async def test_nobody_waits_for_a_lock_that_takes_long(scene: Scene) -> None:
    """The reply goes out without it, and the lock is never there."""
    terms = await scene.lock()
    scene.locks.may_open.clear()
    assert "next_lock" not in await scene.send(scene.seal(terms))
    scene.locks.may_open.set()
    await asyncio.sleep(0)
    assert list(scene.locks.locks) == [terms.lock_id]
    assert scene.log == [("hold", 150), ("capture", 8)]


async def test_the_same_request_again_gets_the_same_ciphertext_and_no_lock(scene: Scene) -> None:
    terms = await scene.lock()
    body = scene.seal(terms)
    first = await scene.send(body)
    scene.locks.did.clear()
    for _ in range(2):
        again = await scene.send(body)
        assert "next_lock" not in again
        assert again["ciphertext"] == first["ciphertext"]
    assert "open" not in scene.locks.did
    assert [what for what, _ in scene.log] == ["hold", "hold", "capture"]


async def test_of_two_that_are_the_same_request_one_has_the_next_lock(scene: Scene) -> None:
    """Both found their lock unused, and both began to open another: that of the later one is dropped."""
    terms = await scene.lock()
    body = scene.seal(terms)
    replies = await asyncio.gather(scene.send(body), scene.send(body))
    assert [("next_lock" in reply) for reply in replies].count(True) == 1
    assert replies[0]["ciphertext"] == replies[1]["ciphertext"]
    assert scene.locks.did.count("open") == 2
    assert len(scene.locks.dropped) == 1
    assert [what for what, _ in scene.log].count("capture") == 1
    assert [what for what, _ in scene.log].count("release") == 1


@pytest.mark.parametrize("how", ["the node refuses", "the node breaks"])
async def test_a_request_that_comes_to_nothing_drops_it(scene: Scene, how: str) -> None:
    """Nothing is kept of unpaid work: its money is free again, as this request's own."""
    terms = await scene.lock()
    if how == "the node refuses":
        scene.node.refuse = True
    else:
        scene.node.script.append(NodeBroke("broke"))
    with pytest.raises(Failure) as caught:
        await scene.send(scene.seal(terms))
    assert b"next_lock" not in scene.operation.envelope(caught.value)
    assert [what for what, _ in scene.log] == ["hold", "hold", "release", "release"]
    assert len(scene.locks.dropped) == 1
    assert list(scene.locks.locks) == [terms.lock_id]


@pytest.mark.parametrize("turns", range(8))
async def test_whoever_leaves_at_any_moment_has_none(scene: Scene, turns: int) -> None:
    terms = await scene.lock()
    held: list[Reply] = []

    async def never(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        held.append(reply)
        await asyncio.Event().wait()
        raise AssertionError

    task = asyncio.ensure_future(scene.send(scene.seal(terms), deliver=never))
    for _ in range(turns):
        await asyncio.sleep(0)
    assert task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    others = [lock for lock in scene.locks.locks if lock != terms.lock_id]
    assert others == ([json.loads(held[0].body)["next_lock"]["stack_small_id"]] if held else [])


async def test_a_bug_while_a_lock_is_opened_is_not_hidden(scene: Scene) -> None:
    terms = await scene.lock()

    async def broken(terms: LockTerms, hold: Hold) -> None:
        raise ZeroDivisionError

    scene.locks.open = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await scene.send(scene.seal(terms))
    assert [what for what, _ in scene.log] == ["hold", "release"]


async def test_what_was_told_is_not_dropped(scene: Scene) -> None:
    terms, node = await scene.lock(), scene.node.choose_sealing(MODEL, HPKE_SCHEME)

    async def opening() -> Any:
        return terms, node

    dropped: list[LockTerms] = []
    ahead = LockAhead(opening, dropped.append)
    assert ahead.told() is None, "not begun"
    ahead.begin()
    await asyncio.sleep(0)
    assert ahead.told() == (terms, node)
    assert ahead.told() is None
    ahead.drop()
    assert dropped == []
