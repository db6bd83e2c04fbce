"""Chat, completions and images through the spine: what is held, sent, delivered and charged."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from embedmesh.dialects.openai.completions import Completions
from embedmesh.fleet.parallel_load import ParallelLoad
from embedmesh.flow import stream
from embedmesh.flow.leases import Leases
from embedmesh.flow.prompt_bounds import asked_of
from embedmesh.rules.errors import (
    BadNodeResponse,
    CallerFailure,
    ContextLengthExceeded,
    Failure,
    InsufficientQuota,
    InsufficientScope,
    InvalidValue,
    NodeBroke,
    NodeBusy,
    NoNodeAvailable,
    StoreUnavailable,
    UpstreamRefused,
)
from embedmesh.rules.exchange import Delivery, Reply, StreamedReply
from embedmesh.rules.holds import Meter
from embedmesh.rules.sealed_generation import EVENTS_MORE
from tests.flow.speaking import (
    CHAT,
    HELD,
    HELLO,
    INPUT_BOUND,
    PAINTER,
    WORDS,
    Reader,
    Speakers,
    answer,
    ask,
    event,
    speaking_world,
    usage_event,
)
from tests.flow.world import METERED_KEY, OTHER_KEY, POOR_KEY, ScriptedWorld

STREAM = HELLO | {"stream": True}
PNG = "iVBORw0KGgo="


def ledger(world: ScriptedWorld) -> list[tuple[str, int]]:
    return world.ledger.log


def metered(world: ScriptedWorld) -> dict[Meter, int]:
    (charge,) = world.ledger.charges
    return {each.meter: each.quantity for each in charge.meters}


class Slow(Reader):
    """A caller that takes so long for each event. `leases` are extended meanwhile."""

    def __init__(self, world: ScriptedWorld, seconds: float, leases: Leases | None = None) -> None:
        super().__init__()
        self._world, self._seconds, self._leases = world, seconds, leases

    async def __call__(self, reply: Reply | StreamedReply) -> Delivery:
        if isinstance(reply, Reply):
            return await super().__call__(reply)
        async for part in reply.parts:
            self.parts.append(part)
            self._world.clock.now += self._seconds
            if self._leases is not None:
                await self._leases.extend()
            await asyncio.sleep(0.001)
        return Delivery.WHOLE


def refusal(words: str, *, too_long: bool = False) -> UpstreamRefused:
    refused = UpstreamRefused("it refuses")
    refused.said, refused.too_long = words, too_long
    return refused


async def test_a_whole_answer_is_held_at_its_bound_and_charged_by_the_node_s_usage() -> None:
    world, client, reader = speaking_world(), Speakers(answer("Hi.", prompt_tokens=9, completion_tokens=2)), Reader()
    outcome = await ask(world, client, HELLO, reader)
    assert ledger(world) == [("hold", HELD), ("capture", 9 + 2 * 3)]
    reply = json.loads(reader.body)
    assert reply["choices"][0]["message"]["content"] == "Hi."
    assert reply["model"] == CHAT.id and "/secret" not in reader.body.decode()
    assert (outcome.tokens, outcome.cost_nanousd, outcome.delivery) == (11, 15, Delivery.WHOLE)
    assert reader.headers["x-embedmesh-node"] == "n0" and reader.headers["x-embedmesh-cost-nanousd"] == "15"


async def test_an_output_limit_is_always_sent() -> None:
    for given, sent in ({}, 20), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 8}, 8):
        world, client = speaking_world(), Speakers(answer("Hi.", prompt_tokens=9, completion_tokens=2))
        await ask(world, client, HELLO | given, Reader())
        assert client.asked[0][1].body["max_tokens"] == sent
        assert ledger(world)[0] == ("hold", INPUT_BOUND + sent * 3)


async def test_cached_input_has_its_own_price() -> None:
    usage: dict[str, Any] = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}
    world = speaking_world()
    await ask(world, Speakers(answer("Hi.", **usage)), HELLO, Reader())
    assert metered(world) == {Meter.INPUT: 1, Meter.CACHED: 8, Meter.OUTPUT: 2}
    assert ledger(world)[-1] == ("capture", 1 + 8 // 2 + 2 * 3)


@pytest.mark.parametrize(
    "usage",
    [
        {},
        {"prompt_tokens": INPUT_BOUND + 1, "completion_tokens": 0},
        {"prompt_tokens": 9, "completion_tokens": CHAT.output_max + 1},
        {"prompt_tokens": 9, "completion_tokens": 0},
        {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 99},
    ],
)
async def test_a_usage_that_cannot_be_is_counted_by_us_and_marked(usage: dict[str, int]) -> None:
    world, reader = speaking_world(), Reader()
    await ask(world, Speakers(answer("Good morning", **usage)), HELLO, reader)
    (charge,) = world.ledger.charges
    assert all(each.estimated for each in charge.meters)
    assert metered(world)[Meter.OUTPUT] == 3  # twelve bytes
    assert 0 < metered(world)[Meter.INPUT] <= INPUT_BOUND
    told = json.loads(reader.body)["usage"]
    assert told["completion_tokens"] == 3 and told["prompt_tokens"] == metered(world)[Meter.INPUT]


async def test_a_prompt_beyond_its_bound_does_not_make_the_answer_cheaper() -> None:
    """A template says more about tools than any bound of ours; the answer may have reasoning that nobody sees."""
    tools = {"tools": [{"type": "function", "function": {"name": "a"}}]}
    world = speaking_world()
    await ask(world, Speakers(answer("Hi.", prompt_tokens=170, completion_tokens=19)), HELLO | tools, Reader())
    assert metered(world)[Meter.OUTPUT] == 19 and 0 < metered(world)[Meter.INPUT] <= INPUT_BOUND + len('{"name":"a"}')
    (charge,) = world.ledger.charges
    assert all(each.estimated for each in charge.meters)


async def test_of_several_answers_a_node_may_count_one_only() -> None:
    choices = [{"index": at, "message": {"content": "twelve bytes"}, "finish_reason": "stop"} for at in range(3)]
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    world, client = speaking_world(), Speakers(json.dumps({"choices": choices, "usage": usage}).encode())
    await ask(world, client, HELLO | {"n": 3}, Reader())
    assert ledger(world) == [("hold", INPUT_BOUND + 3 * 20 * 3), ("capture", 9 + 9 * 3)]


async def test_another_node_answers_where_one_fails() -> None:
    world = speaking_world(nodes=2)
    client = Speakers(NodeBusy("full"), answer("Hi.", prompt_tokens=9, completion_tokens=2))
    await ask(world, client, HELLO, Reader())
    assert len({node for node, _ in client.asked}) == 2
    assert [what for what, _ in ledger(world)] == ["hold", "capture"]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (refusal("`tools` is not supported"), InvalidValue),
        (refusal("too much", too_long=True), ContextLengthExceeded),
        (NodeBroke("it broke"), NoNodeAvailable),
    ],
)
async def test_a_failure_of_the_node_is_told_and_costs_nothing(failure: Failure, told: type[Failure]) -> None:
    for body in HELLO, STREAM:
        world = speaking_world()
        with pytest.raises(told) as raised:
            await ask(world, Speakers(failure), body, Reader())
        assert ledger(world) == [("hold", HELD), ("release", HELD)]
        if told is InvalidValue:
            assert "`tools` is not supported" in raised.value.message


@pytest.mark.parametrize("reply", [b"<html>", b"{}", b'{"error": {"message": "no"}}', b'{"choices": []}'])
async def test_what_is_no_answer_is_not_delivered(reply: bytes) -> None:
    world = speaking_world()
    with pytest.raises((BadNodeResponse, NoNodeAvailable)):
        await ask(world, Speakers(reply), HELLO, Reader())
    assert ledger(world) == [("hold", HELD), ("release", HELD)]


async def test_what_is_refused_reaches_no_node() -> None:
    refused: list[tuple[dict[str, Any], str, type[Failure]]] = [
        (HELLO | {"messages": []}, "em_good", CallerFailure),
        (HELLO | {"max_tokens": CHAT.max_tokens + 1}, "em_good", InvalidValue),
        (HELLO, POOR_KEY, InsufficientQuota),
        (HELLO, METERED_KEY, InsufficientScope),
    ]
    for body, key, failure in refused:
        world, client = speaking_world(), Speakers()
        with pytest.raises(failure):
            await ask(world, client, body, Reader(), key=key)
        assert not client.asked and not world.ledger.charges


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_is_no_more_than_may_come_back(stream: bool) -> None:
    """Or three callers with long prompts would have the node ejected."""
    prompt = "\x01" * 200_000
    echo = {"model": CHAT.id, "prompt": [prompt, "b"], "echo": True, "n": 2, "max_tokens": 1, "stream": stream}
    sent, _ = Completions().parse(json.dumps(echo).encode(), lambda name: CHAT)
    assert asked_of(sent, 1).reply_bytes_max > 2 * 6 * len(prompt)


async def test_images_cost_what_their_size_does() -> None:
    world, reader = speaking_world(), Reader()
    body = {"model": PAINTER.id, "prompt": "a dot", "n": 2, "size": "2x2"}
    client = Speakers(json.dumps({"created": 1, "data": [{"b64_json": PNG}] * 2}).encode())
    await ask(world, client, body, reader)
    assert ledger(world) == [("hold", 180), ("capture", 180)]
    assert metered(world) == {Meter.IMAGES: 2}
    assert client.asked[0][1].body["response_format"] == "b64_json"
    assert json.loads(reader.body)["data"][0]["url"].startswith("data:image/png;base64,")


async def test_images_that_are_missing_are_not_paid() -> None:
    world = speaking_world()
    client = Speakers(json.dumps({"created": 1, "data": []}).encode())
    with pytest.raises(BadNodeResponse):
        await ask(world, client, {"model": PAINTER.id, "prompt": "a dot", "n": 2}, Reader())
    assert ledger(world)[-1] == ("release", 140)


# -- streams


async def test_a_stream_is_delivered_event_by_event_and_charged_by_its_usage() -> None:
    world, reader = speaking_world(), Reader()
    client = Speakers([*WORDS, usage_event(9, 3)])
    outcome = await ask(world, client, STREAM, reader)
    assert reader.text == "Well, this is."
    assert reader.parts[-1] == b"data: [DONE]\n\n" and all(part.endswith(b"\n\n") for part in reader.parts)
    assert not any("usage" in each for each in reader.events[:-1])
    assert ledger(world) == [("hold", HELD), ("capture", 9 + 3 * 3)]
    assert outcome.delivery is Delivery.WHOLE and client.streams[0].closed


async def test_usage_is_told_once_to_who_asks_for_it() -> None:
    asks = STREAM | {"stream_options": {"include_usage": True}}
    every = [event("a", {"prompt_tokens": 9, "completion_tokens": 1}), event("b", finish="stop")]
    for events, told in ([*WORDS, usage_event(9, 3)], 3), (list(WORDS), 4), ([*every, usage_event(9, 2)], 2):
        world, reader = speaking_world(), Reader()
        await ask(world, Speakers(events), asks, reader)
        usages = [each["usage"] for each in reader.events[:-1] if each.get("usage")]
        assert [each["completion_tokens"] for each in usages] == [told]
        assert reader.events[-2]["choices"] == []
        assert world.ledger.charges[0].meters[-1].quantity == told


@pytest.mark.parametrize("read", range(1, 5))
async def test_who_leaves_pays_what_was_handed_over(read: int) -> None:
    """Each of these events has four bytes: a token."""
    world, reader = speaking_world(), Reader(parts_max=read)
    client = Speakers([event("word")] * 10)
    outcome = await ask(world, client, STREAM, reader)
    assert outcome.delivery is Delivery.BROKEN_OFF and client.streams[0].closed
    assert metered(world)[Meter.OUTPUT] == read and client.streams[0].read == read
    assert metered(world)[Meter.INPUT] > 0


async def test_who_leaves_before_the_usage_pays_for_tokens_of_a_byte() -> None:
    world = speaking_world()
    digits = [event(each) for each in "0123456789"]
    await ask(world, Speakers([*digits, event(finish="stop"), usage_event(9, 10)]), STREAM, Reader(11))
    assert metered(world)[Meter.OUTPUT] == 10


async def test_who_leaves_before_the_first_event_is_delivered_pays_nothing() -> None:
    world, client = speaking_world(), Speakers([*WORDS])
    with pytest.raises(ConnectionResetError):
        await ask(world, client, STREAM, Reader(parts_max=0))
    assert ledger(world) == [("hold", HELD), ("release", HELD)]
    assert client.streams[0].closed and world.node("n0").load.parts == 0


async def test_who_leaves_while_the_node_is_silent_stops_it() -> None:
    world, reader = speaking_world(), Reader()
    client = Speakers([event("word"), asyncio.Event().wait])
    asking = asyncio.create_task(ask(world, client, STREAM, reader))
    while not reader.parts:
        await asyncio.sleep(0)
    assert reader.reply is not None
    reader.reply.left()
    await asking
    assert client.streams[0].closed and metered(world)[Meter.OUTPUT] == 1
    assert world.node("n0").load.parts == 0


@pytest.mark.parametrize("partial", [False, True])
async def test_a_node_that_breaks_off_ends_the_stream_with_an_error(partial: bool) -> None:
    chat = msgspec.structs.replace(CHAT, charge_partial=partial)
    world, reader = speaking_world(2, [chat, PAINTER]), Reader()
    outcome = await ask(world, Speakers([event("word"), NodeBroke("cut")], [*WORDS]), STREAM, reader)
    assert reader.events[-1]["error"]["code"] and reader.text == "word"
    assert b"data: [DONE]\n\n" not in reader.parts
    assert [what for what, _ in ledger(world)] == ["hold", "capture" if partial else "release"]
    assert outcome.delivery is (Delivery.WHOLE if partial else Delivery.FAILED)


@pytest.mark.parametrize(
    "events",
    [[b'{"error": {"message": "no"}}'], [NodeBroke("cut")], [b"<html>"], []],
    ids=["error", "cut", "html", "empty"],
)
async def test_before_the_first_event_another_node_is_asked(events: list[Any]) -> None:
    world, reader = speaking_world(2), Reader()
    client = Speakers(events, [*WORDS, usage_event(9, 3)])
    await ask(world, client, STREAM, reader)
    assert reader.text == "Well, this is." and client.streams[0].closed
    assert ledger(world) == [("hold", HELD), ("capture", 9 + 3 * 3)]


async def test_an_event_that_has_nothing_for_the_caller_is_not_the_first() -> None:
    """Some makes begin with one that tells what a filter thinks of the prompt."""
    world, reader = speaking_world(nodes=2), Reader()
    client = Speakers([b'{"choices": []}', NodeBroke("it is gone")], [b'{"choices": []}', *WORDS, usage_event(9, 4)])
    await ask(world, client, STREAM, reader)
    assert reader.text == "Well, this is." and len(client.asked) == 2 and metered(world)[Meter.OUTPUT] == 4


async def test_what_a_node_has_begun_that_failed_is_not_the_next_one_s() -> None:
    """Or an answer that is cut would be whole, and paid, since another node had said the word of its end."""
    twice = [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}, {"index": 0, "delta": {}}]
    world, reader = speaking_world(nodes=2), Reader()
    client = Speakers([json.dumps({"choices": twice}).encode()], [event("Well"), event(" no")])
    client.ends = "closed"
    await ask(world, client, STREAM, reader)
    assert reader.events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "error" in reader.events[-1] and ledger(world)[-1] == ("release", HELD)


async def test_a_stream_that_ends_without_a_word_of_its_end_is_cut() -> None:
    """Without `[DONE]` it must have said why its answer ended."""
    for events, whole in ([*WORDS], True), ([*WORDS[:-1]], False):
        world, reader, client = speaking_world(), Reader(), Speakers(events)
        client.ends = "whole"
        await ask(world, client, STREAM, reader)
        assert (reader.parts[-1] == b"data: [DONE]\n\n") is whole
        assert [what for what, _ in ledger(world)] == ["hold", "capture" if whole else "release"]


async def test_a_stream_without_end_is_ended() -> None:
    world, reader = speaking_world(), Reader()
    client = Speakers([event("word")] * 1_000)
    await ask(world, client, STREAM, reader)
    assert "error" in reader.events[-1] and client.streams[0].closed
    assert len(reader.parts) <= CHAT.output_max + EVENTS_MORE + 1


async def test_a_caller_that_waits_gets_comments_and_then_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(stream, "COMMENT_S", 0.0)
    world, reader, begin = speaking_world(), Reader(), asyncio.Event()
    client = Speakers([begin.wait, *WORDS, usage_event(9, 3)])
    asking = asyncio.create_task(ask(world, client, STREAM, reader))
    while len(reader.parts) < 3:
        await asyncio.sleep(0)
    begin.set()
    await asking
    assert reader.parts[:3] == [b": \n\n"] * 3 and reader.text == "Well, this is."
    assert ledger(world)[-1] == ("capture", 9 + 3 * 3)


async def test_who_leaves_among_the_comments_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FIRST_WAIT_S", 0.0)
    world, reader = speaking_world(), Reader(parts_max=1)
    await ask(world, Speakers([asyncio.Event().wait]), STREAM, reader)
    assert reader.parts == [b": \n\n"] and ledger(world) == [("hold", HELD), ("release", HELD)]
    assert world.node("n0").load.parts == 0


async def test_a_failure_after_comments_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FIRST_WAIT_S", 0.0)
    world, reader, begin = speaking_world(), Reader(), asyncio.Event()
    asking = asyncio.create_task(ask(world, Speakers([begin.wait, NodeBroke("cut")]), STREAM, reader))
    while not reader.parts:
        await asyncio.sleep(0)
    begin.set()
    await asking
    assert "error" in reader.events[-1] and ledger(world)[-1] == ("release", HELD)


async def test_a_silent_node_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BETWEEN_S", 0.0)
    world, reader = speaking_world(), Reader()
    client = Speakers([event("word"), asyncio.Event().wait])
    await ask(world, client, STREAM, reader)
    assert "error" in reader.events[-1] and client.streams[0].closed and ledger(world)[-1] == ("release", HELD)


async def test_the_hold_of_a_stream_is_extended_with_what_it_owes() -> None:
    world, reader, go_on = speaking_world(), Reader(), asyncio.Event()
    leases = Leases(world.ledger, world.clock)
    client = Speakers([event("word"), go_on.wait, event("more"), event(finish="stop")])
    asking = asyncio.create_task(ask(world, client, STREAM, reader, leases=leases))
    while not reader.parts:
        await asyncio.sleep(0)
    world.clock.now += 20.0
    await leases.extend()
    (note,) = world.ledger.notes
    assert note.deadline_ms == world.clock.unix_ms() + 30_000
    assert note.charge.meters[-1].quantity == 1 and note.charge.node_id == "n0"
    go_on.set()
    await asking
    await leases.extend()
    assert len(world.ledger.notes) == 1 and ledger(world)[-1][0] == "capture"


async def test_a_stream_that_begins_too_late_is_closed() -> None:
    """As after a machine has slept: its hold may end before it is read."""
    world, reader = speaking_world(), Reader()

    async def sleeps() -> None:
        world.clock.now += 50.0

    leases, client = Leases(world.ledger, world.clock), Speakers([sleeps, *WORDS])
    with pytest.raises(Failure):
        await ask(world, client, STREAM, reader, leases=leases)
    assert client.streams[0].closed and not leases._leases and world.node("n0").load.parts == 0
    assert ledger(world) == [("hold", HELD), ("release", HELD)]


async def test_a_note_leaves_out_the_event_that_is_on_its_way() -> None:
    """If the gateway dies now, its caller never had that."""
    world = speaking_world()
    leases = Leases(world.ledger, world.clock)

    class Slow(Reader):
        async def __call__(self, reply: Reply | StreamedReply) -> Delivery:
            assert isinstance(reply, StreamedReply)
            async for part in reply.parts:
                self.parts.append(part)
                await leases.extend()
            return Delivery.WHOLE

    await ask(world, Speakers([event("four"), event("more"), event(finish="stop")]), STREAM, Slow(), leases=leases)
    before, after_one, *_ = (note.charge for note in world.ledger.notes)
    assert before.cost_nanousd == 0 < after_one.cost_nanousd
    assert after_one.meters[-1].quantity == 1 and world.ledger.charges[-1].meters[-1].quantity == 2


@pytest.mark.parametrize("how", ["ended", "away"])
async def test_a_stream_ends_with_its_hold(how: str) -> None:
    """Another gateway has charged the note, or will: nobody would pay for what follows."""
    world = speaking_world()
    leases = Leases(world.ledger, world.clock)

    class Slow(Reader):
        async def __call__(self, reply: Reply | StreamedReply) -> Delivery:
            assert isinstance(reply, StreamedReply)
            async for part in reply.parts:
                self.parts.append(part)
                if how == "ended":
                    world.ledger.ended_ids |= leases._leases.keys()
                    await leases.extend()
                else:
                    world.clock.now += 56.0
            return Delivery.WHOLE

    client, reader = Speakers([event("one"), event("two"), event("three"), event(finish="stop")]), Slow()
    await ask(world, client, STREAM, reader, leases=leases)
    assert reader.text == "one" and reader.events[-1]["error"]["code"] == "store_unavailable"
    assert client.streams[0].closed and ledger(world)[-1][0] == "release"


async def test_leases_are_tried_again_soon_while_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two tries are all that a hold has."""
    world, slept = speaking_world(), []
    outcomes = iter([None, StoreUnavailable("away"), StoreUnavailable("away"), None])
    leases = Leases(world.ledger, world.clock)

    async def extend() -> None:
        if (outcome := next(outcomes, None)) is not None:
            raise outcome

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 4:
            raise asyncio.CancelledError

    monkeypatch.setattr(leases, "extend", extend)
    monkeypatch.setattr("embedmesh.flow.leases.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await leases.run()
    assert slept == [10.0, 1.0, 1.0, 10.0]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_stream_whose_hold_has_ended_is_ended(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """As when the store was away for long, and another gateway's sweep came first."""
    monkeypatch.setattr(stream, "FIRST_WAIT_S", 0.0)
    world, reader = speaking_world(), Reader()
    leases = Leases(world.ledger, world.clock)
    client = Speakers([*([event("word")] if begun else []), asyncio.Event().wait, event("more")])
    asking = asyncio.create_task(ask(world, client, STREAM, reader, leases=leases))
    while not reader.parts or (begun and reader.parts[-1] == stream.COMMENT):
        await asyncio.sleep(0)
    world.ledger.ended_ids.update(leases._leases)
    await leases.extend()
    await asking
    assert reader.events[-1]["error"]["code"] == "store_unavailable" and client.streams[0].closed
    assert ledger(world)[-1] == ("release", HELD) and not leases._leases
    assert world.node("n0").load.parts == 0 and not world.node("n0").failures_in_a_row


async def test_a_stream_that_takes_too_long_is_paid() -> None:
    """Or who reads the last of it slowly enough would have the rest for nothing."""
    world = speaking_world()
    leases = Leases(world.ledger, world.clock)
    reader = Slow(world, 40.0, leases)
    await ask(world, Speakers([event("word")] * 100), STREAM | {"max_tokens": 100}, reader, leases=leases)
    assert reader.events[-1]["error"]["code"] == "deadline_exceeded" and len(reader.parts) == 92
    assert metered(world)[Meter.OUTPUT] == 91


async def test_who_holds_a_node_back_makes_room_for_others() -> None:
    """A thousand streams that are hardly read would keep the only node for an hour each."""
    world = speaking_world()
    node = world.node("n0")
    node.in_flight_max, node.load = 1, ParallelLoad()
    slow = Slow(world, 4.0)
    holding = asyncio.create_task(ask(world, Speakers([event("word")] * 20), STREAM, slow))
    while not slow.parts:
        await asyncio.sleep(0)
    few = Reader()
    await asyncio.gather(holding, ask(world, Speakers(answer("Hi.")), HELLO, few, key=OTHER_KEY))
    assert few.body and slow.events[-1]["error"]["code"] == "deadline_exceeded"
    assert {entry for entry, _ in ledger(world)} == {"hold", "capture"}
    assert len(slow.parts) == 4  # three events, in twelve seconds


async def test_a_caller_that_reads_slowly_makes_no_node_look_slow() -> None:
    """Others would be sent to worse ones."""
    world = speaking_world()
    await ask(world, Speakers([*WORDS, usage_event(9, 4)]), STREAM, Slow(world, 5.0))
    assert not world.node("n0").load.measured and world.node("n0").load.parts == 0


async def test_a_stream_takes_nothing_from_a_tab() -> None:
    world = speaking_world()
    world.ledger.tabs = True
    await ask(world, Speakers([*WORDS]), STREAM, Reader())
    assert [what for what, _ in ledger(world)] == ["hold", "capture"]


async def test_who_leaves_before_a_whole_answer_keeps_its_likely_tokens_spent() -> None:
    """Or a key could have nodes work all day within a limit that counts prompts only."""
    world, begun = speaking_world(), asyncio.Event()

    class Silent(Speakers):
        async def generate(self, *_: Any) -> bytes:
            begun.set()
            await asyncio.Event().wait()
            return b""

    asking = asyncio.create_task(ask(world, Silent(), HELLO, Reader()))
    await begun.wait()
    asking.cancel()
    await asyncio.wait({asking})
    assert ledger(world)[-1] == ("release", HELD) and sum(world.rate_limits.in_vain) >= CHAT.output_max // 4


async def test_what_was_made_counts_against_the_key_s_limits() -> None:
    world = speaking_world()
    await ask(world, Speakers([*WORDS, usage_event(9, 3)]), STREAM, Reader())
    (taken,), (more,) = world.rate_limits.asked, world.rate_limits.in_vain
    assert taken + more == 9 + 3


async def test_what_begins_alike_goes_to_one_node_where_the_operator_wants_that() -> None:
    """And what does not to several; more of the same conversation changes nothing."""
    chat = msgspec.structs.replace(CHAT, affinity=True)
    for alike in True, False:
        world = speaking_world(4, [chat, PAINTER])
        client = Speakers(*[answer("Hi.", prompt_tokens=9, completion_tokens=2)] * 24)
        for number in range(24):
            first = {"role": "system", "content": "You are a poet." if alike else f"You are poet {number}."}
            talk = [first, {"role": "user", "content": "Begin."}, {"role": "user", "content": f"{number}"}]
            await ask(world, client, HELLO | {"messages": talk}, Reader())
        assert (len({node for node, _ in client.asked}) == 1) is alike
