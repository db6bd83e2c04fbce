"""Small requests for a busy node share a call; each gets its own rows, or its own failure."""

import asyncio
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from random import Random
from typing import Any, cast

import msgspec
import pytest

from embedmesh.fleet.load import Load
from embedmesh.gateway.nodes.coalesce import CALLS, FIXED_S_MIN, MERGED_TOKENS_MAX, SMALL_TOKENS_MAX, CoalescingLink
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.rules.embeddings import ENDS_FIRST, Counted, EmbedVectors, ServedModel, ServedModels, numbers_of
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeFailure, NodeUnreachable, WrongAnswer
from embedmesh.rules.forwarding import Attempt, AttemptOwner, Part
from embedmesh.rules.models import Model
from tests.flow.world import MODEL

SPECIALS = 2
OTHER = msgspec.structs.replace(MODEL, id="acme/other")
SERVED = ServedModels([ServedModel(MODEL.id, MODEL.width, MODEL.max_tokens, MODEL.digest, "fp32")])
BAD = 666  # an id that the node cannot digest


def row(ids: Sequence[int]) -> bytes:
    """A vector that only these ids have."""
    return blake2b(array("I", ids).tobytes(), digest_size=MODEL.width * 4).digest()


class Node:
    """The link below: each call waits to be let go, if `holds`. `calls` are the inputs of each."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []
        self.gates: list[asyncio.Future[None]] = []
        self.cancelled = 0
        self.closed = 0
        self.holds = True
        self.begun: list[AttemptOwner] = []
        self.spoil: dict[str, Any] = {}

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Attempt | None:
        if "no connection" in self.spoil:
            return None
        self.begun.append(owner)
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        assert counted.ids is not None
        return await self.embed_ids(model, [numbers_of(counted.ids[row]) for row in part.rows], request_id)

    async def embed_ids(self, model: Model, asked: list[list[int]], request_id: str) -> EmbedVectors:
        self.calls.append(asked)
        if self.holds:
            gate = asyncio.get_running_loop().create_future()
            self.gates.append(gate)
            try:
                await gate
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        await asyncio.sleep(self.spoil.get("slow", 0.0))
        if any(BAD in ids for ids in asked):
            raise self.spoil.get("failure", NodeBroke("it died of it"))
        merged = len(asked) > 1
        rows = b"".join(map(row, asked))[: -4 if merged and "rows" in self.spoil else None]
        extra = 1 if merged and "tokens" in self.spoil else 0
        return EmbedVectors(sum(len(ids) + SPECIALS for ids in asked) + extra, rows)

    async def served(self) -> ServedModels:
        return SERVED

    def close(self) -> None:
        self.closed += 1

    async def let(self, which: int) -> None:
        self.gates[which].set_result(None)
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Rig:
    def __init__(self) -> None:
        self.node = Node()
        self.load = Load()
        self.link = CoalescingLink(cast(OwnLink, self.node), self.load)
        self.tasks: list[asyncio.Task[EmbedVectors]] = []

    async def ask(self, *inputs: list[int], model: Model = MODEL) -> asyncio.Task[EmbedVectors]:
        lengths = [len(ids) + SPECIALS for ids in inputs]
        part = Part("n1", tuple(range(len(inputs))), sum(lengths), 1.0)
        counted = Counted(lengths=lengths, ids=list(inputs))
        task = asyncio.create_task(self.link.embed(part, model, counted, "req_1"))
        self.tasks.append(task)
        await settled()
        return task

    def quiet(self) -> None:
        """Nothing is left of all that was asked."""
        assert (self.link._calls, len(self.link._waiting), len(self.link._tasks)) == (0, 0, 0)


def right(task: asyncio.Task[EmbedVectors], *inputs: list[int]) -> None:
    assert task.result() == EmbedVectors(sum(len(ids) + SPECIALS for ids in inputs), b"".join(map(row, inputs)))


async def busy() -> Rig:
    """With as many calls under way as go at one time."""
    rig = Rig()
    for number in range(CALLS):
        await rig.ask([number])
    assert rig.node.calls == [[[number]] for number in range(CALLS)], "each is asked at once, alone"
    return rig


class Asked:
    """Who began an attempt."""

    def __init__(self) -> None:
        self.told: list[EmbedVectors | NodeFailure] = []

    def answered(self, vectors: EmbedVectors) -> None:
        self.told.append(vectors)

    def failed(self, failure: NodeFailure) -> None:
        self.told.append(failure)


def ask(rig: Rig, ids: list[int], asked: Asked) -> Attempt | None:
    counted = Counted(lengths=[len(ids) + SPECIALS], ids=[ids])
    return rig.link.ask(Part("n1", (0,), counted.tokens, 1.0), MODEL, counted, "req_1", asked)


async def test_attempts_begin_at_once_while_the_node_has_few_calls() -> None:
    """They are calls as any other: what comes meanwhile shares the next one."""
    rig, asked = Rig(), Asked()
    attempts = [ask(rig, [number], asked) for number in range(CALLS)]
    assert None not in attempts
    assert ask(rig, [8], asked) is None, "then it has to wait"
    waiting = await rig.ask([10])
    assert len(rig.node.begun) == CALLS
    assert rig.node.calls == []
    answer = EmbedVectors(3, row([0]))
    rig.node.begun[0].answered(answer)
    await settled()
    assert asked.told == [answer]
    assert rig.node.calls == [[[10]]]
    broke = NodeBroke("x")
    rig.node.begun[1].failed(broke)
    assert asked.told == [answer, broke]
    await rig.node.let(0)
    right(waiting, [10])
    rig.quiet()


async def test_an_attempt_that_is_cancelled_makes_room_for_the_next_call() -> None:
    rig, asked = Rig(), Asked()
    attempts = [ask(rig, [number], asked) for number in range(CALLS)]
    waiting = await rig.ask([10])
    for attempt in attempts * 2:
        assert attempt is not None
        attempt.cancel()
    await settled()
    assert (rig.node.cancelled, asked.told) == (CALLS, [])
    await rig.node.let(0)
    right(waiting, [10])
    rig.quiet()


async def test_an_attempt_that_cannot_begin_is_no_call() -> None:
    rig = Rig()
    rig.node.spoil = {"no connection": True}
    assert ask(rig, [1], Asked()) is None
    rig.quiet()


async def test_where_a_call_costs_next_to_nothing_none_is_shared() -> None:
    """As the node's speed says."""
    rig, asked = Rig(), Asked()
    tokens_s = 0.001
    for number in range(100):
        rig.load.began(10, number)
        rig.load.ended(10, number + 10 * tokens_s + FIXED_S_MIN / 2, well=True)
    for number in range(100):
        rig.load.began(90, 100 + number)
        rig.load.ended(90, 100 + number + 90 * tokens_s + FIXED_S_MIN / 2, well=True)
    assert rig.load.fixed_s < FIXED_S_MIN
    for number in range(CALLS + 3):
        assert ask(rig, [number], asked) is not None
        await rig.ask([number])
    assert len(rig.node.begun) == len(rig.node.calls) == CALLS + 3
    rig.node.holds = False
    for each in range(CALLS + 3):
        await rig.node.let(each)
    rig.quiet()


