"""Many texts, in every way that the clients have: right vectors, each once, whatever happens on the way."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.client import (
    AsyncClient,
    BulkProgress,
    CallNotAnswered,
    CallRefused,
    Client,
    InputRefused,
    NotEmbeddings,
    WrongCall,
)
from embedmesh.client.bulk.window import AUTO_CONCURRENCY_MAX
from embedmesh.client.refusals import Problem
from tests.client.gateway import (
    ALIAS,
    KEY,
    Answer,
    Members,
    Raw,
    Received,
    ScriptedGateway,
    embed,
    envelope,
    free_port,
    vector_of,
)

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Many = Callable[..., Vectors]
TEXTS = [f'text {number} ünïcödé 文字 \u2028 \\ " {"x" * (number % 13)}' for number in range(250)]
OF_CLIENT = {"base_url", "pins", "confidential", "timeout"}


def expected(texts: Sequence[str], width: int = 4) -> Vectors:
    return np.stack([np.frombuffer(vector_of(text, width), "<f4") for text in texts])


def joined(chunks: Iterable[tuple[int, Vectors]]) -> Vectors:
    """Chunks must follow one another."""
    found: list[Vectors] = []
    at = 0
    for start, vectors in chunks:
        assert start == at
        at += len(vectors)
        found.append(vectors.copy())
    return np.concatenate(found) if found else np.empty((0, 0), np.float32)


@pytest.fixture(params=["embed", "stream", "embed in a loop", "async embed", "async stream"])
def many(request: pytest.FixtureRequest, gateway: ScriptedGateway) -> Many:
    """The vectors of texts by a new client; arguments are those of the client and of the call."""

    def run(texts: Any, **given: Any) -> Vectors:
        of_client: dict[str, Any] = {"base_url": gateway.base_url, "api_key": KEY}
        of_client |= {name: given.pop(name) for name in OF_CLIENT & given.keys()}
        given.setdefault("model", ALIAS)

        async def in_a_loop() -> Vectors:
            if request.param == "embed in a loop":
                with Client(**of_client) as waiting:
                    return waiting.embed(texts, **given)
            async with AsyncClient(**of_client) as client:
                if request.param == "async embed":
                    return await client.embed(texts, **given)
                chunks = [chunk async for chunk in client.embed_stream(texts, **given)]
                assert asyncio.all_tasks() == {asyncio.current_task()}
                return joined(chunks)

        if request.param in ("embed", "stream"):
            with Client(**of_client) as client:
                if request.param == "embed":
                    return client.embed(texts, **given)
                return joined(client.embed_stream(texts, **given))
        return asyncio.run(in_a_loop())

    return run


def test_every_text_gets_its_vector_in_order(gateway: ScriptedGateway, many: Many) -> None:
    found = many(TEXTS, batch_size=7, dimensions=8, input_type="query", extra_body={"x": 1})
    assert found.dtype == np.float32 and np.array_equal(found, expected(TEXTS, 8))
    assert found.flags.writeable
    assert all(len(one.body["input"]) <= 7 for one in gateway.received)
    sent = {name: value for name, value in gateway.received[0].body.items() if name != "input"}
    assert sent == {"model": ALIAS, "dimensions": 8, "input_type": "query", "x": 1, "encoding_format": "base64"}


def test_a_generator_is_as_good_as_a_list(many: Many) -> None:
    assert np.array_equal(many((text for text in TEXTS), batch_size=16), expected(TEXTS))


def test_without_texts_nothing_is_asked(gateway: ScriptedGateway, many: Many) -> None:
    assert many([]).shape[0] == 0
    assert many(iter([]), dimensions=8).shape in [(0, 8), (0, 0)]
    assert gateway.received == []


def test_token_ids_are_texts_too(gateway: ScriptedGateway, many: Many) -> None:
    ids = [[number, number + 1] for number in range(20)]
    assert np.array_equal(many(ids, batch_size=3), expected([str(one) for one in ids]))


def test_long_texts_make_small_requests(gateway: ScriptedGateway, many: Many) -> None:
    """By default requests are cut by tokens, about 16,000, and a giant text goes alone."""
    texts = ["giant " * 30_000, *("some words " * 1_000 for _ in range(20)), "giant " * 30_000, *TEXTS]
    assert np.array_equal(many(texts), expected(texts))
    counts = [len(one.body["input"]) for one in gateway.received]
    sizes = [sum(map(len, one.body["input"])) for one in gateway.received]
    assert counts.count(1) >= 2 and max(counts) >= len(TEXTS)
    assert all(size <= 120_000 for count, size in zip(counts, sizes, strict=True) if count > 1)


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ("one text", {}, "put the one text into a list"),
        (["a", 3], {}, "list of token ids"),
        (["a", "\ud800"], {}, "surrogate"),
        (["a"], {"concurrency": 0}, "concurrency must be"),
        (["a"], {"batch_size": 0}, "batch_size must be"),
        (["a"], {"encoding_format": "float"}, "no option encoding_format"),
        (["a"], {"extra_body": {"x": 1j}}, "not JSON"),
        (["a"], {"confidential": True}, "needs pins"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(
    gateway: ScriptedGateway, many: Many, texts: Any, options: Members, says: str
) -> None:
    with pytest.raises(WrongCall, match=says):
        many(texts, **options)
    assert gateway.received == []


# -- trying again ------------------------------------------------------------------------------------------------------


class Sometimes:
    """Answers so for every third request that has not been tried before."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._count = 0
        self.given = 0

    def __call__(self, received: Received) -> Answer | None:
        if received.headers["x-stainless-retry-count"] != "0":
            return None
        with self._lock:
            self._count += 1
            if self._count % 3:
                return None
            self.given += 1
            return self._answers[self.given % len(self._answers)]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
