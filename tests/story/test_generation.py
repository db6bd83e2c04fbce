"""Chat, completions and images over HTTP: what callers get, and what it costs them, whatever the node does."""

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bench.faultnode import speech
from bench.faultnode.speech import CALLS, PROMPT_TOKENS, TOKENS, Asked
from bench.faultnode.speech_modes import SPEECH_MODES
from bench.rig.streams import DONE, Caller, event_of, events_of, text_of
from embedmesh.rules.exchange import REQUEST_HEADER
from tests.story.conftest import Note
from tests.story.endpoint import run, wait_until
from tests.story.generating import (
    CHARGED,
    CHAT,
    FRAIL,
    INPUT_PRICE,
    LARGE,
    LARGE_PRICE,
    OLD,
    OUTPUT_MAX,
    OUTPUT_PRICE,
    PAINTER,
    PAIR,
    SAID,
    SMALL,
    SMALL_PRICE,
    USAGE,
    Charge,
    Generating,
    asking,
    estimated,
    own_input,
    streaming,
    tokens_of,
)

ODD = [name for name, mode in SPEECH_MODES.items() if mode.odd and name != "refuses-options"]
BREAKS = ("dies", "resets", "errs", "no-json", "large-event", "no-end", "cut at=700")
FAILS_WHOLE = ("html", "error-200", "error-500", "busy-503", "close-at-once", "reset-at-once")
FAILS_FIRST = ("errs-first", "empty", "done-only", *FAILS_WHOLE)
SEES_S = 1.0  # a node sees that a caller has gone within 0.1 s on a quiet machine
RESETS = 20  # `make streams` has a thousand
TRIES = 10
PARALLEL, MONEY_FOR = 50, 3
SLOW_S, SLOW_BYTES = 3.0, 1_000
GROWTH_BYTES_MAX = 512 * 1024  # twice what one such reader may take: this is the memory of a whole process
SENTINEL = "xyzzy-4f1c"


def whole_stream(speaking: Generating, body: dict[str, Any], path: str = "chat/completions") -> list[dict[str, Any]]:
    """The events of a stream that ends as it should."""
    with speaking.call(body, path) as caller:
        status, headers = caller.head()
        assert status == 200 and headers["content-type"] == "text/event-stream"
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
        assert "content-encoding" not in headers
        return events_of(caller.chunks())


