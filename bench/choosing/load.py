"""The same requests at the same moments for every contender: open loop, measured from when each was to be sent."""

import asyncio
from collections.abc import Sequence
from random import Random

from bench.fault.load import WORDS, CheckingClient, Pool, Question, Record
from bench.sim.workload import KINDS
from embedmesh.engine.tokens import ModelTokenizer

TEXTS_A_LENGTH = 4  # different texts of each number of tokens
REPLY_S = 300.0
TEXTS_BYTES_MAX = 3_500_000  # of a request; our gateway takes 4 MiB
BEGIN_S = 0.5  # before the first request

Arrival = tuple[str, Question]
"""The kind of a request, and the request."""

LENGTHS = sorted({length for kind in KINDS for length in kind.lengths})


def make_pool(tokenizer: ModelTokenizer) -> Pool:
    """Texts of every length: TEXTS_A_LENGTH of each, in the order of LENGTHS."""
    dice = Random(1)
    lengths = [length for length in LENGTHS for _ in range(TEXTS_A_LENGTH)]
    return Pool(tokenizer, [" ".join(dice.choices(WORDS, k=max(1, each - tokenizer.specials))) for each in lengths])


def arrivals(pool: Pool, tokens_per_s: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals that bring `tokens_per_s` on average."""
    dice = Random(seed)
    mean = sum(kind.share * kind.moments()[0] for kind in KINDS)
    first = {length: at * TEXTS_A_LENGTH for at, length in enumerate(LENGTHS)}
    made: list[Arrival] = []
    at = 0.0
    while (at := at + dice.expovariate(tokens_per_s / mean)) < seconds:
        kind = dice.choices(KINDS, [kind.share for kind in KINDS])[0]
        count = kind.texts(dice.random())
        rows = [first[dice.choice(kind.lengths)] + dice.randrange(TEXTS_A_LENGTH) for _ in range(count)]
        while len((question := pool.question(at, rows)).texts) > TEXTS_BYTES_MAX:
            rows = rows[: len(rows) * 3 // 4]
        made.append((kind.name, question))
    return made


async def play(planned: Sequence[Arrival], pool: Pool, port: int, key: str) -> list[Record]:
    """Send each request at its moment, whatever has become of those before. The kind is the record's user."""
    client = CheckingClient(port, key, pool, REPLY_S)
    loop = asyncio.get_running_loop()
    begun = loop.time() + BEGIN_S

    async def one(kind: str, question: Question) -> Record:
        due = begun + question.offset
        await asyncio.sleep(due - loop.time())
        return await client.ask(question, kind, due)

    try:
        return list(await asyncio.gather(*(one(*arrival) for arrival in planned)))
    finally:
        client.close()