BUSY = [
    (429, envelope("rate_limit_exceeded"), {"retry-after-ms": "10"}),
    (503, envelope("overloaded"), {"Retry-After": "0"}),
    (500, envelope("internal_error"), {"Retry-After": "0"}),
    (502, {"not": "an envelope"}, {"Retry-After": "0"}),
]
BROKEN = [Raw(b""), Raw(HEAD), Raw(HEAD + b'{"data":['), Raw(b"\x00\x01"), Raw(b"HTTP/1.1 2"), Raw(b"x" * 40_000)]


@pytest.mark.parametrize("answers", [BUSY, BROKEN], ids=["busy", "broken"])
def test_what_may_go_later_is_tried_later(
    gateway: ScriptedGateway, many: Many, answers: Sequence[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes again, which say how often they were sent before: a gateway finds the first by that."""
    monkeypatch.setattr("embedmesh.client.bulk.refusals.WAIT_FIRST_S", 0.01)
    gateway.script = sometimes = Sometimes(*answers)
    assert np.array_equal(many(TEXTS, batch_size=5), expected(TEXTS))
    assert sometimes.given >= 10
    tries: dict[bytes, list[str]] = {}
    for one in gateway.received:
        tries.setdefault(one.raw, []).append(one.headers["x-stainless-retry-count"])
        assert "idempotency-key" not in one.headers
    assert all(counts == ["0", "1"][: len(counts)] for counts in tries.values())
    assert len(gateway.received) == 50 + sometimes.given


def test_keys_for_those_who_ask(gateway: ScriptedGateway, many: Many) -> None:
    """With `idempotent` each request has a key, and it is the same when it is sent again."""
    gateway.script = Sometimes(*BUSY)
    many(TEXTS, batch_size=25, idempotent=True)
    keys: dict[bytes, set[str]] = {}
    for one in gateway.received:
        keys.setdefault(one.raw, set()).add(one.headers["idempotency-key"])
    assert len(keys) == 10 and all(len(each) == 1 for each in keys.values())
    assert len(set.union(*keys.values())) == 10


def test_nothing_is_sent_before_the_time_that_the_server_asked_for(gateway: ScriptedGateway, many: Many) -> None:
    arrived: list[float] = []

    def refuse_second(received: Received) -> Answer | None:
        arrived.append(time.monotonic())
        return (429, envelope("rate_limit_exceeded"), {"retry-after-ms": "400"}) if len(arrived) == 2 else None

    gateway.script = refuse_second
    assert np.array_equal(many(TEXTS[:40], batch_size=10, concurrency=1), expected(TEXTS[:40]))
    assert arrived[2] - arrived[1] >= 0.39


def test_a_crowd_that_is_refused_becomes_smaller(gateway: ScriptedGateway, many: Many) -> None:
    """A server that takes two at one time refuses the rest: few are refused, since fewer are sent."""
    now, lock = 0, threading.Lock()

    def two_at_one_time(received: Received) -> Answer | None:
        nonlocal now
        with lock:
            now += 1
            full = now > 2
        try:
            if full:
                return 429, envelope("rate_limit_exceeded"), {"retry-after-ms": "5"}
            time.sleep(0.01)
            return None
        finally:
            with lock:
                now -= 1

    gateway.script = two_at_one_time
    assert np.array_equal(many(TEXTS, batch_size=2, concurrency=16), expected(TEXTS))
    assert len(gateway.received) < 2 * 125


@pytest.mark.parametrize("says_so", [True, False])
def test_a_server_that_closes_its_connections(gateway: ScriptedGateway, many: Many, says_so: bool) -> None:
    """After each reply: another connection is made, and nothing counts as a failure."""

    def close(received: Received) -> Answer:
        body = json.dumps(embed(received.body)).encode()
        more = b"Connection: close\r\n" if says_so else b""
        return Raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n" % (len(body), more) + body)

    gateway.script = close
    assert np.array_equal(many(TEXTS, batch_size=10), expected(TEXTS))
    assert len(gateway.received) == 25  # each has come once


def test_connections_are_kept(gateway: ScriptedGateway, many: Many) -> None:
    many(TEXTS, batch_size=2, concurrency=3)
    assert gateway.connections <= 3 < len(gateway.received)


@pytest.mark.parametrize(
    "answer",
    [
        (401, envelope("invalid_api_key")),
        (429, envelope("insufficient_quota"), {"x-should-retry": "false"}),
        (404, envelope("model_not_found", param="model")),
        (302, {}, {"Location": "http://127.0.0.1:1/v1/embeddings"}),
    ],
    ids=lambda answer: str(answer[0]),
)
def test_a_refusal_of_everything_ends_it(gateway: ScriptedGateway, many: Many, answer: Answer) -> None:
    gateway.script = lambda received: answer
    with pytest.raises(CallRefused) as caught:
        many(TEXTS, batch_size=10)
    assert not isinstance(caught.value, InputRefused)
    assert len(gateway.received) <= 8


def test_where_nothing_listens_it_does_not_wait(many: Many) -> None:
    with pytest.raises(CallNotAnswered, match="Nothing listens"):
        many(TEXTS, base_url=f"http://127.0.0.1:{free_port()}/v1")


# -- what is too much, and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["too_many_inputs", "max_tokens_per_request"])
def test_what_is_too_much_is_sent_in_smaller_pieces(gateway: ScriptedGateway, many: Many, code: str) -> None:
    """And not tried again in large ones."""

    def at_most_three(received: Received) -> Answer | None:
        return (400, envelope(code, param="input")) if len(received.body["input"]) > 3 else None

    gateway.script = at_most_three
    assert np.array_equal(many(TEXTS[:120], batch_size=12, concurrency=2), expected(TEXTS[:120]))
    refused = sum(len(one.body["input"]) > 3 for one in gateway.received)
    assert refused < 10


def refuse_x(received: Received) -> Answer | None:
    bad = [at for at, text in enumerate(received.body["input"]) if "xxxxxxxxxxxx" in text]
    return (400, envelope("context_length_exceeded", "too long", f"input.{bad[0]}")) if bad else None


def test_a_text_that_is_refused_is_named(gateway: ScriptedGateway, many: Many) -> None:
    gateway.script = refuse_x
    with pytest.raises(InputRefused, match=r"Text 12: The gateway refused: too long") as caught:
        many(TEXTS, batch_size=10)
    assert caught.value.index == 12 and caught.value.code == "context_length_exceeded"


def test_refused_texts_need_not_cost_the_others_their_vectors(gateway: ScriptedGateway, many: Many) -> None:
    gateway.script = refuse_x
    told: dict[int, Problem] = {}
    found = many(TEXTS, batch_size=10, on_refused=told.__setitem__)
    bad = [at for at, text in enumerate(TEXTS) if "xxxxxxxxxxxx" in text]
    assert list(told) == bad and {problem.code for problem in told.values()} == {"context_length_exceeded"}
    assert np.isnan(found[bad]).all()
    good = [at for at in range(len(TEXTS)) if at not in bad]
    assert np.array_equal(found[good], expected([TEXTS[at] for at in good]))


def test_a_request_that_is_wholly_refused(gateway: ScriptedGateway, many: Many) -> None:
    """Its rows are as wide as the others."""
    texts = ["x" * 12] * 6 + TEXTS[:12] + ["x" * 12] * 6
    gateway.script = refuse_x
    try:
        found = many(texts, batch_size=6, on_refused=lambda index, problem: None)
    except ValueError:
        pytest.skip("chunks of a stream have no width before there is a vector")
    assert found.shape == (24, 4)
    assert np.isnan(found[:6]).all() and np.isnan(found[-6:]).all()
    assert np.array_equal(found[6:-6], expected(texts[6:-6]))


# -- other servers -----------------------------------------------------------------------------------------------------


def as_floats(reply: Members) -> Members:
    for item in reply["data"]:
        item["embedding"] = np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist()
    return reply


def without(name: str) -> Callable[[Members], Members]:
    def change(reply: Members) -> Members:
        for item in reply["data"]:
            item.pop(name, None)
        reply.pop(name, None)
        return reply

    return change


def backwards(reply: Members) -> Members:
    return reply | {"data": reply["data"][::-1]}


@pytest.mark.parametrize(
    "change",
    [as_floats, without("index"), without("object"), without("usage"), without("model"), backwards],
    ids=["floats", "no index", "no object", "no usage", "no model", "backwards"],
)
def test_replies_of_other_servers(gateway: ScriptedGateway, many: Many, change: Callable[[Members], Members]) -> None:
    gateway.on_reply = change
    assert np.array_equal(many(TEXTS, batch_size=10), expected(TEXTS))


def chunked(body: bytes) -> bytes:
    pieces = [body[at : at + 1_000] for at in range(0, len(body), 1_000)]
    coded = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\nTrailer: x\r\n\r\n"


FRAMINGS: dict[str, Callable[[bytes], bytes]] = {
    "chunked": chunked,
    "by closing": lambda body: b"HTTP/1.1 200 OK\r\n\r\n" + body,
    "HTTP/1.0": lambda body: b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
    "interim": lambda body: b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + chunked(body),
    "interim and length": lambda body: (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\r\nContent-length:%d\r\n\r\n" % len(body) + body
    ),
}


@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS)
def test_replies_of_any_framing(gateway: ScriptedGateway, many: Many, framing: Callable[[bytes], bytes]) -> None:
    gateway.script = lambda received: Raw(framing(json.dumps(embed(received.body)).encode()))
    assert np.array_equal(many(TEXTS, batch_size=25), expected(TEXTS))


def changed(**more: Any) -> Callable[[Members], Members]:
    def change(reply: Members) -> Members:
        reply["data"][-1] |= more
        return reply

    return change


NAN = base64.b64encode(np.array([1, np.nan, 1, 1], "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda reply: reply | {"data": reply["data"][1:]}, "count"),
        (lambda reply: reply | {"data": reply["data"] + reply["data"][:1]}, "count"),
        (lambda reply: reply | {"data": []}, "count"),
        (changed(index=0), "order"),
        (changed(index=99), "order"),
        (changed(index=None), "order"),
        (changed(embedding="AAAA"), "width"),
        (changed(embedding=""), "width"),
        (changed(embedding="not base64!"), "form"),
        (changed(embedding=NAN), "finite"),
        (lambda reply: {"error": "none"}, "form"),
        (lambda reply: changed(embedding=[1.0, 2.0])(as_floats(reply)), "width"),
        (lambda reply: changed(embedding=[1e300, 2.0, 3.0, 4.0])(as_floats(reply)), "finite"),
    ],
    ids=[
        "one less",
        "one more",
        "none",
        "an index twice",
        "no such index",
        "one without",
        "short",
        "empty",
        "no base64",
        "NaN",
        "an error",
        "short floats",
        "too large",
    ],
)
def test_a_reply_that_is_none_is_not_returned(
    gateway: ScriptedGateway, many: Many, change: Callable[[Members], Members], says: str
) -> None:
    gateway.on_reply = change
    with pytest.raises(NotEmbeddings, match=rf"\({says}\)"):
        many(TEXTS, batch_size=10)


def test_vectors_that_become_wider_are_not_returned(gateway: ScriptedGateway, many: Many) -> None:
    gateway.script = lambda received: (
        200,
        embed(received.body | {"dimensions": 4 * (1 + len(gateway.received) // 20)}),
    )
    with pytest.raises(NotEmbeddings, match="changed from 4 to 8 components"):
        many(TEXTS, batch_size=5)


# -- memory, ends and what is told -------------------------------------------------------------------------------------


def test_progress_is_told(many: Many) -> None:
    told: list[BulkProgress] = []
    many(TEXTS, batch_size=10, progress=told.append)
    assert [one.texts for one in told] == list(range(10, 251, 10))
    assert told[-1].tokens == 3 * len(TEXTS) and told[-1].refused == 0
    assert {one.total for one in told} == {250}


def test_a_stream_takes_no_more_than_is_in_flight(gateway: ScriptedGateway) -> None:
    """Texts are taken in the caller's thread, and never many more than are handed over."""
    taken, most = 0, 0
    threads = set()

    def source() -> Iterator[str]:
        nonlocal taken
        for number in range(20_000):
            taken += 1
            threads.add(threading.get_ident())
            yield f"text {number}"

    before = set(threading.enumerate())
    with Client(base_url=gateway.base_url, api_key=KEY) as client:
        chunks = client.embed_stream(source(), model=ALIAS, batch_size=10)
        given = 0
        for _, vectors in chunks:
            most = max(most, taken - given)
            given += len(vectors)
            if given >= 2_000:
                break
        chunks.close()
    assert most <= 10 * (AUTO_CONCURRENCY_MAX * 3 // 2 + 1)
    assert taken < 20_000 and threads == {threading.get_ident()}
    assert {one for one in threading.enumerate() if one.name == "embedmesh-client"} <= before


def test_an_async_stream_that_is_left(gateway: ScriptedGateway) -> None:
    async def source() -> AsyncIterator[str]:
        for number in range(20_000):
            yield f"text {number}"

    async def run() -> None:
        async with AsyncClient(base_url=gateway.base_url, api_key=KEY) as client:
            chunks = client.embed_stream(source(), model=ALIAS, batch_size=10)
            async for start, _ in chunks:
                if start >= 500:
                    break
            await chunks.aclose()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert np.array_equal(await client.embed(TEXTS, model=ALIAS), expected(TEXTS))

    asyncio.run(run())
    assert sum(len(one.body["input"]) for one in gateway.received) < 5_000


def test_a_run_can_be_cancelled_at_any_await(gateway: ScriptedGateway) -> None:
    """After that nothing runs, and the client is as good as before."""
    gateway.script = Sometimes(*BUSY)

    async def run() -> None:
        async with AsyncClient(base_url=gateway.base_url, api_key=KEY) as client:
            for steps in range(1, 120):
                task = asyncio.ensure_future(client.embed(TEXTS[:60], model=ALIAS, batch_size=5))
                for _ in range(steps):
                    await asyncio.sleep(0)
                if steps % 5 == 0:
                    await asyncio.sleep(0.0005 * steps)
                task.cancel()
                await asyncio.wait([task])
                assert asyncio.all_tasks() == {asyncio.current_task()}
            assert np.array_equal(await client.embed(TEXTS, model=ALIAS), expected(TEXTS))

    asyncio.run(run())


@pytest.mark.parametrize("way", ["embed", "stream"])
def test_an_interrupt_ends_it(gateway: ScriptedGateway, way: str) -> None:
    """As by Ctrl-C, here while progress is told: nothing runs on, and the client is as good as before."""

    def interrupt(progress: BulkProgress) -> None:
        if progress.texts >= 50:
            raise KeyboardInterrupt

    with Client(base_url=gateway.base_url, api_key=KEY) as client:
        with pytest.raises(KeyboardInterrupt):
            if way == "embed":
                client.embed(TEXTS * 20, model=ALIAS, batch_size=5, progress=interrupt)
            else:
                joined(client.embed_stream(TEXTS * 20, model=ALIAS, batch_size=5, progress=interrupt))
        assert not [one for one in threading.enumerate() if one.name == "embedmesh-client"]
        assert len(gateway.received) < 500
        assert np.array_equal(client.embed(TEXTS, model=ALIAS), expected(TEXTS))


def test_sealed_for_a_pinned_node(gateway: ScriptedGateway, many: Many, pins: Path) -> None:
    found = many(TEXTS, model="sentence-transformers/all-MiniLM-L6-v2", batch_size=50, confidential=True, pins=pins)
    assert np.array_equal(found, expected(TEXTS))
    assert set(gateway.paths) == {"/nodes/lock", "/confidential/embeddings"}
    assert not any(b"text 1" in one.raw for one in gateway.received)
