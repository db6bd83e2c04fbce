"""Bytes that nobody planned for: at the pure validation, and raw at the server's port."""

import asyncio
import json
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.dialects.openai.fields import FIELDS
from embedmesh.dialects.openai.parse import parse
from embedmesh.flow.count import count_now
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.embeddings import Call
from embedmesh.rules.errors import CallerFailure
from embedmesh.rules.limits import REQUEST_INPUTS_MAX, USER_CHARS_MAX
from embedmesh.rules.models import Model
from tests.data import quick_or
from tests.flow.world import CATALOGUE, LetterTokenizer, Shift3, make_world
from tests.http.raw import Raw, read_reply, request, send, serving

# -- validation: a Call, or a failure that blames the caller ---------------------------------------------------------

MESSAGE_CHARS_MAX = 400  # one or two sentences, with at most a short name of the caller's in them

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["tiny", "acme/tiny", "tiny:exact", "float", "base64", "query", "END", "", "\ud800", "\x00"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=20,
)
names = st.one_of(st.sampled_from([*FIELDS]), st.text(max_size=100))
nearly = {
    "model": st.sampled_from(["tiny", "acme/native", "acme/tiny:exact"]),
    "input": st.one_of(
        st.text(max_size=10),
        st.lists(st.text(max_size=10), max_size=5),
        st.lists(st.integers(0, 40), max_size=10),
        st.lists(st.lists(st.integers(0, 40), max_size=10), max_size=5),
    ),
    "encoding_format": st.sampled_from(["float", "base64", None]),
    "dimensions": st.integers(-1, 6),
    "user": st.text(max_size=USER_CHARS_MAX + 1),
    "input_type": st.sampled_from(["query", "passage", "Query"]),
    "truncate": st.sampled_from(["none", "END", "Start"]),
    "truncation": st.booleans(),
}
good = st.fixed_dictionaries(
    {"model": nearly["model"], "input": nearly["input"]},
    optional={name: rule for name, rule in nearly.items() if name not in ("model", "input")},
)
almost_good = st.builds(lambda whole, name, value: whole | {name: value}, good, names, values)
any_object = st.dictionaries(names, values, max_size=8)


def dumped(value: object) -> bytes:
    """As Python's own JSON writes it: with NaN, lone surrogates and integers of any size, which RFC 8259 may refuse."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A right body with a piece of it cut out, repeated or replaced by anything."""
    body = dumped(draw(good))
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + 12)))
    return body[:start] + draw(st.one_of(st.binary(max_size=8), st.just(body[start:end] * 2))) + body[end:]


def check(body: bytes) -> None:
    """Validate and count: what comes out keeps its promises, and the only exception is a CallerFailure."""
    try:
        call, model = parse(body, CATALOGUE)
        counted = count_now(call, model, LetterTokenizer(), Shift3())
    except CallerFailure as failure:
        assert type(failure) is not CallerFailure
        assert 10 < len(failure.message) <= MESSAGE_CHARS_MAX
        return
    assert_promises(call, model)
    room = model.max_tokens - LetterTokenizer.specials
    assert counted.ids is not None
    assert all(len(ids) <= room for ids in counted.ids)
    assert counted.tokens == sum(map(len, counted.ids)) + 2 * len(counted.ids)
    assert len(counted.ids) == len(call.texts or call.ids or ())


def assert_promises(call: Call, model: Model) -> None:
    assert bool(call.texts) != bool(call.ids)
    assert 1 <= len(call.texts or call.ids or ()) <= REQUEST_INPUTS_MAX
    assert all(type(text) is str and text for text in call.texts)
    assert all(ids and all(type(token) is int and token >= 0 for token in ids) for ids in call.ids)
    assert not call.single or len(call.texts or call.ids or ()) == 1
    assert call.dimensions is None or 1 <= call.dimensions <= model.width
    assert call.user is None or len(call.user) <= USER_CHARS_MAX
    assert call.encoding in ("float", "base64")
    assert call.role in ("query", "document", None)
    assert call.truncate in ("none", "start", "end")


@settings(max_examples=quick_or(150, quick=50), deadline=None, derandomize=True)
@given(st.one_of(values.map(dumped), any_object.map(dumped)))
def test_any_json_is_a_call_or_a_refusal(body: bytes) -> None:
    check(body)


