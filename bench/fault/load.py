"""An open-loop load that checks every vector it gets.

Every second asks the same: the same requests at the same moments of it. So two seconds differ only by what the gateway
and its nodes made of them, and a few of them are enough to compare. Times count from when a request was to be sent.
"""

import asyncio
import base64
import itertools
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import msgspec
import numpy as np

from bench.faultnode.scripted import vectors
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.gateway.nodes.pools import OutboundPool, tcp_pool
from embedmesh.rules.embeddings import EmbedReply
from embedmesh.rules.errors import NodeFailure

MODEL = "all-MiniLM-L6-v2"
SEED = 20_261_125
REPLY_S = 40.0  # the gateway gives an ordinary request 30
REPLY_BYTES_MAX = 16 * 1024 * 1024
POOL = 3_000  # different texts
WORDS = ("river", "stone", "light", "market", "engine", "winter", "paper", "garden", "silver", "number", "letter")
LOST = "no reply"  # in place of a status


class Asked(NamedTuple):
    """One request and what came of it. `at` is when it was to be sent, on the loop's clock."""

    user: str
    at: float
    took_s: float
    said: str  # "200", or another status and the error's code, or LOST
    inputs: int
    wrong: int = 0  # vectors that are not the model's
    cost: int = 0  # as its header says

    @property
    def served(self) -> bool:
        """Whether vectors came."""
        return self.said == "200"


class Question(NamedTuple):
    """A request that comes every second: `offset` seconds into it."""

    offset: float
    texts: bytes  # JSON
    places: list[int]  # in the pool


class Mix(NamedTuple):
    """Requests a second, and how many of them have 8 to 32 texts, or some hundreds; the rest has one."""

    per_s: int = 60
    several: int = 12
    many: int = 2


class Pool:
    """Texts, and the one right vector of each."""

    def __init__(self, tokenizer: ModelTokenizer, count: int = POOL) -> None:
        dice = Random(SEED)
        self.texts = [" ".join([str(at), *dice.choices(WORDS, k=dice.randint(3, 14))]) for at in range(count)]
        ids = tokenizer.ids(self.texts)
        self.tokens = [len(each) + tokenizer.specials for each in ids]
        self.right = vectors(ids)

    def question(self, offset: float, places: list[int]) -> Question:
        """A request for some of the texts."""
        return Question(offset, msgspec.json.encode([self.texts[at] for at in places]), places)


def second(pool: Pool, mix: Mix) -> list[Question]:
    """What is asked every second, in order."""
    dice = Random(SEED)
    sizes = [1] * (mix.per_s - mix.several - mix.many)
    sizes += [dice.randint(8, 32) for _ in range(mix.several)] + [dice.randint(200, 400) for _ in range(mix.many)]
    dice.shuffle(sizes)
    moments = sorted(dice.random() for _ in sizes)
    return [
        pool.question(at, [dice.randrange(len(pool.texts)) for _ in range(size)])
        for at, size in zip(moments, sizes, strict=True)
    ]


class Client:
    """Asks one gateway, and checks."""

    def __init__(self, host: str, port: int, key: str, pool: Pool) -> None:
        self._pool: OutboundPool = tcp_pool(host, port)
        self._pool = pool
        self._head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._decode = msgspec.json.Decoder(EmbedReply).decode

    async def ask(self, question: Question, user: str, at: float) -> Asked:
        """One request. Never raises for what the other side does."""
        loop = asyncio.get_running_loop()
        body = b'{"model":"%s","encoding_format":"base64","user":"%s","input":%s}' % (
            MODEL.encode(),
            user.encode(),
            question.texts,
        )
        request = self._head + b"%d\r\n\r\n" % len(body) + body
        try:
            async with asyncio.timeout(REPLY_S):
                reply = await self._pool.exchange(lambda: request, REPLY_BYTES_MAX)
        except (NodeFailure, TimeoutError):
            return Asked(user, at, loop.time() - at, LOST, len(question.places))
        took_s = loop.time() - at
        if reply.status != 200:
            code = msgspec.json.decode(reply.body)["error"]["code"]
            return Asked(user, at, took_s, f"{reply.status} {code}", len(question.places))
        wrong = self._wrong(reply.body, question.places)
        cost = int(reply.headers[b"x-embedmesh-cost-nanousd"])
        return Asked(user, at, took_s, "200", len(question.places), wrong, cost)

    def close(self) -> None:
        """Hang up."""
        self._pool.close()

    def _wrong(self, body: bytes, places: list[int]) -> int:
        """How many of the vectors are not bit for bit the right ones."""
        data = self._decode(body).data
        if len(data) != len(places) or any(item.index != at for at, item in enumerate(data)):
            return len(places)
        found = np.frombuffer(base64.b64decode("".join([item.embedding for item in data])), "<f4")
        right = self._pool.right[places]
        if found.size != right.size:
            return len(places)
        return int((found.reshape(right.shape) != right).any(axis=1).sum())


class Load:
    """The load, from `start` to `stop`. Times are on the loop's clock."""

    def __init__(self, client: Client, questions: Sequence[Question]) -> None:
        self._client = client
        self._questions = questions
        self._numbers = itertools.count(1)
        self._running: set[asyncio.Task[None]] = set()
        self._asking: asyncio.Task[None] | None = None
        self.records: list[Asked] = []
        self._begun = 0.0

    def start(self) -> None:
        """From now on."""
        self._begun = asyncio.get_running_loop().time()
        self._asking = asyncio.create_task(self._ask())

    async def stop(self) -> None:
        """Ask no more, and wait for what is under way."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await asyncio.gather(*self._running)

    async def second(self) -> tuple[float, float]:
        """Wait for a second of load; from when to when it was. Whenever it begins, it has the same requests."""
        begins = asyncio.get_running_loop().time()
        await asyncio.sleep(1.0)
        return begins, begins + 1.0

    async def answered(self, before: float) -> None:
        """Wait until all that was to be sent before that moment is answered."""
        await asyncio.gather(*(task for task in self._running if float(task.get_name()) < before))

    def between(self, begins: float, ends: float) -> list[Asked]:
        """What was to be sent then, and is answered."""
        return [asked for asked in self._late(begins) if asked.at < ends]

    def _late(self, begins: float) -> Iterator[Asked]:
        """Answers come within REPLY_S, and so what is older than that need not be looked at."""
        for asked in reversed(self.records):
            if asked.at >= begins:
                yield asked
            elif asked.at < begins - 2 * REPLY_S:
                return

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        for whole in itertools.count():
            for question in self._questions:
                at = self._begun + (whole + question.offset)
                if (wait_s := at - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                task = asyncio.create_task(self._one(question, at), name=repr(at))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _one(self, question: Question, at: float) -> None:
        self.records.append(await self._client.ask(question, f"u{next(self._numbers)}", at))
