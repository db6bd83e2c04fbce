"""What an account has asked us to remember is found again bit for bit, by it alone, and paid as it was agreed."""

import asyncio
import json
from collections import OrderedDict

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.flow.cache import CACHED, ENTRY_BYTES, VectorCache
from embedmesh.flow.paid import serve
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import NoNodeAvailable, WrongAnswer
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Answer, Share
from embedmesh.rules.ports import Caller
from tests.flow.world import EMBEDDINGS, MODEL, NATIVE, ScriptedNodes, ScriptedWorld, make_world, vector_for

PRICE = 1.5  # nano-USD a token; two tokens more an input


def body(*texts: str, **more: object) -> bytes:
    return json.dumps({"model": "tiny", "input": list(texts), **more}).encode()


def cached_world(*accounts: tuple[str, CachePolicy], nodes: int = 1) -> ScriptedWorld:
    """A world whose keys are the accounts' names."""
    policies = dict(accounts)

    class Keys:
        async def find(self, token: str) -> Caller | None:
            return Caller(token, f"key_{token}", frozenset({"embeddings"}), cache=policies[token])

    return msgspec.structs.replace(make_world(nodes=nodes), keys=Keys())


async def ask(world: ScriptedWorld, asked: bytes, account: str = "a", how: Delivery | None = Delivery.WHOLE) -> Reply:
    """`how` its delivery ends; None: it does not begin, and ConnectionResetError is raised."""
    replies: list[Reply] = []

    async def receive(account_id: str) -> bytes:
        return asked

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        if how is None:
            raise ConnectionResetError("the caller went")
        replies.append(reply)
        return how

    await serve(world, EMBEDDINGS, RequestHead(f"Bearer {account}"), receive, deliver)
    return replies[0]


def charged(world: ScriptedWorld) -> list[int]:
    return [amount for what, amount in world.ledger.log if what == "capture"]


def vectors(reply: Reply) -> list[list[float]]:
    return [item["embedding"] for item in json.loads(reply.body)["data"]]


CHARGED, FREE, OFF = ("a", CachePolicy.CHARGED), ("a", CachePolicy.FREE), ("a", CachePolicy.OFF)


@pytest.mark.parametrize("options", [{}, {"encoding_format": "base64"}, {"dimensions": 2}, {"input_type": "query"}])
async def test_the_same_again_is_the_same_body_and_asks_no_node(options: dict[str, object]) -> None:
    world = cached_world(CHARGED)
    first = await ask(world, body("abc", "d", **options))
    again = await ask(world, body("abc", "d", **options))
    assert again.body == first.body
    assert len(world.client.asked) == 1
    assert (first.headers["x-embedmesh-cached"], again.headers["x-embedmesh-cached"]) == ("0", "2")
    assert (first.headers["x-embedmesh-node"], again.headers["x-embedmesh-node"]) == ("n0", CACHED)


async def test_encodings_and_dimensions_come_of_one_remembered_vector() -> None:
    world = cached_world(CHARGED)
    await ask(world, body("abc", dimensions=2))
    whole = vectors(await ask(world, body("abc")))
    assert np.array_equal(np.array(whole[0], "<f4"), vector_for([1 + 3, 2 + 3, 3 + 3]))
    assert len(world.client.asked) == 1


async def test_nothing_is_remembered_for_who_has_not_asked_for_it() -> None:
    world = cached_world(OFF)
    for _ in range(2):
        assert "x-embedmesh-cached" not in (await ask(world, body("abc"))).headers
    assert len(world.client.asked) == 2
    assert (world.cache.bytes, world.cache.hits, world.cache.misses) == (0, 0, 0)


@pytest.mark.parametrize(
    ("policy", "costs"),
    [(CHARGED, [8, 8, 14]), (FREE, [8, 0, 6])],  # 5 tokens; the same again; 5 known and 4 new ones: 13.5, or 6
)
async def test_what_is_known_costs_as_agreed(policy: tuple[str, CachePolicy], costs: list[int]) -> None:
    world = cached_world(policy)
    replies = [await ask(world, asked) for asked in (body("abc"), body("abc"), body("abc", "de"))]
    assert charged(world) == [cost for cost in costs if cost]
    assert [int(reply.headers["x-embedmesh-cost-nanousd"]) for reply in replies] == costs
    assert [amount for what, amount in world.ledger.log if what == "hold"] == charged(world)
    assert json.loads(replies[2].body)["usage"]["total_tokens"] == 9