async def test_what_comes_while_a_node_is_busy_goes_together_with_the_next_call() -> None:
    rig = await busy()
    first, second, third = await rig.ask([10, 11]), await rig.ask([20], [21, 22]), await rig.ask([30])
    assert len(rig.node.calls) == CALLS
    await rig.node.let(0)
    assert rig.node.calls[CALLS:] == [[[10, 11], [20], [21, 22], [30]]]
    await rig.node.let(1)
    await rig.node.let(2)
    right(first, [10, 11])
    right(second, [20], [21, 22])
    right(third, [30])
    right(rig.tasks[0], [0])
    rig.quiet()


async def test_a_call_has_at_most_so_many_tokens() -> None:
    rig = await busy()
    texts = [[number] * 298 for number in range(5)]
    tasks = [await rig.ask(ids) for ids in texts]
    rig.node.holds = False
    await rig.node.let(0)
    assert [len(call) for call in rig.node.calls[CALLS:]] == [3, 2]
    assert 3 * 300 <= MERGED_TOKENS_MAX < 4 * 300
    await rig.node.let(1)
    for task, ids in zip(tasks, texts, strict=True):
        right(task, ids)
    rig.quiet()


async def test_large_requests_and_other_models_keep_to_themselves() -> None:
    rig = await busy()
    large = await rig.ask([1] * SMALL_TOKENS_MAX)
    assert len(rig.node.calls) == CALLS + 1, "at once"
    await rig.ask([5])
    await rig.ask([6], model=OTHER)
    await rig.ask([7])
    for gate in range(CALLS + 1):
        await rig.node.let(gate)
    right(large, [1] * SMALL_TOKENS_MAX)
    rig.node.holds = False
    for gate in range(CALLS + 1, len(rig.node.gates)):
        await rig.node.let(gate)
    assert rig.node.calls[CALLS + 1 :] == [[[5]], [[6]], [[7]]]
    await asyncio.gather(*rig.tasks)
    rig.quiet()


