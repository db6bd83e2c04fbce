"""Ordinary calls: what comes back, what is sent again, and what a bad or slow reply becomes. Both clients."""

import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedmesh.client import (
    CallNotAnswered,
    CallRefused,
    CallTooSlow,
    Client,
    EmbedmeshError,
    NotEmbeddings,
    WrongCall,
)
from tests.client.conftest import Call
from tests.client.gateway import (
    ALIAS,
    KEY,
    Members,
    Raw,
    Received,
    ScriptedGateway,
    embed,
    envelope,
    free_port,
    vector_of,
)


def test_a_reply_has_the_attributes_of_openais(gateway: ScriptedGateway, call: Call) -> None:
    reply = call(model=ALIAS, input=["one", "two"], user="u", input_type="query", dimensions=8, truncate="end")
    assert [item.index for item in reply.data] == [0, 1]
    assert np.array(reply.data[1].embedding, "<f4").tobytes() == vector_of("two", 8)
    assert (reply.object, reply.data[0].object, reply.model) == ("list", "embedding", ALIAS)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (6, 6)
    assert reply.request_id == "req_1"
    sent = gateway.received[0]
    assert sent.body == {
        "model": ALIAS,
        "input": ["one", "two"],
        "encoding_format": "base64",
        "user": "u",
        "input_type": "query",
        "dimensions": 8,
        "truncate": "end",
    }
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert sent.headers["content-type"] == "application/json"


@pytest.mark.parametrize("given", ["a", ["a"], [1, 2], [[1, 2], [3]], ("a", "b")], ids=str)
def test_every_form_of_input_is_sent_as_it_is(gateway: ScriptedGateway, call: Call, given: Any) -> None:
    call(model="m", input=given)
    assert gateway.received[0].body["input"] == (list(given) if isinstance(given, tuple) else given)


def test_base64_is_given_as_openai_gives_it(call: Call) -> None:
    reply = call(model=ALIAS, input="one", encoding_format="base64")
    assert base64.b64decode(reply.data[0].embedding) == vector_of("one")  # type: ignore[arg-type]


def test_further_members_go_into_the_request(gateway: ScriptedGateway, call: Call) -> None:
    call(model=ALIAS, input="one", extra_body={"prompt_name": "query", "normalize": None})
    assert gateway.received[0].body["prompt_name"] == "query"
    assert "normalize" not in gateway.received[0].body


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"input": []}, "must not be empty"),
        ({"input": 3}, "a text, a list of texts"),
        ({"input": ["a", 1]}, "all texts"),
        ({"input": [1.5]}, "a text, a list of texts"),
        ({"input": ["x"] * 2049}, "at most 2,048"),
        ({"input": "\ud800"}, "surrogate"),
        ({"input": "a", "encoding_format": "int8"}, "float or base64"),
        ({"input": "a", "extra_body": {"x": 1j}}, "not JSON"),
        ({"input": "a", "confidential": True}, "needs pins"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_is_refused_here(
    gateway: ScriptedGateway, call: Call, arguments: Members, says: str
) -> None:
    with pytest.raises(WrongCall, match=says):
        call(model=ALIAS, **arguments)
    assert gateway.received == []


def test_a_refusal_says_who_what_and_which_field(gateway: ScriptedGateway, call: Call) -> None:
    gateway.script = lambda received: (400, envelope("empty_input", "`input.1` is empty.", "input.1"))
    with pytest.raises(CallRefused) as caught:
        call(model=ALIAS, input=["a", "b"])
    error = caught.value
    assert (error.status, error.code, error.param, error.request_id) == (400, "empty_input", "input.1", "req_1")
    assert str(error) == "The gateway refused: `input.1` is empty (empty_input, HTTP 400)."
    assert not error.sealed
    assert isinstance(error, EmbedmeshError)


# -- trying again ------------------------------------------------------------------------------------------------------


def first(times: int, answer: Any) -> Any:
    """A script that answers so at first."""
    left = [answer] * times
    return lambda received: left.pop() if left else None


@pytest.mark.parametrize("status", [429, 503])
def test_what_may_go_later_is_tried_later(gateway: ScriptedGateway, call: Call, status: int) -> None:
    gateway.script = first(2, (status, envelope("overloaded"), {"Retry-After": "1", "retry-after-ms": "20"}))
    began = time.monotonic()
    call(model=ALIAS, input="a")
    assert len(gateway.received) == 3
    assert time.monotonic() - began >= 0.04
    assert len({one.raw for one in gateway.received}) == 1


@pytest.mark.parametrize(
    ("answer", "tries"),
    [
        ((503, envelope("overloaded"), {"retry-after-ms": "1"}), 3),
        ((429, envelope("insufficient_quota"), {"x-should-retry": "false"}), 1),
        ((503, envelope("overloaded"), {"Retry-After": "86400"}), 1),  # longer than the call may last
        ((500, envelope("internal_error"), {}), 1),
        ((409, envelope("idempotency_conflict"), {}), 1),
        ((302, {}, {"Location": "http://127.0.0.1:1/v1/embeddings"}), 1),
    ],
    ids=str,
)
def test_a_refusal_that_stays_is_raised(gateway: ScriptedGateway, call: Call, answer: Any, tries: int) -> None:
    gateway.script = lambda received: answer
    with pytest.raises(CallRefused):
        call(model=ALIAS, input="a")
    assert len(gateway.received) == tries


def test_nothing_is_tried_again_where_the_caller_says_so(gateway: ScriptedGateway, call: Call) -> None:
    gateway.script = lambda received: (503, envelope("overloaded"), {"retry-after-ms": "1"})
    with pytest.raises(CallRefused):
        call(model=ALIAS, input="a", max_retries=0)
    assert len(gateway.received) == 1


BROKEN = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b"no HTTP at all\r\n\r\n"]


