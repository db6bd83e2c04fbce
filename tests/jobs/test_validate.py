"""The validation of a batch: what its lines cost together, how they are cut, and what fails the whole file."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from embedmesh.fleet.leftover import Leftover
from embedmesh.flow.world import World
from embedmesh.jobs import endpoints, lines, validate
from embedmesh.jobs.endpoints import world_of_lines
from embedmesh.jobs.validate import BadFile, BatchTerms, Validation
from embedmesh.rules.batches import BatchPlan, BatchUnit
from embedmesh.rules.money import cost_nanousd
from embedmesh.rules.ports import Caller
from tests.flow.world import EMBEDDINGS, MODEL, call_later, make_world

ENDPOINT = "/v1/embeddings"
CALLER = Caller("acct", "key_1", frozenset({"embeddings"}))
PRICE = MODEL.price // 2
UNHEARD: list[bool] = []


def line(number: int, text: Any = "abc", **more: Any) -> bytes:
    body = {"model": "tiny", "input": text} | more.pop("body", {})
    whole = {"custom_id": f"id-{number}", "method": "POST", "url": ENDPOINT, "body": body} | more
    return json.dumps(whole).encode() + b"\n"


def line_world(nodes: int = 1) -> World:
    world = make_world(nodes=nodes)
    return world_of_lines(world, Leftover(world.fleet, world.clock, call_later))


async def pieces_of(data: bytes, size: int = 100) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def plan_of(
    data: bytes, caller: Caller = CALLER, bugs: list[bool] = UNHEARD, **terms: Any
) -> tuple[BatchPlan, list[BatchUnit]]:
    units: list[BatchUnit] = []

    async def add(more: Sequence[BatchUnit]) -> None:
        units.extend(more)

    validation = Validation(
        line_world(nodes=0), EMBEDDINGS, ENDPOINT, caller, BatchTerms(**terms), add, lambda: bugs.append(True)
    )
    return await validation.plan(pieces_of(data)), units


async def errors_of(data: bytes, caller: Caller = CALLER, **terms: Any) -> list[tuple[str, int | None, str | None]]:
    with pytest.raises(BadFile) as bad:
        await plan_of(data, caller, **terms)
    assert all(len(error.message) > 10 for error in bad.value.errors)
    return [(error.code, error.line, error.param) for error in bad.value.errors]


async def test_the_sum_is_that_of_all_lines_each_rounded_up_by_itself() -> None:
    """Without a node, too: a batch waits for one."""
    plan, units = await plan_of(b"".join(line(number, "a" * (1 + number % 5)) for number in range(10)))
    assert plan.amount_nanousd == sum(cost_nanousd(3 + number % 5, PRICE) for number in range(10))
    assert (plan.model, plan.prices, plan.lines, plan.units) == (MODEL.id, {"input": PRICE}, 10, 1)
    assert [(unit.unit, unit.first_line, unit.lines, unit.tokens) for unit in units] == [(0, 0, 10, 50)]


@pytest.mark.parametrize(("ratio_ppm", "price"), [(0, 0), (1, 2), (500_000, PRICE), (1_000_000, MODEL.price)])
async def test_the_price_is_the_operators_share_of_the_ordinary_one(ratio_ppm: int, price: int) -> None:
    plan, _ = await plan_of(line(1), ratio_ppm=ratio_ppm)
    assert plan.prices == {"input": price}
    assert plan.amount_nanousd == cost_nanousd(5, price)


@pytest.mark.parametrize(
    ("bound", "value", "lines"),
    [("UNIT_LINES_MAX", 3, [3, 3, 3, 1]), ("UNIT_TOKENS_MAX", 12, [2] * 5), ("UNIT_REPLY_BYTES_MAX", 1, [1] * 10)],
)
async def test_units_are_cut_by_lines_tokens_and_replies(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: int, lines: list[int]
) -> None:
    """Each begins at its first line and ends with its last one, blank lines between them or not."""
    monkeypatch.setattr(validate, bound, value)
    data = b"\n".join(line(number) for number in range(10))
    plan, units = await plan_of(data)
    assert plan.units == len(units) == len(lines)
    assert [unit.lines for unit in units] == lines
    assert [unit.first_line for unit in units] == [sum(lines[:at]) for at in range(len(lines))]
    for unit in units:
        own = data[unit.first_byte : unit.first_byte + unit.bytes].split(b"\n")
        ids = [json.loads(each)["custom_id"] for each in own if each]
        assert ids == [f"id-{number}" for number in range(unit.first_line, unit.first_line + unit.lines)]


async def test_units_are_handed_over_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "UNIT_LINES_MAX", 1)
    monkeypatch.setattr(validate, "UNITS_A_WRITE", 4)
    sizes: list[int] = []

    async def add(units: Sequence[BatchUnit]) -> None:
        sizes.append(len(units))

    validation = Validation(line_world(), EMBEDDINGS, ENDPOINT, CALLER, BatchTerms(), add)
    await validation.plan(pieces_of(b"".join(line(number) for number in range(10))))
    assert sizes == [4, 4, 2]


async def test_a_request_that_will_be_refused_costs_nothing_and_fails_nothing_else() -> None:
    """A text that is too long, an empty one, a wrong field: the endpoint's own refusals, told line by line later."""
    data = b"".join([line(1), line(2, "a" * 100), line(3, ""), line(4, body={"dimensions": 0}), line(5)])
    plan, units = await plan_of(data)
    assert plan.amount_nanousd == 2 * cost_nanousd(5, PRICE)
    assert (plan.lines, units[0].lines) == (5, 5)