async def test_who_gave_up_is_left_out() -> None:
    rig = await busy()
    first, second = await rig.ask([10]), await rig.ask([20])
    first.cancel()
    await settled()
    rig.node.holds = False
    await rig.node.let(0)
    await rig.node.let(1)
    assert rig.node.calls[CALLS:] == [[[20]]]
    right(second, [20])
    rig.quiet()


async def test_a_call_is_broken_off_once_nobody_waits_for_it() -> None:
    rig = await busy()
    first, second = await rig.ask([10]), await rig.ask([20])
    await rig.node.let(0)
    first.cancel()
    await settled()
    assert rig.node.cancelled == 0, "the other still waits"
    second.cancel()
    await settled()
    assert rig.node.cancelled == 1
    await rig.node.let(1)
    await asyncio.gather(*rig.tasks, return_exceptions=True)
    rig.quiet()


@pytest.mark.parametrize("failure", [NodeBroke("x"), NodeBusy("x"), WrongAnswer("x")])
async def test_a_call_that_fails_is_asked_again_one_by_one(failure: NodeFailure) -> None:
    """Only who is to blame is told of a failure."""
    rig = await busy()
    rig.node.spoil = {"failure": failure}
    good, bad, other = await rig.ask([10]), await rig.ask([BAD]), await rig.ask([30])
    rig.node.holds = False
    await rig.node.let(0)
    await rig.node.let(1)
    await asyncio.gather(*rig.tasks, return_exceptions=True)
    right(good, [10])
    right(other, [30])
    assert bad.exception() is failure
    rig.quiet()


@pytest.mark.parametrize("spoilt", ["rows", "tokens"])
async def test_an_answer_to_something_else_is_nobodys(spoilt: str) -> None:
    """Of another size, or with other tokens: each is asked again alone."""
    rig = await busy()
    rig.node.spoil = {spoilt: True}
    first, second = await rig.ask([10]), await rig.ask([20])
    rig.node.holds = False
    await rig.node.let(0)
    await rig.node.let(1)
    right(first, [10])
    right(second, [20])
    assert rig.node.calls[CALLS:] == [[[10], [20]], [[10]], [[20]]]
    rig.quiet()


