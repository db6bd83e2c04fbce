"""A unit of a batch: its lines are worked off like requests, and come to lines of the output or of the error file."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.fleet.leftover import Leftover
from embedmesh.jobs import unit as unit_module
from embedmesh.jobs.endpoints import at_prices, sum_of_used, token_price, world_of_lines
from embedmesh.jobs.unit import LineResult, Stopping, UnitWork, undone_lines
from embedmesh.rules.batches import Batch, BatchState, BatchUnit, UsedTokens, line_request_id
from embedmesh.rules.errors import Failure, NodeBroke, WrongAnswer
from embedmesh.rules.money import cost_nanousd
from tests.flow.world import CATALOGUE, EMBEDDINGS, MODEL, ScriptedNodes, ScriptedWorld, call_later, make_world
from tests.jobs.test_validate import CALLER, ENDPOINT, PRICE, line, pieces_of

BATCH = Batch(
    batch_id="batch_019aa0b4c0de7b62a1f0c3d4e5f60718",
    account_id="acct",
    key_id="key_1",
    state=BatchState.IN_PROGRESS,
    endpoint=ENDPOINT,
    model=MODEL.id,
    input_file_id="file-1",
    output_file_id=None,
    error_file_id=None,
    window_s=86_400,
    output_expires_s=86_400,
    metadata=None,
    errors=(),
    prices={"input": PRICE},
    amount_nanousd=10**9,
    units=1,
    total=3,
    completed=0,
    failed=0,
    used=UsedTokens(),
    created_ms=0,
    expires_ms=2 * 10**12,
    in_progress_ms=1,
    finalizing_ms=None,
    completed_ms=None,
    failed_ms=None,
    expired_ms=None,
    cancelling_ms=None,
    cancelled_ms=None,
)


class Bench:
    """A unit's work over scripted nodes."""

    def __init__(self, *script: Failure | None, nodes: int = 1, batch: Batch = BATCH) -> None:
        self.nodes = ScriptedNodes(*script)
        self.world: ScriptedWorld = make_world(self.nodes, nodes=nodes)
        self.leftover = Leftover(self.world.fleet, self.world.clock, call_later)
        world = world_of_lines(self.world, self.leftover)
        self.stopping = Stopping()
        self.work = UnitWork(at_prices(world, batch.prices), EMBEDDINGS, batch, CALLER, self.leftover, self.stopping)

    async def results(self, data: bytes, first_line: int = 0) -> list[LineResult]:
        unit = BatchUnit(0, 0, len(data), first_line, data.count(b"\n"), 0)
        found = await asyncio.wait_for(self.work.results(unit, pieces_of(data)), 20)
        assert not self.leftover._taken and not self.leftover._waiting, "no turn is kept"
        assert self.world.replies.taken == 0
        assert self.world.ledger.log == [], "the account's money is the batch's affair"
        return found


def decoded(data: bytes | None) -> dict[str, Any]:
    assert data is not None and data.endswith(b"\n")
    found: dict[str, Any] = json.loads(data)
    assert set(found) == {"id", "custom_id", "response", "error"}
    return found


async def test_lines_are_answered_and_charged_at_the_batchs_price() -> None:
    bench = Bench()
    found = await bench.results(line(1) + line(2, ["a", "bc"]) + line(3), first_line=40)
    for number, result in enumerate(found):
        assert result.error is None and result.charge is not None
        told = decoded(result.output)
        request_id = line_request_id(BATCH.batch_id, 40 + number)
        assert (told["id"], told["custom_id"], told["error"]) == (f"batch_{request_id}", f"id-{number + 1}", None)
        assert (told["response"]["status_code"], told["response"]["request_id"]) == (200, request_id)
        body = told["response"]["body"]
        assert (body["object"], len(body["data"])) == ("list", 2 if number == 1 else 1)
        tokens = body["usage"]["prompt_tokens"]
        assert (result.charge.tokens, result.charge.price) == (tokens, PRICE)
        assert result.charge.cost_nanousd == cost_nanousd(tokens, PRICE)
        assert (result.charge.key_id, result.charge.model, result.charge.node_id) == ("key_1", MODEL.id, "n0")
    assert sum_of_used(each.used for each in found) == UsedTokens(5 + 7 + 5)


async def test_a_batch_goes_on_whose_model_has_left_the_catalogue() -> None:
    bench = Bench()
    left = msgspec.structs.replace(world_of_lines(bench.world, bench.leftover), catalogue=Catalogue(()))
    for known, answered in ((None, False), (CATALOGUE, True)):
        world = at_prices(left, BATCH.prices, known)
        bench.work = UnitWork(world, EMBEDDINGS, BATCH, CALLER, bench.leftover, bench.stopping)
        (found,) = await bench.results(line(1))
        assert (found.charge is not None) is answered


async def test_a_request_that_the_endpoint_refuses_is_told_in_the_error_file_and_is_free() -> None:
    found = await Bench().results(line(1, "a" * 100) + line(2))
    told = decoded(found[0].error)
    assert told["response"]["status_code"] == 400
    assert told["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert (found[0].output, found[0].charge, told["error"]) == (None, None, None)
    assert found[1].charge is not None


async def test_a_stream_is_no_line() -> None:
    found = await Bench().results(line(1, body={"stream": True}))
    assert decoded(found[0].error)["response"]["status_code"] == 400


async def test_a_line_is_tried_until_a_node_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "AGAIN_FIRST_S", 0.01)
    bench = Bench(NodeBroke("broke"), NodeBroke("broke"))
    (found,) = await bench.results(line(1))
    assert found.charge is not None
    assert len(bench.nodes.asked) == 3