@pytest.mark.parametrize(
    ("data", "errors"),
    {
        "no line": (b"\n \n", [("empty_file", None, None)]),
        "nothing": (b"", [("empty_file", None, None)]),
        "a duplicate": (line(1) + line(2) + line(1), [("duplicate_custom_id", 3, "custom_id")]),
        "another model": (
            line(1) + line(2, body={"model": "acme/native"}),
            [("mismatched_model", 2, "body.model")],
        ),
        "no such model": (line(1, body={"model": "huge"}), [("model_not_found", 1, "body.model")]),
        "no model": (line(1, body={"model": None}), [("missing_required_parameter", 1, "body.model")]),
        "several": (
            b"{\n" + line(1, url="/v1/x") + b"\xff\n" + line(2),
            [("invalid_json_line", 1, None), ("invalid_url", 2, "url"), ("invalid_json_line", 3, None)],
        ),
    }.values(),
)
async def test_what_is_wrong_with_a_file(data: bytes, errors: list[tuple[str, int | None, str | None]]) -> None:
    assert await errors_of(data) == errors


async def test_no_more_errors_are_named_than_anybody_mends() -> None:
    found = await errors_of(b"{\n" * 1_000)
    assert len(found) == 100
    assert found[-1][1] == 100


async def test_lines_and_inputs_are_bounded() -> None:
    three = line(1) + line(2, ["a", "b"]) + line(3)
    assert (await plan_of(three, lines_max=3, inputs_max=4))[0].lines == 3
    assert await errors_of(three, lines_max=2) == [("too_many_lines", None, None)]
    assert await errors_of(three, inputs_max=3) == [("too_many_inputs", 3, None)]


async def test_a_key_for_other_models_may_not() -> None:
    narrow = Caller("acct", "key_4", frozenset({"embeddings"}), frozenset({"acme/native"}))
    assert await errors_of(line(1), narrow) == [("insufficient_scope", 1, "body.model")]


async def test_a_line_that_is_too_long_is_told_and_the_rest_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BATCH_LINE_BYTES_MAX", 500)
    assert await errors_of(line(1) + line(2, "a" * 5_000) + b"{\n") == [
        ("line_too_long", 2, None),
        ("invalid_json_line", 3, None),
    ]


async def test_a_unit_has_no_more_bytes_of_lines_than_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of 4 MiB may have one token: a unit of 256 of these would take a gigabyte."""
    monkeypatch.setattr(validate, "UNIT_BYTES_MAX", 1_000)
    data = b"".join(line(number, body={"metadata": "x" * 400}) for number in range(7))
    _, units = await plan_of(data)
    assert all(unit.bytes <= 1_000 for unit in units)
    assert (sum(unit.lines for unit in units), units[0].lines) == (7, 1_000 // (len(data) // 7))


async def test_a_bug_that_a_line_meets_stops_no_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be validated again and again, for a day. The line fails when its turn comes."""
    counted = endpoints.counted_line

    async def broken(world: Any, operation: Any, caller: Any, body: bytes) -> Any:
        if b"secret" in body:
            raise ZeroDivisionError("of ours")
        return await counted(world, operation, caller, body)

    monkeypatch.setattr(validate, "counted_line", broken)
    bugs: list[bool] = []
    plan, _ = await plan_of(line(1) + line(2, "secret") + line(3), bugs=bugs)
    assert len(bugs) == 1, "/metrics counts it"
    assert (plan.lines, plan.amount_nanousd) == (3, 2 * cost_nanousd(5, PRICE))
    assert "ZeroDivisionError" in caplog.text and "secret" not in caplog.text


async def test_a_sum_that_no_account_can_have_fails_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "AMOUNT_MAX_NANOUSD", 1)
    assert await errors_of(line(1) + line(2)) == [("amount_too_large", None, None)]