async def test_a_bug_is_told_to_all_who_wait_for_it() -> None:
    rig = await busy()
    rig.node.spoil = {"failure": RuntimeError("a bug")}
    tasks = [await rig.ask([BAD]), await rig.ask([20])]
    rig.node.holds = False
    await rig.node.let(0)
    await rig.node.let(1)
    async with asyncio.timeout(2):
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found] == [RuntimeError, RuntimeError]
    rig.quiet()


async def test_closed_it_leaves_nobody_waiting() -> None:
    rig = await busy()
    tasks = [await rig.ask([10]), await rig.ask([20])]
    await rig.node.let(0)
    tasks.append(await rig.ask([30]))
    rig.link.close()
    async with asyncio.timeout(2):
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(each, NodeFailure) for each in found)
    await rig.node.let(1)
    rig.quiet()


async def test_what_a_node_serves_and_its_end_are_the_links_below() -> None:
    rig = Rig()
    assert await rig.link.served() is SERVED
    rig.link.close()
    assert rig.node.closed == 1
    rig.quiet()


async def test_closed_before_a_call_has_begun_it_leaves_nobody_waiting() -> None:
    """The call's task is cancelled before its first step, and is counted no more."""
    rig = await busy()
    task = await rig.ask([10])
    rig.tasks[0].cancel()
    while not rig.link._tasks:
        await asyncio.sleep(0)
    rig.link.close()
    async with asyncio.timeout(2):
        found = await asyncio.gather(task, return_exceptions=True)
    assert [type(each) for each in found] == [NodeUnreachable]
    assert len(rig.node.calls) == CALLS, "it had not begun"
    await rig.node.let(1)
    rig.quiet()


async def test_a_bug_in_one_that_is_asked_again_is_told_to_that_one() -> None:
    """The call of several fails by the node; of the single ones that follow, one meets a bug."""
    rig = await busy()
    rig.node.spoil = {"tokens": True}
    good, other = await rig.ask([10]), await rig.ask([30])
    await rig.node.let(0)
    await rig.node.let(CALLS)
    assert rig.node.calls[CALLS + 1 :] == [[[10]], [[30]]]
    rig.node.gates[CALLS + 2].set_exception(bug := RuntimeError("a bug"))
    await settled()
    assert other.exception() is bug
    assert not good.done(), "it is still asked"
    await rig.node.let(CALLS + 1)
    right(good, [10])
    await rig.node.let(1)
    rig.quiet()


async def test_who_gave_up_while_asked_again_holds_up_nobody() -> None:
    """Once the others have their answers, the node is told to stop, and the next call can begin."""
    rig = await busy()
    rig.node.spoil = {"tokens": True}
    first, second = await rig.ask([10]), await rig.ask([20])
    await rig.node.let(0)
    await rig.node.let(CALLS)
    assert rig.node.calls[CALLS + 1 :] == [[[10]], [[20]]]
    first.cancel()
    await settled()
    third = await rig.ask([30])
    assert rig.node.cancelled == 0
    await rig.node.let(CALLS + 2)
    right(second, [20])
    await settled()
    assert (rig.node.cancelled, rig.node.calls[-1]) == (1, [[30]])
    await rig.node.let(CALLS + 3)
    right(third, [30])
    await rig.node.let(1)
    rig.quiet()


async def test_an_answer_that_nobody_waits_for_any_more_does_not_end_the_call() -> None:
    """Of those that are asked again one gave up, and is answered first: the call counts until the other is answered."""
    rig = await busy()
    rig.node.spoil = {"tokens": True}
    first, second = await rig.ask([10]), await rig.ask([20])
    await rig.node.let(0)
    await rig.node.let(CALLS)
    first.cancel()
    await rig.node.let(CALLS + 1)
    third = await rig.ask([30])
    assert rig.node.calls[CALLS + 1 :] == [[[10]], [[20]]], "there are as many calls as may be"
    await rig.node.let(CALLS + 2)
    right(second, [20])
    await rig.node.let(CALLS + 3)
    right(third, [30])
    await rig.node.let(1)
    rig.quiet()