@settings(max_examples=quick_or(250, quick=80), deadline=None, derandomize=True)
@given(st.one_of(almost_good.map(dumped), damaged()))
def test_a_right_request_with_something_wrong_in_it(body: bytes) -> None:
    check(body)


@settings(max_examples=quick_or(200, quick=50), deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_call_or_a_refusal(body: bytes) -> None:
    check(body)


def test_what_is_very_large_or_deep_is_refused() -> None:
    for body in (
        b"[" * 3_000_000,
        b'{"input":' * 300_000,
        b'{"model":"tiny","input":' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"model":"tiny","input":' + b"9" * 1_000_000 + b"}",
        b'{"model":"tiny","input":[' + b"1e999999," * 1000 + b"1]}",
        b'{"' + b"x" * 4_000_000 + b'":1}',
    ):
        check(body)


# -- the server: an enveloped 4xx or a closed connection, soon, and it lives on ---------------------------------------

SEED = 20_261_123
TRIES = 400
AT_ONCE = 40
SOON_S = 2.0
QUIET_S = 0.1  # a server that waits for more of a head is told after this that there is no more
GOOD = request(body=b'{"model":"tiny","input":["abc","d"]}', x_request_id="mine")
PIECES = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\x00",
        b": ",
        b" ",
        b"\t",
        b"\xff",
        b"%00",
        b"..",
        b"\r\n\r\n",
        b"HTTP/1.1",
        b"HTTP/9.9",
    ),
    *(b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"0\r\n\r\n", b"FFFFFFFFF\r\n"),
    *(b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"Connection: close\r\n", b"Content-Encoding: gzip\r\n"),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00", b"CONNECT a:1 HTTP/1.1\r\n", b"a" * 9000),
)


def hostile(dice: Random) -> bytes:
    """Noise, or a right request that was cut, repeated and sprinkled with what parsers trip over."""
    if dice.random() < 0.2:
        return dice.randbytes(dice.randint(1, 300)) + dice.choice((b"", b"\r\n\r\n"))
    raw = bytearray(GOOD)
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(len(raw) + 1)
        end = start + dice.choice((0, 0, 1, 1, 5, 40))
        raw[start:end] = dice.choice((*PIECES, dice.randbytes(3), bytes(raw[start:end]) * 2))
    return bytes(raw) * dice.choice((1, 1, 1, 2))


async def replies(port: int, raw: bytes) -> list[Raw]:
    """Everything the server says until it closes. TimeoutError if it does not close soon."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = asyncio.StreamReader()
    writer.write(raw)
    quiet_s: float | None = QUIET_S
    try:
        async with asyncio.timeout(SOON_S):
            while not reader.at_eof():
                try:
                    async with asyncio.timeout(quiet_s):
                        said.feed_data(await reader.read(65_536))
                except TimeoutError:
                    writer.write_eof()  # there is no more to come: tell the server so, and wait for its end
                    quiet_s = None
    except ConnectionError:
        pass  # closed, with a reset because we said more than it wanted to read
    finally:
        writer.close()
    said.feed_eof()
    found = []
    while not said.at_eof():
        found.append(await read_reply(said))
    return found


def assert_polite(raw: bytes, said: Sequence[Raw]) -> None:
    """Right answers, and refusals in the envelope; never a fault of ours, never our caller's bytes in our words."""
    for reply in said:
        if reply.status in (100, 200):
            continue
        assert 400 <= reply.status < 500, (raw, reply)
        assert set(reply.error) == {"message", "type", "param", "code"}, raw
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"]


@pytest.mark.story
async def test_raw_bytes_at_the_port() -> None:
    dice = Random(SEED)
    world = make_world()
    app = GatewayApp(world, world.fleet.registry, in_flight_max=100, bodies=BodyBudget(10**8), gauges=dict)
    async with serving(app.server) as port:
        statuses: set[int] = set()
        for _ in range(TRIES // AT_ONCE):
            sent = [hostile(dice) for _ in range(AT_ONCE)]
            for raw, said in zip(sent, await asyncio.gather(*(replies(port, raw) for raw in sent)), strict=True):
                assert_polite(raw, said)
                statuses |= {reply.status for reply in said}
        assert (await send(port, GOOD)).status == 200
    assert {200, 400, 401} <= statuses  # else the noise never got past the parser
    assert app.metrics.internal_errors._value.get() == 0