async def test_only_what_is_not_known_is_asked_and_all_comes_in_order() -> None:
    world = cached_world(CHARGED)
    await ask(world, body("b", "d"))
    reply = await ask(world, body("a", "b", "c", "d", "b"))
    assert [ids for _, ids in world.client.asked] == [[[5], [7]], [[4], [6]]]
    assert np.array_equal(np.array(vectors(reply), "<f4"), [vector_for([ord(each) % 31]) for each in "abcdb"])
    assert reply.headers["x-embedmesh-cached"] == "3"
    assert reply.headers["x-embedmesh-node"] == f"{CACHED},n0"


async def test_nothing_of_one_account_is_found_for_another() -> None:
    world = cached_world(CHARGED, ("b", CachePolicy.CHARGED))
    await ask(world, body("abc"))
    assert (await ask(world, body("abc"), "b")).headers["x-embedmesh-cached"] == "0"
    assert len(world.client.asked) == 2


async def test_another_model_or_prompt_is_another_vector() -> None:
    world = cached_world(CHARGED)
    await ask(world, body("abc"))
    assert (await ask(world, body("abc", input_type="query"))).headers["x-embedmesh-cached"] == "0"
    other = json.dumps({"model": NATIVE.id, "input": "abc"}).encode()
    assert (await ask(world, other)).headers["x-embedmesh-cached"] == "0"


async def test_what_is_known_needs_no_node() -> None:
    world = cached_world(CHARGED)
    first = await ask(world, body("abc"))
    world.fleet.registry.drain(world.node("n0"))
    assert (await ask(world, body("abc"))).body == first.body
    with pytest.raises(NoNodeAvailable):
        await ask(world, body("abc", "new"))


@pytest.mark.parametrize("gone", ["quarantined", "removed", "readmitted", "added anew"])
async def test_a_liars_vectors_are_forgotten(gone: str) -> None:
    world = cached_world(CHARGED, nodes=2)
    await ask(world, body("abc"))
    (liar, _) = world.client.asked[0]
    registry = world.fleet.registry
    node = world.node(liar)
    if gone in ("removed", "added anew"):
        registry.remove(liar)
    else:
        registry.quarantine(node, "it lied")
    if gone == "added anew":
        registry.add(node)
    elif gone == "readmitted":
        registry.readmit(node)
    assert (await ask(world, body("abc"))).headers["x-embedmesh-cached"] == "0"
    assert len(world.client.asked) == 2
    assert (await ask(world, body("abc"))).headers["x-embedmesh-cached"] == "1"


async def test_a_wrong_answer_is_not_remembered() -> None:
    world = msgspec.structs.replace(cached_world(CHARGED), client=ScriptedNodes(WrongAnswer("no"), WrongAnswer("no")))
    with pytest.raises(Exception, match="No node"):
        await ask(world, body("abc"))
    assert world.cache.bytes == 0


@pytest.mark.parametrize("policy", [CHARGED, FREE])
async def test_what_was_not_paid_is_not_remembered(policy: tuple[str, CachePolicy]) -> None:
    """Who hangs up before the reply, and asks again, pays; else `free` would be free the first time, too."""
    world = cached_world(policy)
    with pytest.raises(ConnectionResetError):
        await ask(world, body("abc"), how=None)
    assert (charged(world), world.cache.bytes) == ([], 0)
    assert (await ask(world, body("abc"))).headers["x-embedmesh-cached"] == "0"
    assert charged(world) == [8]
    assert len(world.client.asked) == 2


@pytest.mark.parametrize("policy", [CHARGED, FREE])
async def test_what_was_paid_is_remembered_though_it_was_not_read(policy: tuple[str, CachePolicy]) -> None:
    world = cached_world(policy)
    await ask(world, body("abc"), how=Delivery.BROKEN_OFF)
    assert charged(world) == [8]
    assert (await ask(world, body("abc"))).headers["x-embedmesh-cached"] == "1"


@pytest.mark.parametrize("how", [Delivery.WHOLE, Delivery.BROKEN_OFF])
async def test_who_made_it_is_believed_as_then_and_not_as_when_it_is_paid(how: Delivery) -> None:
    """A node that is found to lie, and let in again, while its answer is on its way: that answer is not believed."""
    world = cached_world(CHARGED, nodes=2)
    registry = world.fleet.registry

    async def receive(account_id: str) -> bytes:
        return body("abc")

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        liar = world.node(world.client.asked[0][0])
        registry.quarantine(liar, "it lied")
        registry.readmit(liar)
        return how

    await serve(world, EMBEDDINGS, RequestHead("Bearer a"), receive, deliver)
    assert (await ask(world, body("abc"))).headers["x-embedmesh-cached"] == "0"


