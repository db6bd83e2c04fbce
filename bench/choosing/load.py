"""The same requests at the same moments for every contender: open loop, measured from when each was to be sent."""

import asyncio
import base64
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import msgspec

from bench.fault.load import WORDS
from bench.faultnode.scripted import vectors
from bench.sim.workload import KINDS
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.gateway.nodes.pools import tcp_pool
from embedmesh.rules.embeddings import EmbedReply
from embedmesh.rules.errors import NodeFailure

MODEL = "all-MiniLM-L6-v2"
TEXTS_A_LENGTH = 4  # different texts of each number of tokens
REPLY_S = 300.0
REPLY_BYTES_MAX = 64 * 1024 * 1024
BODY_BYTES_MAX = 3_500_000  # our gateway takes 4 MiB


class Arrival(NamedTuple):
    """One request: when it comes, in seconds from the start; its body; and the vectors that are right, in base64."""

    at: float
    kind: str
    tokens: int
    body: bytes
    right: list[str]


class Answered(NamedTuple):
    """How one went. `took_s` counts from when it was to be sent."""

    kind: str
    took_s: float
    status: int  # 0 for no reply
    wrong: int


class Texts:
    """Texts of every length, and their one right vector."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        dice = Random(1)
        lengths = sorted({length for kind in KINDS for length in kind.lengths})
        texts = [
            " ".join(dice.choices(WORDS, k=max(1, length - tokenizer.specials)))
            for length in lengths
            for _ in range(TEXTS_A_LENGTH)
        ]
        ids = tokenizer.ids(texts)
        right = [base64.b64encode(row.tobytes()).decode("ascii") for row in vectors(ids)]
        self._of: dict[int, list[tuple[str, str, int]]] = {}
        for at, text in enumerate(texts):
            entry = (text, right[at], len(ids[at]) + tokenizer.specials)
            self._of.setdefault(lengths[at // TEXTS_A_LENGTH], []).append(entry)

    def draw(self, length: int, dice: Random) -> tuple[str, str, int]:
        """A text of about so many tokens, its vector, and its tokens."""
        return dice.choice(self._of[length])


def arrivals(texts: Texts, tokens_per_s: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals that bring so many tokens a second on average."""
    dice = Random(seed)
    mean = sum(kind.share * kind.moments()[0] for kind in KINDS)
    made: list[Arrival] = []
    at = 0.0
    while (at := at + dice.expovariate(tokens_per_s / mean)) < seconds:
        kind = dice.choices(KINDS, [kind.share for kind in KINDS])[0]
        some = [texts.draw(dice.choice(kind.lengths), dice) for _ in range(kind.texts(dice.random()))]
        while (body := _body([text for text, _, _ in some])) and len(body) > BODY_BYTES_MAX:
            some = some[: len(some) * 3 // 4]
        made.append(Arrival(at, kind.name, sum(tokens for _, _, tokens in some), body, [right for _, right, _ in some]))
    return made


def _body(texts: Sequence[str]) -> bytes:
    return msgspec.json.encode({"model": MODEL, "input": texts, "encoding_format": "base64"})


async def play(arrivals: Sequence[Arrival], host: str, port: int, key: str) -> list[Answered]:
    """Send all when it is time, whatever has become of those before."""
    pool = tcp_pool(host, port)
    loop = asyncio.get_running_loop()
    began = loop.time() + 0.5
    decode = msgspec.json.Decoder(EmbedReply).decode
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: "

    async def one(arrival: Arrival) -> Answered:
        await asyncio.sleep(began + arrival.at - loop.time())
        request = f"{head}{len(arrival.body)}\r\n\r\n".encode() + arrival.body
        try:
            async with asyncio.timeout(REPLY_S):
                reply = await pool.exchange(lambda: request, REPLY_BYTES_MAX)
        except (NodeFailure, TimeoutError):
            return Answered(arrival.kind, loop.time() - began - arrival.at, 0, 0)
        took_s = loop.time() - began - arrival.at
        if reply.status != 200:
            return Answered(arrival.kind, took_s, reply.status, 0)
        got = [item.embedding for item in sorted(decode(reply.body).data, key=lambda item: item.index)]
        wrong = sum(one != other for one, other in zip(got, arrival.right, strict=False))
        return Answered(arrival.kind, took_s, 200, wrong + abs(len(got) - len(arrival.right)))

    try:
        return list(await asyncio.gather(*(one(arrival) for arrival in arrivals)))
    finally:
        pool.close()