async def test_who_gave_up_is_not_asked_again() -> None:
    rig = await busy()
    rig.node.spoil = {"rows": True}
    first, second = await rig.ask([10]), await rig.ask([20])
    await rig.node.let(0)
    first.cancel()
    rig.node.holds = False
    await rig.node.let(CALLS)
    right(second, [20])
    assert rig.node.calls[CALLS:] == [[[10], [20]], [[20]]]
    await rig.node.let(1)
    rig.quiet()


async def test_of_a_request_that_waited_alone_the_failure_is_its_own() -> None:
    """Nothing is asked twice of it."""
    rig = await busy()
    bad = await rig.ask([BAD])
    rig.node.holds = False
    await rig.node.let(0)
    assert isinstance(bad.exception(), NodeBroke)
    assert rig.node.calls[CALLS:] == [[[BAD]]]
    await rig.node.let(1)
    rig.quiet()


@pytest.mark.parametrize("error", [NodeBroke("x"), RuntimeError("a bug")])
async def test_a_failure_of_a_call_at_once_lets_the_next_begin(error: Exception) -> None:
    rig = await busy()
    waiting = await rig.ask([10])
    rig.node.gates[0].set_exception(error)
    await settled()
    assert rig.tasks[0].exception() is error
    assert rig.node.calls[CALLS:] == [[[10]]]
    await rig.node.let(1)
    await rig.node.let(2)
    right(waiting, [10])
    rig.quiet()