# -- the cache by itself ----------------------------------------------------------------------------------------------

ROW = MODEL.width * 4
ENTRY = ROW + ENTRY_BYTES


def counted(*ids: int) -> Counted:
    return Counted(lengths=[3] * len(ids), ids=[[each] for each in ids])


def row(number: int) -> bytes:
    return number.to_bytes(4, "little") * MODEL.width


def keep(cache: VectorCache, account: str, *ids: int, node: str = "n") -> None:
    asked = counted(*ids)
    answer = Answer(b"".join(map(row, ids)), MODEL.width, asked.tokens, (Share(node, asked.tokens),))
    cache.keep(account, MODEL, cache.learn(asked, answer))


def known(cache: VectorCache, account: str, *ids: int) -> list[int]:
    """Those of them that the cache knows; what it says of them is right."""
    found = []
    for each in ids:
        remembered = cache.look(account, MODEL, counted(each))
        assert remembered is not None
        if remembered.inputs:
            assert remembered.join(None, MODEL.width).data == row(each)
            found.append(each)
    return found


def test_inputs_that_were_not_counted_exactly_are_left_alone() -> None:
    cache = VectorCache(10**6, lambda node: 1)
    assert cache.look("a", MODEL, Counted(lengths=[3], texts=["x"], exact=False)) is None


def test_a_cache_without_room_keeps_nothing() -> None:
    cache = VectorCache(0, lambda node: 1)
    keep(cache, "a", 1, 2, 3)
    assert (known(cache, "a", 1, 2, 3), cache.bytes) == ([], 0)


def test_the_account_that_has_most_makes_room() -> None:
    cache = VectorCache(10 * ENTRY, lambda node: 1)
    keep(cache, "small", 1)
    keep(cache, "large", *range(100))
    assert known(cache, "small", 1) == [1]
    assert known(cache, "large", *range(100)) == list(range(91, 100))


async def test_less_room_is_made_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go on between two slices, and what they have remembered makes no more work than a slice."""
    monkeypatch.setattr("embedmesh.flow.cache.SHRINK_BYTES", 10 * ENTRY)
    cache = VectorCache(100 * ENTRY, lambda node: 1)
    keep(cache, "a", *range(100))
    cache.resize(25 * ENTRY)
    assert cache.bytes == 90 * ENTRY
    keep(cache, "a", 100)
    assert cache.bytes == 90 * ENTRY
    for left in (80, 70, 60, 50, 40, 30, 25, 25):
        await asyncio.sleep(0)
        assert cache.bytes == left * ENTRY
    cache.resize(30 * ENTRY)
    keep(cache, "a", *range(200, 240))
    assert cache.bytes == 30 * ENTRY


steps = st.lists(
    st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.booleans()), max_size=40
)


@given(steps, st.integers(0, 8))
def test_it_is_a_bounded_memory_of_what_was_used_last(asked: list[tuple[str, list[int], bool]], room: int) -> None:
    cache = VectorCache(room * ENTRY, lambda node: 1)
    model: dict[str, OrderedDict[int, None]] = {"a": OrderedDict(), "b": OrderedDict()}
    for account, ids, keeps in asked:
        if keeps:
            keep(cache, account, *ids)
            for each in ids:
                model[account].pop(each, None)
                model[account][each] = None
            while sum(map(len, model.values())) > room:
                lengths = {name: len(entries) for name, entries in model.items()}
                most = [name for name in lengths if lengths[name] == max(lengths.values())]
                if len(most) > 1:  # either will do: follow the cache
                    most = [name for name in most if not _knows(cache, name, next(iter(model[name])))]
                model[most[0]].popitem(last=False)
        else:
            expected = [each for each in ids if each in model[account]]
            assert known(cache, account, *ids) == expected
            for each in expected:
                model[account].move_to_end(each)
        assert cache.bytes == ENTRY * sum(map(len, model.values())) <= room * ENTRY


def _knows(cache: VectorCache, account: str, number: int) -> bool:
    """Without a trace."""
    return next(iter(cache._keys(account, MODEL, [[number]]))) in cache._accounts.get(account, ())