def broken_stream(speaking: Generating, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a stream that breaks off, and its error, which must be the last that comes."""
    with speaking.call(body) as caller:
        assert caller.head()[0] == 200
        *events, last = map(event_of, caller.chunks())
    assert set(last) == {"error"} and set(last["error"]) == {"message", "type", "param", "code"}
    return events, last["error"]


# -- the twelve tests that any forwarder of chats must pass ------------------------------------------------------------


@pytest.mark.parametrize("mode", ODD)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_1_a_stream_is_the_same_however_its_node_writes_it(speaking: Generating, path: str, mode: str) -> None:
    """One event a write, all of one answer, none of the node's comments, ids and names; charged by its usage."""
    words = f"Tell me. <<{mode} pace=0.0001>>"
    asked = {"messages": [{"role": "user", "content": words}]} if path.startswith("chat") else {"prompt": words}
    events = whole_stream(speaking, {"model": CHAT, "n": 2, "stream": True, **asked}, path)
    assert text_of(events, 0) == text_of(events, 1) == SAID
    assert {(each["id"], each["created"], each["model"]) for each in events} == {
        (events[0]["id"], events[0]["created"], CHAT)
    }
    assert not any("usage" in each for each in events)
    if path.startswith("chat"):
        assert [("role" in each["choices"][0]["delta"]) for each in events] == [True] * 2 + [False] * (len(events) - 2)
    assert speaking.charge(events[0]["id"]) == Charge(
        PROMPT_TOKENS * INPUT_PRICE + 2 * TOKENS * OUTPUT_PRICE,
        {"input": PROMPT_TOKENS, "cached": 0, "output": 2 * TOKENS},
        estimated=False,
    )


@pytest.mark.parametrize("wanted", [None, False, True])
@pytest.mark.parametrize("mode", ["honest", "usage-unasked", "usage-in-each", "usage-on-finish", "usage-twice"])
def test_2_usage_is_charged_and_is_told_to_who_asks(speaking: Generating, mode: str, wanted: bool | None) -> None:
    """The ledger has the node's; a stream has none unless asked for, and then one, at its end."""
    options: dict[str, Any] = {} if wanted is None else {"stream_options": {"include_usage": wanted}}
    *events, last = whole_stream(speaking, streaming(mode, **options))
    if wanted:
        assert last["choices"] == [] and last["usage"]["total_tokens"] == PROMPT_TOKENS + TOKENS
        assert all(each["usage"] is None for each in events)
    else:
        assert not any("usage" in each for each in [*events, last])
    assert speaking.charge(last["id"]) == Charge(
        CHARGED, {"input": PROMPT_TOKENS, "cached": 0, "output": TOKENS}, estimated=False
    )


@pytest.mark.parametrize("mode", ["no-usage", "usage-absurd", "usage-negative", "usage-text"])
def test_2_where_the_node_tells_none_that_can_be_we_count(speaking: Generating, mode: str) -> None:
    """Never nothing, never more than was held; marked, and told to the caller as it is charged."""
    body = asking(mode)
    reply = speaking.post(body)
    told = reply["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"]) == (own_input(body), tokens_of(SAID))
    events = whole_stream(speaking, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert events[-1]["usage"] == told
    for answer in reply, events[0]:
        charge = speaking.charge(answer["id"])
        assert charge is not None and charge.estimated and charge.cost == estimated(body, SAID)


def test_2_a_node_that_refuses_stream_options_is_asked_without(speaking: Generating) -> None:
    with speaking.old.ordered("refuses-options"):
        for _ in range(2):
            events = whole_stream(speaking, streaming(model=OLD))
            assert text_of(events) == SAID
            charge = speaking.charge(events[0]["id"])
            assert charge is not None and charge.estimated
    assert "stream_options" not in speaking.old.last


@pytest.mark.parametrize("events", range(1, TOKENS + 3))
def test_3_who_hangs_up_after_some_events_pays_for_them(speaking: Generating, note: Note, events: int) -> None:
    """4: and its node sees it at once. Nothing is held back: the node says no more, and the caller has all of it."""
    body = streaming(f"stalls at={events}")
    with speaking.call(body) as caller:
        assert caller.head()[0] == 200
        read = [event_of(caller.chunk() or b"") for _ in range(events)]
    left_at = time.monotonic()
    heard = speaking.sole.node.heard[-1]
    wait_until("the node sees it", lambda: heard.ended_at, SEES_S)
    assert heard.left and heard.ended_at is not None
    charge = speaking.charge(read[0]["id"])
    if events == 1:
        note("a caller that hangs up: seen by its node after", 1e3 * (heard.ended_at - left_at), "ms")
        note("a caller that hangs up: charged after", 1e3 * (time.monotonic() - left_at), "ms")
    assert charge is not None and charge.cost == estimated(body, text_of(read))


def test_3_who_hangs_up_while_the_node_goes_on_pays_for_what_was_handed_over(speaking: Generating) -> None:
    """As many events as it has read, and at most those that the node had written meanwhile."""
    body = streaming("honest tokens=60 pace=0.01", max_tokens=60)
    for events in (1, 7, 20):
        with speaking.call(body) as caller:
            caller.head()
            read = [event_of(caller.chunk() or b"") for _ in range(events)]
        heard = speaking.sole.node.heard[-1]
        wait_until("the node sees it", lambda heard=heard: heard.ended_at, SEES_S)  # type: ignore[misc]
        charge = speaking.charge(read[0]["id"])
        most = speech.text(heard.written - 1)  # the first event has the role only
        assert charge is not None and estimated(body, text_of(read)) <= charge.cost <= estimated(body, most)


def test_3_who_hangs_up_before_the_first_event_pays_nothing_and_no_other_node_is_asked(speaking: Generating) -> None:
    before = [node.asked for node in speaking.pair]
    with speaking.call(streaming("hang", PAIR)):
        wait_until("a node has heard it", lambda: [node.asked for node in speaking.pair] != before, SEES_S)
    (node,) = (node for node, asked in zip(speaking.pair, before, strict=True) if node.asked != asked)
    wait_until("the node sees it", lambda: node.node.heard[-1].left, SEES_S)
    time.sleep(0.1)  # a second attempt would begin at once
    assert sum(node.asked for node in speaking.pair) == sum(before) + 1


@pytest.mark.parametrize("after_end", [False, True], ids=["after [DONE]", "after the last byte"])
def test_5_a_reset_after_the_last_byte_is_paid(speaking: Generating, after_end: bool) -> None:

    def once(_: int) -> str:
        caller = speaking.call(streaming())
        _, headers = caller.head()
        while caller.chunk() != DONE:
            pass
        if after_end:
            assert caller.chunk() is None
        caller.reset()
        return headers[REQUEST_HEADER]

    with ThreadPoolExecutor(4) as pool:
        charges = [speaking.charge(request_id) for request_id in pool.map(once, range(RESETS))]
    assert [charge and charge.cost for charge in charges] == [CHARGED] * RESETS


@pytest.mark.parametrize("order", BREAKS)
def test_6_a_stream_that_breaks_off_never_looks_whole(speaking: Generating, order: str) -> None:
    """Its last event is the error, there is no [DONE], and it costs nothing."""
    events, error = broken_stream(speaking, streaming(order, FRAIL))
    assert SAID.startswith(text_of(events)) and error["code"] == "bad_node_response"
    assert "scripted" not in json.dumps(error) and "127.0.0.1" not in json.dumps(error)
    assert speaking.charge(events[0]["id"]) is None
    speaking.mend(speaking.frail, FRAIL)


def test_6_wherever_it_is_cut(speaking: Generating) -> None:
    """It is whole if [DONE] has come, and never else. A sample of the bytes: `make streams` tries each."""
    whole = sum(map(len, speech.frames(speech.events(Asked("chat/completions", ASKED_OF_NODE)))))
    for at in (*range(150, whole, 239), whole - 14, whole - 2, whole):
        with speaking.call(streaming(f"cut at={at}", FRAIL)) as caller:
            status, _ = caller.head()
            done = status == 200 and list(caller.chunks())[-1] == DONE
        assert done == (at == whole), at
        speaking.mend(speaking.frail, FRAIL)


@pytest.mark.parametrize(
    ("mode", "streams"), [*((mode, True) for mode in FAILS_FIRST), *((mode, False) for mode in FAILS_WHOLE)]
)
def test_7_what_fails_before_its_first_event_is_answered_by_another_node(
    speaking: Generating, mode: str, streams: bool
) -> None:
    """The caller sees one good answer; where all fail, a status and no stream."""
    for _ in range(TRIES):
        before = [node.asked for node in speaking.pair]
        speaking.post(asking(model=PAIR))
        bad = next(node for node, asked in zip(speaking.pair, before, strict=True) if node.asked > asked)
        asked = bad.asked
        with bad.ordered(mode):  # which is asked first now, unless it was not well
            if streams:
                assert text_of(whole_stream(speaking, streaming(model=PAIR))) == SAID
            else:
                assert speaking.post(asking(model=PAIR))["choices"][0]["message"]["content"] == SAID
        if bad.asked > asked:
            return
    raise AssertionError("the node that fails was never asked")


def test_7_where_every_node_fails_first_the_caller_gets_a_status(speaking: Generating) -> None:
    for order, status, code in (
        ("errs-first", 503, "no_node_available"),
        ("html", 502, "bad_node_response"),
        ("refuse-400", 400, "invalid_value"),
        ("too-long", 400, "context_length_exceeded"),
        ("too-long-first", 400, "context_length_exceeded"),
    ):
        for body in (asking(order, FRAIL), streaming(order, FRAIL)):
            if order.endswith("first") and "stream" not in body:
                continue
            reply = speaking.ask(body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), order
            assert reply.headers["content-type"] == "application/json"
            speaking.mend(speaking.frail, FRAIL)


@pytest.mark.parametrize("order", ["dies at=1", "resets at=4", "errs at=2"])
def test_8_after_the_first_event_no_second_node_is_asked(speaking: Generating, order: str) -> None:
    before = sum(node.asked for node in speaking.pair)
    events, _ = broken_stream(speaking, streaming(order, PAIR))
    assert SAID.startswith(text_of(events)) and len(events) == int(order[-1])
    assert sum(node.asked for node in speaking.pair) == before + 1
    assert speaking.charge(events[0]["id"]) is None


@pytest.mark.parametrize("mode", [name for name in SPEECH_MODES if name.startswith("tools")])
def test_11_tool_calls_of_every_known_shape(speaking: Generating, mode: str) -> None:
    """Their arguments byte for byte, each call with its own index and id, never merged."""
    made: dict[int, dict[str, str]] = {}
    events = whole_stream(speaking, streaming(mode, tools=TOOLS, parallel_tool_calls=True))
    for call in (call for each in events for call in each["choices"][0]["delta"].get("tool_calls", ())):
        into = made.setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
        into["id"] = call.get("id") or into["id"]
        into["name"] += call["function"].get("name") or ""
        into["arguments"] += call["function"].get("arguments") or ""
    called = [made[index] for index in sorted(made)]
    two = mode in ("tools-interleaved", "tools-no-index", "tools-at-once")
    assert called == [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in CALLS[: 2 if two else 1]]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    whole = speaking.post(asking(mode, tools=TOOLS))["choices"][0]["message"]
    assert whole["content"] is None and [c["function"]["arguments"] for c in whole["tool_calls"]] == [
        c.arguments for c in CALLS
    ]


ASKED_OF_NODE = {"model": "scripted", "stream": True, "stream_options": {"include_usage": True}}
TOOLS = [
    {"type": "function", "function": {"name": call.name, "parameters": {"type": "object", "properties": {}}}}
    for call in CALLS
]


def test_12_who_reads_slowly_slows_the_node_down_and_takes_no_memory(speaking: Generating, note: Note) -> None:
    """The node has fifty megabytes to say. A kilobyte a second is read, and what is between is in the kernel."""
    body = streaming("endless", max_tokens=200_000)
    with speaking.call(streaming("honest tokens=2000", max_tokens=2_000)) as caller:  # what a first stream takes
        caller.head()
        events_of(caller.chunks())
    before = speaking.endpoint.resident_mb("gateway")
    with speaking.call(body, receive_bytes=4_096) as caller:
        caller.head()
        until, heard, written = time.monotonic() + SLOW_S, speaking.sole.node.heard[-1], []
        while time.monotonic() < until:
            caller.sock.recv(SLOW_BYTES)
            written.append(heard.written)
            time.sleep(1.0 / 4)
        growth = 1e6 * (speaking.endpoint.resident_mb("gateway") - before)
    note("a slow reader of a long stream: the gateway grows by", growth / 1e3, "kB")
    assert written[-1] - written[len(written) // 2] < 100, "the node is slowed down"
    assert growth < GROWTH_BYTES_MAX
    wait_until("the node sees that it has gone", lambda: heard.left, SEES_S)


# -- money and secrets -------------------------------------------------------------------------------------------------


def test_as_many_streams_begin_as_there_is_money_for(speaking: Generating) -> None:
    """Fifty at one moment, with money for three: three, and the others are refused before any node is asked."""
    body = streaming("stalls at=2")
    rich = speaking.account("rich", 10**9)
    with speaking.call(body, key=rich) as caller:
        caller.head()
        held = speaking.books.accounts.find("rich").held_nanousd
    poor = speaking.account("poor", MONEY_FOR * held)
    asked, barrier = speaking.sole.asked, threading.Barrier(PARALLEL)
    callers: list[Caller] = []

    def once(_: int) -> int:
        barrier.wait()
        caller = speaking.call(body, key=poor)
        callers.append(caller)
        return caller.head()[0]

    with ThreadPoolExecutor(PARALLEL) as pool:
        statuses = list(pool.map(once, range(PARALLEL)))
    assert (statuses.count(200), statuses.count(429)) == (MONEY_FOR, PARALLEL - MONEY_FOR)
    assert speaking.sole.asked == asked + MONEY_FOR
    for each in callers:
        each.close()
    left = speaking.endpoint.account("poor").balance_nanousd
    assert 0 < left < MONEY_FOR * held


def test_ledger_explain_says_what_was_generated_and_who_counted(speaking: Generating) -> None:
    answers = [speaking.ask(asking()), speaking.ask(asking("no-usage"))]
    answers.append(speaking.ask({"model": PAINTER, "prompt": "A cat", "n": 2}, "images/generations"))
    said = []
    for answer in answers:
        speaking.charge(request_id := answer.headers[REQUEST_HEADER])
        said.append(run("ledger", "explain", request_id, "--data-dir", speaking.endpoint.data_dir).stdout.decode())
    assert f"for 7 input tokens at $0.001 a million, 12 output tokens at $0.003 a million of {CHAT}" in said[0]
    assert "output tokens, by the gateway's own count, at $0.003 a million" in said[1]
    assert f"for 2 images at $0.002 of {PAINTER}" in said[2]


def test_an_output_limit_is_always_sent_and_held(speaking: Generating) -> None:
    for given, sent in (({}, OUTPUT_MAX), ({"max_tokens": None}, OUTPUT_MAX), ({"max_completion_tokens": 5}, 5)):
        reply = speaking.post(asking(**given))
        assert speaking.sole.last["max_tokens"] == sent
        assert reply["usage"]["completion_tokens"] == min(TOKENS, sent)


def test_the_same_reply_for_an_idempotency_key_is_charged_once(speaking: Generating) -> None:
    asked = speaking.sole.asked
    first, second = (speaking.ask(asking(), **{"Idempotency-Key": "story"}) for _ in range(2))
    assert first.content == second.content
    assert speaking.sole.asked == asked + 1
    charge = speaking.charge(first.headers[REQUEST_HEADER])
    assert charge is not None and charge.cost == CHARGED


@pytest.mark.parametrize(
    ("asked", "data", "cost"),
    [
        ({}, {"b64_json", "url"}, LARGE_PRICE),
        ({"response_format": "b64_json", "size": SMALL, "n": 3}, {"b64_json"}, 3 * SMALL_PRICE),
        ({"response_format": "url", "size": SMALL}, {"url"}, SMALL_PRICE),
    ],
)
def test_images(speaking: Generating, asked: dict[str, Any], data: set[str], cost: int) -> None:
    answer = speaking.ask({"model": PAINTER, "prompt": "A cat", **asked}, "images/generations")
    reply = answer.json()
    width, height = asked.get("size", LARGE).split("x")
    assert len(reply["data"]) == asked.get("n", 1)
    for number, image in enumerate(reply["data"]):
        assert set(image) == data | {"revised_prompt"}
        encoded = image.get("b64_json") or image["url"].removeprefix("data:image/png;base64,")
        assert base64.b64decode(encoded) == speech.png(int(width), int(height), number)
    assert speaking.charge(answer.headers[REQUEST_HEADER]) == Charge(
        cost, {"images": asked.get("n", 1)}, estimated=False
    )


@pytest.mark.parametrize("mode", ["image-url", "image-text", "image-few", "html"])
def test_an_image_that_is_none_is_not_delivered_and_not_charged(speaking: Generating, mode: str) -> None:
    reply = speaking.ask({"model": PAINTER, "prompt": f"<<{mode}>>"}, "images/generations")
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "bad_node_response")
    assert "10.0.0.1" not in reply.text
    right = [speaking.ask({"model": PAINTER, "prompt": "A cat"}, "images/generations") for _ in range(2)]
    charges = [speaking.charge(each.headers[REQUEST_HEADER]) for each in right]
    assert [each and each.cost for each in charges] == [LARGE_PRICE] * 2
    assert speaking.books._db.execute(USAGE, {"hold_id": reply.headers["x-request-id"]}).fetchall() == []


@pytest.mark.parametrize(
    ("path", "more", "status", "code", "param"),
    [
        ("chat/completions", {"model": PAINTER}, 400, "unsupported_modality", "model"),
        ("images/generations", {"prompt": "x", "messages": None}, 400, "unsupported_modality", "model"),
        ("chat/completions", {"model": "all-MiniLM-L6-v2"}, 400, "unsupported_modality", "model"),
        ("chat/completions", {"model": "nobody/nothing"}, 404, "model_not_found", "model"),
        ("chat/completions", {"messages": []}, 400, "empty_input", "messages"),
        ("chat/completions", {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ("chat/completions", {"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
        ("chat/completions", {"max_tokens": 2**63}, 400, "invalid_value", "max_tokens"),
        ("chat/completions", {"n": 129}, 400, "invalid_value", "n"),
        ("chat/completions", {"temperatur": 1}, 400, "unknown_parameter", "temperatur"),
        ("chat/completions", {"max_tokens": 5, "max_completion_tokens": 6}, 400, "invalid_value", "max_tokens"),
        ("completions", {"messages": None, "prompt": "x", "best_of": 1, "n": 2}, 400, "invalid_value", "best_of"),
    ],
)
def test_refusals(speaking: Generating, path: str, more: dict[str, Any], status: int, code: str, param: str) -> None:
    asked = speaking.sole.asked
    reply = speaking.ask(asking() | more, path)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    assert speaking.sole.asked == asked


def test_a_key_needs_the_scope(speaking: Generating) -> None:
    _, key = speaking.books.keys.create("local", ("embeddings",))
    with speaking.call(asking(), key=key) as caller:
        status, _ = caller.head()
        assert (status, json.loads(caller.body())["error"]["code"]) == (403, "insufficient_scope")


def test_texts_are_in_no_log_metric_or_file(speaking: Generating) -> None:
    """Neither the caller's, nor the node's, whether it goes well or not."""
    messages = [{"role": "user", "content": SENTINEL, "name": SENTINEL}, {"role": "assistant", "content": SENTINEL}]
    tools = [{"type": "function", "function": {"name": SENTINEL, "description": SENTINEL}}]
    for order in ("honest", "tools", "dies", "refuse-400", "html", "no-usage"):
        last = {"role": "user", "content": f"<<{order}>>"}
        body = {"model": FRAIL, "messages": [*messages, last], "tools": tools, "user": SENTINEL, "stop": SENTINEL}
        for streams in (False, True):
            headers = {} if streams else {"Idempotency-Key": f"sentinel-{order}"}
            speaking.ask(body | {"stream": streams}, **headers)
        speaking.mend(speaking.frail, FRAIL)
    speaking.post({"model": CHAT, "prompt": SENTINEL}, "completions")
    speaking.post({"model": PAINTER, "prompt": SENTINEL}, "images/generations")
    endpoint = speaking.endpoint
    endpoint.account()
    kept = {"metrics": endpoint.get("/metrics", endpoint.admin_key).content}
    kept |= {str(file): file.read_bytes() for file in endpoint.data_dir.rglob("*") if file.is_file()}
    kept |= {str(file): file.read_bytes() for file in (endpoint.log, endpoint.said)}
    secret = (SENTINEL.encode(), "gr\u00fc\u00dfen".encode(), CALLS[0].arguments.encode(), b"Tell me something")
    assert [(name, word) for name, data in kept.items() for word in secret if word in data] == []