async def test_limits_are_met_exactly() -> None:
    """A request of SMALL_TOKENS_MAX is small, and one call takes as many as make MERGED_TOKENS_MAX."""
    assert MERGED_TOKENS_MAX % SMALL_TOKENS_MAX == 0
    rig = await busy()
    full = [[number] * (SMALL_TOKENS_MAX - SPECIALS) for number in range(MERGED_TOKENS_MAX // SMALL_TOKENS_MAX)]
    tasks = [await rig.ask(ids) for ids in [*full, [9]]]
    assert len(rig.node.calls) == CALLS
    await rig.node.let(0)
    assert rig.node.calls[CALLS:] == [full]
    await rig.node.let(1)
    assert rig.node.calls[CALLS + 1 :] == [[[9]]]
    for gate in (2, 3):
        await rig.node.let(gate)
    for task, ids in zip(tasks, [*full, [9]], strict=True):
        right(task, ids)
    rig.quiet()


async def test_of_a_request_only_the_inputs_of_the_part_are_asked_in_the_parts_order() -> None:
    rig = await busy()
    counted = Counted(lengths=[3, 4, 5], ids=[[1], [2, 2], [3, 3, 3]])
    part = Part("n1", (2, 0), 8, 1.0)
    cut = asyncio.create_task(rig.link.embed(part, MODEL, counted, "req_1"))
    await settled()
    whole = await rig.ask([40])
    await rig.node.let(0)
    assert rig.node.calls[CALLS:] == [[[3, 3, 3], [1], [40]]]
    await rig.node.let(1)
    await rig.node.let(2)
    right(cut, [3, 3, 3], [1])
    right(whole, [40])
    rig.quiet()


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_a_node_does_everybody_gets_the_own_rows_or_what_failed_for_them(seed: int) -> None:
    """Of a call that failed by the node only those are told whom it was for alone; of a bug, all that it was for."""
    rig, dice = Rig(), Random(seed)
    raised: list[tuple[Exception, set[int]]] = []  # and the first ids of all inputs of that call: each is one's own

    async def weather(model: Model, asked: list[list[int]], request_id: str) -> EmbedVectors:
        assert sum(len(ids) + SPECIALS for ids in asked) <= MERGED_TOKENS_MAX
        rig.node.calls.append(asked)
        for _ in range(dice.randrange(12)):
            await asyncio.sleep(0)
        owners = {ids[0] for ids in asked}
        kind = dice.choice([None, None, None, NodeBusy, NodeBroke, NodeUnreachable, WrongAnswer, RuntimeError])
        if kind is not None:
            raised.append((kind("x"), owners))
            raise raised[-1][0]
        odd = len(owners) > 1 and dice.random() < 0.2
        tokens = sum(len(ids) + SPECIALS for ids in asked)
        return EmbedVectors(tokens + odd, b"".join(map(row, asked)))

    rig.node.embed_ids = weather  # type: ignore[method-assign]

    async def one(owner: int) -> None:
        inputs = [[owner, *dice.choices(range(99), k=dice.randrange(150))] for _ in range(dice.randint(1, 3))]
        for _ in range(dice.randrange(200)):
            await asyncio.sleep(0)
        lengths = [len(ids) + SPECIALS for ids in inputs]
        part = Part("n1", tuple(range(len(inputs))), sum(lengths), 1.0)
        model = OTHER if dice.random() < 0.1 else MODEL
        task = asyncio.create_task(rig.link.embed(part, model, Counted(lengths=lengths, ids=inputs), "req_1"))
        if dice.random() < 0.2:
            for _ in range(dice.randrange(30)):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            right(task, *inputs)
            return
        (owners,) = [owners for each, owners in raised if each is error]
        assert owner in owners
        assert owners == {owner} or isinstance(error, RuntimeError)

    async with asyncio.timeout(10):
        await asyncio.gather(*(one(owner) for owner in range(1_000, 1_150)))
    await settled()
    assert max(len({ids[0] for ids in call}) for call in rig.node.calls) > 3
    rig.quiet()


async def test_in_any_weather_everybody_gets_the_own_rows() -> None:
    """Many requests, of all sizes, some of which fail, some of which give up."""
    rig, dice = Rig(), Random(3)
    rig.node.holds, rig.node.spoil = False, {"slow": 0.002}

    async def one(number: int) -> None:
        inputs = [[number, dice.randrange(BAD)] * dice.randint(1, 80) for _ in range(dice.randint(1, 3))]
        if dice.random() < 0.05:
            inputs[0].append(BAD)
        await asyncio.sleep(dice.random() / 50)
        task = await rig.ask(*inputs)
        if dice.random() < 0.1:
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and not any(BAD in ids for ids in inputs):
            right(task, *inputs)
        elif not task.cancelled():
            assert isinstance(task.exception(), NodeBroke)

    async with asyncio.timeout(10):
        await asyncio.gather(*(one(number) for number in range(400)))
    await settled()
    assert max(len(call) for call in rig.node.calls) > 3
    rig.quiet()


async def test_pairs_of_two_queries_share_a_call_and_each_gets_the_scores_of_its_own() -> None:
    """Their ids have the query in them. Servers of other makes, which get one query a call, have no such link."""
    judge = msgspec.structs.replace(MODEL, id="acme/judge", width=1, modalities=("rerank",))

    class Scores(Node):
        async def embed_ids(self, model: Model, asked: list[list[int]], request_id: str) -> EmbedVectors:
            reply = await super().embed_ids(model, asked, request_id)
            return EmbedVectors(reply.tokens, array("f", [ids[0] * 100 + ids[-1] for ids in asked]).tobytes())

    rig = Rig()
    rig.node = Scores()
    rig.link = CoalescingLink(cast(OwnLink, rig.node), rig.load)
    for number in range(CALLS):
        await rig.ask([number], model=judge)
    ends = 31 | ENDS_FIRST
    one = await rig.ask([1, ends, 7], [1, ends, 8], model=judge)
    other = await rig.ask([2, ends, 7], model=judge)
    await rig.node.let(0)
    assert len(rig.node.calls[-1]) == 3
    await rig.node.let(2)
    assert [list(array("f", task.result().data)) for task in (one, other)] == [[107.0, 108.0], [207.0]]
    await rig.node.let(1)
    rig.quiet()
