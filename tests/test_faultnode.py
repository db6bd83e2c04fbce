"""The fault node: every mode is written down, its vectors are known, and a gateway sees each fault as what it is."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import orjson
import pytest

from bench.faultnode.acts import AFTER, PHASE_S, State
from bench.faultnode.modes import MODES, listed
from bench.faultnode.node import FaultDoor, FaultReceipts, Faults, Scripted
from bench.faultnode.openai import OpenAiForm
from bench.faultnode.scripted import ROWS, WIDTH, Pace, vector, vectors
from embedmesh.flow.verify import verify
from embedmesh.gateway.nodes.own import OwnLink, Signing
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.process import bind
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeFailure, NodeRefused, TooLarge, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import Model
from embedmesh.signing.certificates import der, make_certificate, pinned_context, server_context
from embedmesh.signing.identity import Identity, node_id
from embedmesh.signing.session import Session
from embedmesh.upstream.pools import tcp_pool

DOCS = Path(__file__).parent.parent / "docs" / "fault-figures.md"
MODEL = Model(id="tests/scripted", folder="/nowhere", width=WIDTH, max_tokens=256, price=1, digest="1" * 64)
SESSION = Session("00000000000000aa", bytes(32))
IDS = [[7, 8, 9], [1], [2, 3]]
SPECIALS = 2
PATIENCE_S = 0.15  # of a test with a node that says nothing


class Tokenizer:
    """As much of one as a scripted node asks for."""

    specials = SPECIALS

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]


def scripted(mode: str, share: float = 1.0) -> Scripted:
    """A node's inside, without a tokenizer's file."""
    faults = Faults(State(Random(1)))
    faults.order(mode, share)
    made = Scripted([], Pace(0.0, 0.0), faults)
    made.models[MODEL.id] = MODEL
    made.tokenizers[MODEL.id] = Tokenizer()  # type: ignore[assignment]
    return made


class Pair:
    """A node's door with TLS on a real port, and a gateway's link to it, in one process."""

    def __init__(self, link: OwnLink, inside: Scripted, claimed: list[int]) -> None:
        self.link = link
        self.inside = inside
        self.claimed = claimed  # tokens, by the node's receipts

    async def embed(self, ids: list[list[int]] = IDS) -> EmbedVectors:
        """A checked answer, as a gateway gets it."""
        counted = Counted(lengths=[len(each) + SPECIALS for each in ids], ids=ids)
        part = Part("n", tuple(range(len(ids))), counted.tokens, 0.1)
        reply = await self.link.embed(part, MODEL, counted, "req_1")
        verify(reply, MODEL, part, True)
        return reply


@asynccontextmanager
async def pair(folder: Path, mode: str, share: float = 1.0) -> AsyncIterator[Pair]:
    key, certificate = folder / "k", folder / "c"
    make_certificate(key, certificate)
    identity, clock = Identity.load(folder / "i"), SystemClock()
    name = node_id(identity.public_key)
    receipts = FaultReceipts(folder / "r")
    inside = scripted(mode, share)
    door = FaultDoor(
        inside,
        BodyBudget(1 << 24),
        receipts,
        identity=identity,
        gateway="f" * 64,
        address="",
        clock=clock,
    )
    door.new_session(SESSION)
    server = HttpServer(door.routes())
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    await server.start(sock, server_context(certificate, key))
    pinned: ssl.SSLContext = pinned_context(der(certificate))
    signing = Signing(name, "0" * 16, clock, lambda *_: None)
    signing.add(SESSION)
    pool = tcp_pool("127.0.0.1", port, pinned, certificate=der(certificate))
    claimed: list[int] = []
    link = OwnLink(pool, clock, signing)
    try:
        yield Pair(link, inside, claimed)
        claimed += [receipt.tokens for receipt in receipts.page(1).receipts]
    finally:
        link.close()
        await server.drain(0.0)
        receipts.close()


def test_every_mode_is_documented() -> None:
    """In the docs' table and in `--help`, in the same words, and nothing else is."""
    rows = [line.split("|") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    told = {row[1].strip(" `"): row[2].strip() for row in rows}
    assert {name: mode.says for name, mode in MODES.items()} == {name: told.get(name) for name in MODES}
    assert all(f"  {name} " in listed() and mode.says in listed() for name, mode in MODES.items())


def test_the_vectors_are_the_same_in_every_process() -> None:
    """Known by value, of unit length, and others for other ids, also where only the order differs."""
    assert vector([1, 2, 3])[:2].tobytes().hex() == "7a9f3b3d883b823d"
    many = vectors([[dice, 5] for dice in range(500)])
    assert many.dtype == np.dtype("<f4") and many.shape == (500, WIDTH)
    assert np.abs(np.linalg.norm(many, axis=1) - 1).max() < 1e-6
    assert len(np.unique(many, axis=0)) > 500 * (1 - 500 / ROWS)
    assert not np.array_equal(vector([1, 2]), vector([2, 1]))
    assert np.array_equal(many[3], vector([3, 5]))


CRUDE: dict[str, type[NodeFailure]] = {
    "garbage": WrongAnswer,
    "html": WrongAnswer,
    "wrong-dimension": WrongAnswer,
    "wrong-count": WrongAnswer,
    "nan": WrongAnswer,
    "inf": WrongAnswer,
    "zero": WrongAnswer,
    "oversize": TooLarge,
    "wrong-tokens": WrongAnswer,
    "wrong-signature": WrongAnswer,
    "no-signature": WrongAnswer,
    "other-session": WrongAnswer,
    "busy-429": NodeBusy,
    "busy-503": NodeBusy,
    "error-500": NodeBroke,
    "refuse-400": NodeRefused,
    "reset": NodeBroke,
    "close-mid-body": NodeBroke,
    "close-at-once": NodeBroke,
}


@pytest.mark.parametrize("mode", CRUDE)
async def test_what_the_gateway_makes_of_it(tmp_path: Path, mode: str) -> None:
    """A fault that shows is refused as what it is, the first time."""
    async with pair(tmp_path, mode) as node:
        with pytest.raises(NodeFailure) as failed:
            await node.embed()
    assert type(failed.value) is CRUDE[mode]


@pytest.mark.parametrize("mode", ["hang", "drip"])
async def test_a_node_that_says_nothing_is_left(tmp_path: Path, mode: str) -> None:
    async with pair(tmp_path, mode) as node:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await node.embed()


async def test_honest_answers_are_right_and_a_replay_is_refused(tmp_path: Path) -> None:
    async with pair(tmp_path, "honest") as node:
        assert (await node.embed()).data == vectors(IDS).tobytes()
        node.inside.faults.order("replayed-signature")
        await node.embed()  # there is nothing to repeat yet
        with pytest.raises(WrongAnswer, match="not signed as agreed"):
            await node.embed()


LIES = ["wrong-order", "duplicate", "other-model", "noise", "constant"]


@pytest.mark.parametrize("mode", LIES)
async def test_a_lie_passes_every_check(tmp_path: Path, mode: str) -> None:
    """Rows of the right form, finite, of unit length, signed: only another node can tell."""
    async with pair(tmp_path, mode) as node:
        found = np.frombuffer((await node.embed()).data, "<f4").reshape(len(IDS), WIDTH)
    assert not np.array_equal(found, vectors(IDS))
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6


async def test_it_lies_on_large_requests_only(tmp_path: Path) -> None:
    async with pair(tmp_path, "lie-on-large") as node:
        for inputs, right in ((8, True), (9, False)):
            ids = [[at, 2] for at in range(inputs)]
            assert ((await node.embed(ids)).data == vectors(ids).tobytes()) is right


async def test_a_share_of_the_requests(tmp_path: Path) -> None:
    """By dice, the same for the same seed."""
    async with pair(tmp_path, "other-model", 0.3) as node:
        right = [(await node.embed([[at]])).data == vectors([[at]]).tobytes() for at in range(60)]
    assert right.count(False) == node.inside.faults.wrong
    assert 8 <= right.count(False) <= 30


async def test_receipts_may_claim_more(tmp_path: Path) -> None:
    tokens = sum(len(each) + SPECIALS for each in IDS)
    async with pair(tmp_path, "bad-receipts") as node:
        assert (await node.embed()).tokens == tokens
        node.inside.faults.order("honest")
        await node.embed()
    assert node.claimed == [tokens + 1_000, tokens]


def test_modes_that_change_with_time_or_number() -> None:
    """slow-start ends; crash and wedge wait for their request. What they then do would end this test, too."""
    state = State(Random(1))
    assert MODES["slow-start"].slowness(state) == state.slow_factor == MODES["slow"].slowness(state)
    state.since -= PHASE_S
    assert MODES["slow-start"].slowness(state) == 1.0
    faults = Faults(State(Random(1)))
    faults.order("crash")
    for _ in range(AFTER - 1):
        faults.draw(IDS)
    assert faults.state.seen < faults.state.after == AFTER


async def test_short_calls_pass_long_ones_unless_first_comes_first() -> None:
    """As in our node: a short call waits for one batch of 1,024 tokens, not for the whole of a long call."""
    for fifo, first in ((False, "short"), (True, "long")):
        pace, ended = Pace(200_000.0, 0.0, fifo=fifo), list[str]()

        async def call(name: str, tokens: int, pace: Pace = pace, ended: list[str] = ended) -> None:
            await pace.work(tokens)
            ended.append(name)

        await asyncio.gather(call("long", 8_000), call("short", 100))
        assert ended[0] == first
        assert pace.waiting_tokens == 0


async def test_who_gives_up_does_not_keep_the_others_waiting() -> None:
    pace = Pace(100_000.0, 0.0)
    given_up = [asyncio.create_task(pace.work(50_000)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in given_up:
        task.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await pace.work(10)
    assert pace.waiting_tokens == 0


async def ask_openai(mode: str, **asked: Any) -> dict[str, Any]:
    """The JSON of an answer over plain HTTP."""
    server = HttpServer(OpenAiForm(scripted(mode)).routes())
    sock: socket.socket = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    await server.start(sock)
    body = orjson.dumps({"model": MODEL.id, **asked})
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: n\r\nContent-Type: application/json\r\n"
    pool = tcp_pool("127.0.0.1", port)
    try:
        reply = await pool.exchange(lambda: head + b"Content-Length: %d\r\n\r\n" % len(body) + body, 1 << 20)
    finally:
        pool.close()
        await server.drain(0.0)
    assert reply.status == 200
    answer: dict[str, Any] = orjson.loads(reply.body)
    return answer


async def test_the_public_form_for_other_gateways() -> None:
    """Texts and token ids in, floats or base64 out, the same vectors; a duplicate has its index twice."""
    said = await ask_openai("honest", input=["ab", "c"])
    assert [item["index"] for item in said["data"]] == [0, 1]
    assert np.array_equal(np.array(said["data"][0]["embedding"], "<f4"), vector([97, 98]))
    assert said["usage"]["prompt_tokens"] == 3 + 2 * SPECIALS
    same = await ask_openai("honest", input=[97, 98])
    assert same["data"][0]["embedding"] == said["data"][0]["embedding"]
    twice = await ask_openai("duplicate", input=["ab", "c"])
    assert [item["index"] for item in twice["data"]] == [0, 0]
