"""An open-loop load that checks every vector it gets.

Every second has the same requests at the same moments. So two seconds differ only by what the gateway and its nodes
made of them, and a few of them are enough to compare. Times count from when a request was to be sent.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import NamedTuple

import msgspec

from bench.faultnode.scripted import vectors
from bench.rig.http import MODEL, AsyncClient, Reply, vectors_of
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.errors import NodeFailure

SEED = 20_261_125
REPLY_S = 40.0  # the gateway gives an ordinary request 30
POOL = 3_000  # different texts
WORDS = ("river", "stone", "light", "market", "engine", "winter", "paper", "garden", "silver", "number", "letter")
LOST = "no reply"  # in place of a status
MAX_TOKENS = 256  # of the default model


class Record(NamedTuple):
    """One request and its outcome. `at` is when it was to be sent, on the loop's clock."""

    user: str
    at: float
    took_s: float
    outcome: str  # "200", or another status and the error's code, or LOST
    inputs: int
    wrong: int = 0  # vectors that are not the model's
    cost: int = 0  # by the reply's header

    @property
    def served(self) -> bool:
        """Whether vectors came."""
        return self.outcome == "200"


class Question(NamedTuple):
    """A request that is due `offset` seconds after a beginning."""

    offset: float
    texts: bytes  # JSON
    rows: list[int]  # of the pool


class Mix(NamedTuple):
    """Requests a second, and how many of them have 8 to 32 texts, or some hundreds; the others have one."""

    per_s: int = 60
    several: int = 12
    many: int = 2


class Pool:
    """Texts, and the one right vector of each."""

    def __init__(self, tokenizer: ModelTokenizer, texts: Sequence[str]) -> None:
        self.texts = texts
        ids = tokenizer.ids(self.texts)
        self.tokens = [len(each) + tokenizer.specials for each in ids]
        self.right = vectors(ids)

    def question(self, offset: float, rows: list[int]) -> Question:
        """A request for some of the texts."""
        return Question(offset, msgspec.json.encode([self.texts[row] for row in rows]), rows)


def made_pool(tokenizer: ModelTokenizer) -> Pool:
    """Of 4 to 15 words each."""
    dice = Random(SEED)
    return Pool(tokenizer, [" ".join([str(at), *dice.choices(WORDS, k=dice.randint(3, 14))]) for at in range(POOL)])


def second(pool: Pool, mix: Mix) -> list[Question]:
    """The requests of every second, in order."""
    dice = Random(SEED)
    sizes = [1] * (mix.per_s - mix.several - mix.many)
    sizes += [dice.randint(8, 32) for _ in range(mix.several)] + [dice.randint(200, 400) for _ in range(mix.many)]
    dice.shuffle(sizes)
    moments = sorted(dice.random() for _ in sizes)
    return [
        pool.question(at, [dice.randrange(len(pool.texts)) for _ in range(size)])
        for at, size in zip(moments, sizes, strict=True)
    ]


class CheckingClient:
    """Sends requests to one gateway, and checks the replies."""

    def __init__(self, port: int, key: str, pool: Pool, reply_s: float = REPLY_S) -> None:
        self._client = AsyncClient(port, key)
        self._pool = pool
        self._reply_s = reply_s
        self.close = self._client.close

    async def ask(self, question: Question, user: str, at: float) -> Record:
        """One request. Never raises for what the other side does."""
        loop, inputs = asyncio.get_running_loop(), len(question.rows)
        head = f'{{"model":"{MODEL}","encoding_format":"base64","user":"{user}","input":'
        try:
            async with asyncio.timeout(self._reply_s):
                reply = await self._client.ask("POST", "/v1/embeddings", head.encode() + question.texts + b"}")
        except (NodeFailure, TimeoutError):
            return Record(user, at, loop.time() - at, LOST, inputs)
        took_s = loop.time() - at
        if reply.status != 200:
            return Record(user, at, took_s, _outcome(reply), inputs)
        cost = int(reply.headers.get("x-embedmesh-cost-nanousd", 0))
        return Record(user, at, took_s, "200", inputs, self._wrong(reply, question.rows), cost)

    def _wrong(self, reply: Reply, rows: list[int]) -> int:
        """How many of the vectors are not bit for bit the right ones."""
        data = reply.json()["data"]
        if len(data) != len(rows) or any(item["index"] != at for at, item in enumerate(data)):
            return len(rows)
        found, right = vectors_of(item["embedding"] for item in data), self._pool.right[rows]
        return int((found != right).any(axis=1).sum()) if found.shape == right.shape else len(rows)


def _outcome(reply: Reply) -> str:
    try:
        return reply.outcome
    except (msgspec.DecodeError, LookupError, TypeError):  # another program's error
        return str(reply.status)


class Load:
    """The load, from `start` to `stop`. Times are on the loop's clock."""

    def __init__(self, client: CheckingClient, questions: Sequence[Question]) -> None:
        self._client = client
        self._questions = questions
        self._numbers = itertools.count(1)
        self._running: set[asyncio.Task[None]] = set()
        self._sending: asyncio.Task[None] | None = None
        self.records: list[Record] = []
        self._begun = 0.0

    def start(self) -> None:
        """From now on."""
        self._begun = asyncio.get_running_loop().time()
        self._sending = asyncio.create_task(self._send())

    async def stop(self) -> None:
        """Send no more, and wait for what is under way."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        await asyncio.gather(*self._running)

    async def second(self) -> tuple[float, float]:
        """Wait for a second of load; from when to when it was. Whenever it begins, it has the same requests."""
        begins = asyncio.get_running_loop().time()
        await asyncio.sleep(1.0)
        return begins, begins + 1.0

    async def answered(self, before: float) -> None:
        """Wait until all that was to be sent before that moment is answered."""
        await asyncio.gather(*(task for task in self._running if float(task.get_name()) < before))

    def between(self, begins: float, ends: float) -> list[Record]:
        """What was to be sent then, and is answered."""
        return [record for record in self._late(begins) if record.at < ends]

    def _late(self, begins: float) -> Iterator[Record]:
        """Answers come within REPLY_S, and so what is older than that need not be looked at."""
        for record in reversed(self.records):
            if record.at >= begins:
                yield record
            elif record.at < begins - 2 * REPLY_S:
                return

    async def _send(self) -> None:
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


@asynccontextmanager
async def loading(client: CheckingClient, pool: Pool) -> AsyncIterator[Load]:
    """The load, while this is open."""
    load = Load(client, second(pool, Mix()))
    load.start()
    try:
        yield load
    finally:
        await load.stop()