@pytest.mark.parametrize("raw", BROKEN, ids=["closed", "cut", "junk"])
def test_a_connection_that_breaks_costs_one_more_try(gateway: ScriptedGateway, call: Call, raw: bytes) -> None:
    gateway.script = first(1, Raw(raw))
    call(model=ALIAS, input="a", idempotency_key="k")
    assert [one.headers["idempotency-key"] for one in gateway.received] == ["k", "k"]
    gateway.script = lambda received: Raw(raw)
    with pytest.raises(CallNotAnswered, match="not known"):
        call(model=ALIAS, input="a")
    assert len(gateway.received) == 4


def test_where_nothing_listens_that_is_said(gateway: ScriptedGateway, call: Call) -> None:
    with pytest.raises(CallNotAnswered, match=r"cannot be reached \(Connect"):
        call(model=ALIAS, input="a", base_url=f"http://127.0.0.1:{free_port()}/v1", max_retries=0)


def test_a_call_has_one_deadline_for_everything(gateway: ScriptedGateway, call: Call) -> None:
    """Also where each byte comes in time."""
    gateway.drip_s = 0.02
    began = time.monotonic()
    with pytest.raises(CallTooSlow, match=r"0\.3 s") as caught:
        call(model=ALIAS, input="a", timeout=0.3)
    assert time.monotonic() - began < 10
    assert isinstance(caught.value, TimeoutError)


# -- replies -----------------------------------------------------------------------------------------------------------


def changed(name: str, value: Any) -> Any:
    """The right reply with another value of `data.0.NAME` or `NAME`."""

    def change(reply: Members) -> None:
        at = reply["data"][0] if name in ("index", "embedding") else reply
        at[name] = value

    return change


def floats(*values: float) -> str:
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


WRONG_REPLIES: dict[str, tuple[Callable[[Members], object], str]] = {
    "one too few": (lambda reply: reply["data"].pop(), "count"),
    "another order": (lambda reply: reply["data"].reverse(), "order"),
    "an index twice": (changed("index", 1), "order"),
    "a narrow vector": (changed("embedding", floats(1, 0)), "width"),
    "no width": (lambda reply: [item.update(embedding="") for item in reply["data"]], "width"),
    "half a float": (lambda reply: [item.update(embedding="AAAAAAA=") for item in reply["data"]], "width"),
    "no number": (changed("embedding", floats(1, 0, float("nan"), 0)), "finite"),
    "infinity": (changed("embedding", floats(1, 0, float("-inf"), 0)), "finite"),
    "all zeros": (changed("embedding", floats(0, 0, 0, 0)), "zero"),
    "no base64": (changed("embedding", "!"), "form"),
    "no tokens": (changed("usage", {"prompt_tokens": 0, "total_tokens": 0}), "tokens"),
    "two counts": (changed("usage", {"prompt_tokens": 1, "total_tokens": 2}), "tokens"),
    "no list": (changed("data", None), "form"),
    "another object": (changed("object", "dict"), "form"),
}


@pytest.mark.parametrize("wrong", WRONG_REPLIES)
def test_a_wrong_reply_is_never_returned(gateway: ScriptedGateway, call: Call, wrong: str) -> None:
    change, reason = WRONG_REPLIES[wrong]

    def on_reply(reply: Members) -> None:
        change(reply)

    gateway.on_reply = on_reply
    with pytest.raises(NotEmbeddings, match=rf"\({reason}\)"):
        call(model=ALIAS, input=["a", "b"])