async def test_a_text_that_all_nodes_answer_wrongly_fails_alone_after_some_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unit_module, "AGAIN_FIRST_S", 0.01)
    wrong = [WrongAnswer("wrong")] * 3
    bench = Bench(*wrong)
    (found,) = await bench.results(line(1))
    told = decoded(found.error)
    assert told["response"]["status_code"] == 502
    assert found.charge is None


async def test_lines_that_wait_for_a_turn_give_up_when_the_batch_stops_and_those_under_way_end() -> None:
    bench = Bench(nodes=0)
    stopping = asyncio.get_running_loop().call_later(0.05, bench.stopping.stop, "batch_cancelled")
    found = await bench.results(line(1) + line(2))
    stopping.cancel()
    for result in found:
        told = decoded(result.error)
        assert (told["response"], told["error"]["code"]) == (None, "batch_cancelled")
        assert result.charge is None


async def test_what_is_cancelled_leaves_nothing() -> None:
    bench = Bench(nodes=0)
    data = line(1) + line(2)
    task = asyncio.create_task(bench.work.results(BatchUnit(0, 0, len(data), 0, 2, 0), pieces_of(data)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not bench.leftover._waiting and bench.world.replies.taken == 0 and not bench.stopping.waiting


async def test_a_bug_fails_its_line_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    right = bench.nodes.embed

    async def embed(part: Any, model: Any, counted: Any, request_id: str) -> Any:
        if counted.lengths == [3]:
            raise KeyError("the secret value")
        return await right(part, model, counted, request_id)

    monkeypatch.setattr(bench.nodes, "embed", embed)
    bugs: list[bool] = []
    monkeypatch.setattr(bench.work, "_on_bug", lambda: bugs.append(True))
    first, second = await bench.results(line(1, "a") + line(2, "abc"))
    assert decoded(first.error)["response"]["status_code"] == 500
    assert len(bugs) == 1, "/metrics counts it"
    assert second.charge is not None
    assert "KeyError" in caplog.text and "secret" not in caplog.text


async def test_lines_of_a_unit_that_was_not_done() -> None:
    data = line(1) + b"\n" + line(2)
    undone = await undone_lines(BATCH, BatchUnit(3, 0, len(data), 7, 2, 0), pieces_of(data), "batch_expired")
    told = [decoded(each) for each in undone]
    assert [each["custom_id"] for each in told] == ["id-1", "id-2"]
    assert [each["id"] for each in told] == [f"batch_{line_request_id(BATCH.batch_id, number)}" for number in (7, 8)]
    assert {each["error"]["code"] for each in told} == {"batch_expired"}


async def test_a_large_line_is_cut_into_slices_while_others_are_there_and_its_answer_is_the_same() -> None:
    texts = ["ab" * (1 + number % 3) for number in range(40)]
    whole, sliced = Bench(), Bench()
    now = sliced.world.clock.monotonic()
    sliced.world.fleet.retries.budget.request(now)
    assert sliced.leftover.polite
    (alone,), (beside,) = await whole.results(line(1, texts)), await sliced.results(line(1, texts))
    assert beside.output == alone.output
    assert (beside.charge, beside.used) == (alone.charge, alone.used)
    assert len(sliced.nodes.asked) > len(whole.nodes.asked)
    assert sliced.leftover._own.recent(now) == 1, "one request, however many slices"


async def test_a_line_that_waits_for_its_turn_keeps_no_room_for_its_reply() -> None:
    """Or a batch that waits would have the account's other requests refused."""
    bench = Bench(nodes=0)
    data = line(1) + line(2)
    task = asyncio.create_task(bench.work.results(BatchUnit(0, 0, len(data), 0, 2, 0), pieces_of(data)))
    while not bench.leftover._waiting:
        await asyncio.sleep(0.001)
    assert bench.world.replies.taken == 0
    bench.stopping.stop("batch_cancelled")
    await task


async def test_a_name_that_means_another_model_now_is_not_worked_off_at_the_old_price() -> None:
    bench = Bench()
    bench.work._batch = msgspec.structs.replace(BATCH, model="acme/native")
    (found,) = await bench.results(line(1))
    assert decoded(found.error)["response"]["body"]["error"]["code"] == "model_not_found"
    assert found.charge is None


async def test_a_line_fails_whose_model_is_paid_in_another_way_than_when_the_batch_began() -> None:
    """At the batch's prices it would be free: where searches were paid, its tokens have the price 0."""
    bench = Bench(batch=msgspec.structs.replace(BATCH, prices={"input": 0, "searches": PRICE}))
    (result,) = await bench.results(line(1))
    assert (result.output, result.charge) == (None, None)
    assert result.error is not None and b"paid in another way" in result.error


def test_the_least_price_of_tokens_counts_searches() -> None:
    """Or one reranker that is paid by searches would let everybody keep files for nothing."""
    reranker = msgspec.structs.replace(MODEL, modalities=("rerank",), max_tokens=500, search_price=1)
    assert token_price({"input": PRICE}, MODEL) == PRICE
    assert token_price({"input": 0, "searches": 50_001 * 2}, reranker) == 3  # 100 documents of 500 tokens
    assert token_price({"input": 0, "searches": 0}, reranker) == 0