def test_vectors_are_as_wide_as_was_asked_for(gateway: ScriptedGateway, call: Call) -> None:
    gateway.script = lambda received: (200, embed({**received.body, "dimensions": 8}))
    for arguments in ({"dimensions": 4}, {"extra_body": {"output_dimension": 4}}):
        with pytest.raises(NotEmbeddings, match="width"):
            call(model=ALIAS, input="a", **arguments)


def test_the_smallest_and_the_largest_floats_are_good(gateway: ScriptedGateway, call: Call) -> None:
    gateway.on_reply = changed("embedding", floats(1e-45, 0, 3.4e38, -3.4e38))
    assert call(model=ALIAS, input="a").data[0].embedding[0] > 0
    gateway.on_reply = changed("embedding", floats(1e-45, 0, 0, 0))
    assert call(model=ALIAS, input="a").data[0].embedding[0] > 0


@pytest.mark.parametrize("head", [b"Content-Length: 99999999999", b"Content-Encoding: gzip\r\nContent-Length: 2"])
def test_a_reply_that_may_be_of_any_size_is_not_read(gateway: ScriptedGateway, call: Call, head: bytes) -> None:
    gateway.script = lambda received: Raw(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n{}")
    with pytest.raises(CallNotAnswered):
        call(model=ALIAS, input="a")


# -- connections, environment ------------------------------------------------------------------------------------------


def test_connections_are_kept_and_a_closed_one_is_replaced(gateway: ScriptedGateway) -> None:
    with Client(base_url=gateway.base_url, api_key=KEY) as client:
        for _ in range(5):
            client.embeddings.create(model=ALIAS, input="a")
        assert gateway.connections == 1
        gateway.script = first(1, Raw(b""))
        client.embeddings.create(model=ALIAS, input="a")
        assert gateway.connections == 2


async def test_the_async_client_keeps_connections_too(gateway: ScriptedGateway) -> None:
    from embedmesh.client import AsyncClient

    async with AsyncClient(base_url=gateway.base_url, api_key=KEY) as client:
        for _ in range(5):
            await client.embeddings.create(model=ALIAS, input="a")
    assert gateway.connections == 1


def test_threads_may_share_a_client(gateway: ScriptedGateway) -> None:
    wrong: list[str] = []
    with Client(base_url=gateway.base_url, api_key=KEY) as client:

        def work(name: str) -> None:
            for at in range(20):
                reply = client.embeddings.create(model=ALIAS, input=f"{name} {at}", encoding_format="base64")
                if base64.b64decode(reply.data[0].embedding) != vector_of(f"{name} {at}"):  # type: ignore[arg-type]
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(gateway.received) == 160
    assert gateway.connections <= 9


def test_the_environment_says_where_and_with_which_key(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDMESH_BASE_URL", gateway.base_url + "/")
    monkeypatch.setenv("EMBEDMESH_API_KEY", "em_environment")
    with Client() as client:
        client.embeddings.create(model=ALIAS, input="a")
    assert gateway.received[0].headers["authorization"] == "Bearer em_environment"
    assert gateway.received[0].path == "/v1/embeddings"


@pytest.mark.parametrize(
    ("url", "key", "says"),
    [
        (None, "k", "No gateway"),
        ("http://h/v1", None, "No API key"),
        ("ftp://h/v1", "k", "must look like"),
        ("http://u:p@h/v1", "k", "must look like"),
        ("http://h:99999/v1", "k", "must look like"),
        ("http://h/v1?x=1", "k", "must look like"),
        ("http://h/v1", "a b", "characters"),
        ("http://h/v1", "a\r\nX: y", "characters"),
    ],
)
def test_a_wrong_address_or_key_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, url: str | None, key: str | None, says: str
) -> None:
    """OPENAI_API_KEY is another server's."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-ours")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(WrongCall, match=says):
        Client(base_url=url, api_key=key)


def test_junk_in_a_refusal_is_not_repeated(gateway: ScriptedGateway, call: Call) -> None:
    gateway.script = lambda received: (418, {"error": {"message": "a\x1b[2Jb" + "x" * 1000}})
    with pytest.raises(CallRefused) as caught:
        call(model=ALIAS, input="a")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.code == "http_418"


def test_no_error_has_the_text_in_it(gateway: ScriptedGateway, call: Call) -> None:
    def echo(received: Received) -> Any:
        return 200, {"data": received.body["input"]}

    gateway.script = echo
    with pytest.raises(NotEmbeddings) as caught:
        call(model=ALIAS, input="sentinel-text")
    assert "sentinel-text" not in repr(caught.value) + str(caught.value.__cause__) + json.dumps(caught.value.args)
