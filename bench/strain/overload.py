"""Five times as much as the nodes can do: one account asks for nine tenths of it, another politely for the rest.

A gateway in front of one scripted node that takes its time for each text, and so sets the capacity, which is measured
first, closed loop. Then an open loop, each request due at its own moment, and times from that moment. Afterwards the
account that had asked for too much asks one by one, until it is answered as fast as before.
"""

import asyncio
import gc
import itertools
from collections.abc import Sequence
from random import Random

import msgspec
import numpy as np
from rich.progress import Progress

from bench.fault.load import Asked, Client, Pool, Question
from bench.fault.rig import HOST, Rig, Speed

TIMES = 5.0
POLITE = 0.1  # of what is asked
CAPACITY_S, CALLERS = 5.0, 64
NODE = Speed(tokens_per_s=20_000.0, fixed_ms=9.0, fifo=True)  # some 100 a second: the machine has to ask, too
QUIET_REQUESTS = 200  # one after the other, before and after
RECOVER_MAX_S = 30.0
SAME = 3.0  # times what a request took before: as fast as before, on a noisy machine
IN_A_ROW = 10  # requests that are

GOODPUT_MIN = 0.9  # of the capacity
REFUSED_P99_MAX_S = 0.05
POLITE_MIN = 0.99  # of its requests
RECOVERED_MAX_S = 5.0


class Overload(msgspec.Struct, frozen=True):
    """What was found. Rates are requests a second."""

    capacity: float
    asked: float
    seconds: float
    served: float
    refused_p99_s: float
    polite_asked: int
    polite_served: int
    polite_p99_s: float
    recovered_s: float
    wrong: int
    said: dict[str, int]

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        goodput, polite = self.served / self.capacity, self.polite_served / max(1, self.polite_asked)
        others = {said: count for said, count in self.said.items() if said not in ("200", "503 overloaded")}
        said = {
            f"served {goodput:.2f} of the capacity, below {GOODPUT_MIN}": goodput < GOODPUT_MIN,
            f"p99 of refusals {1000 * self.refused_p99_s:.0f} ms": not self.refused_p99_s <= REFUSED_P99_MAX_S,
            f"{polite:.1%} of the polite account's requests served": polite < POLITE_MIN,
            f"{self.recovered_s:.1f} s until all was as before": not self.recovered_s <= RECOVERED_MAX_S,
            f"{self.wrong} wrong vectors": self.wrong > 0,
            f"other answers: {others}": bool(others),
        }
        return [words for words, broken in said.items() if broken]


async def overload(rig: Rig, pool: Pool, seconds: float, bar: Progress) -> Overload:
    """The whole run, over a gateway without nodes."""
    await rig.join(await rig.start(NODE))
    greedy = Client(HOST, rig.port, rig.credentials.api_key, pool)
    polite = Client(HOST, rig.port, await _another_key(rig), pool)
    dice = Random(1)
    questions = [pool.question(0.0, [dice.randrange(len(pool.texts))]) for _ in range(1_000)]
    await _one_by_one(greedy, questions, QUIET_REQUESTS)
    capacity = await _capacity(greedy, questions)
    quiet = await _one_by_one(greedy, questions, QUIET_REQUESTS)
    per_s = TIMES * capacity
    gc.freeze()
    gc.disable()  # ours would stop those who ask for a tenth of a second, and they would take it for the gateway
    running = await _open_loop(greedy, polite, questions, per_s, seconds, bar)
    recovered_s = await _recovered(greedy, questions, float(np.median([each.took_s for each in quiet])))
    records = await asyncio.gather(*running)
    gc.enable()
    for client in (greedy, polite):
        client.close()
    politely = [each for each in records if each.user == "polite"]
    ends = records[0].at + seconds
    served = sum(each.served and each.at + each.took_s <= ends for each in records)
    kinds = [each.said for each in records]
    return Overload(
        capacity=capacity,
        asked=per_s,
        seconds=seconds,
        served=served / seconds,
        refused_p99_s=_p99([each.took_s for each in records if not each.served]),
        polite_asked=len(politely),
        polite_served=sum(each.served for each in politely),
        polite_p99_s=_p99([each.took_s for each in politely if each.served]),
        recovered_s=recovered_s,
        wrong=sum(each.wrong for each in records),
        said={said: kinds.count(said) for said in sorted(set(kinds))},
    )


async def _another_key(rig: Rig) -> str:
    await rig.ask("POST", "/v1/admin/accounts", {"id": "polite"})
    await rig.ask("POST", "/v1/admin/accounts/polite/credits", {"amount_nanousd": 10**12, "reference": "start"})
    made = await rig.ask("POST", "/v1/admin/keys", {"account": "polite", "name": "polite", "scopes": ["embeddings"]})
    return str(made["key"])


async def _capacity(client: Client, questions: Sequence[Question]) -> float:
    """Requests a second when so many callers ask again as soon as they are answered."""
    loop = asyncio.get_running_loop()
    until = loop.time() + CAPACITY_S
    turns = itertools.cycle(questions)

    async def caller() -> int:
        count = 0
        while loop.time() < until:
            count += (await client.ask(next(turns), "capacity", loop.time())).served
        return count

    begun = loop.time()
    counts = await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return sum(counts) / (loop.time() - begun)


async def _one_by_one(client: Client, questions: Sequence[Question], count: int) -> list[Asked]:
    loop = asyncio.get_running_loop()
    return [await client.ask(question, "quiet", loop.time()) for question in questions[:count]]


async def _open_loop(
    greedy: Client, polite: Client, questions: Sequence[Question], per_s: float, seconds: float, bar: Progress
) -> "list[asyncio.Task[Asked]]":
    """Every request is asked at its moment, whatever came of those before it. Returns when the last is asked."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    running: list[asyncio.Task[Asked]] = []
    shown = bar.add_task("overload", total=round(per_s * seconds))
    for number in range(round(per_s * seconds)):
        at = begun + number / per_s
        if (wait_s := at - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        user, client = ("polite", polite) if number % round(1 / POLITE) == 0 else ("greedy", greedy)
        running.append(asyncio.create_task(client.ask(questions[number % len(questions)], user, at)))
        bar.advance(shown)
    await asyncio.sleep(max(0.0, begun + seconds - loop.time()))
    return running


async def _recovered(client: Client, questions: Sequence[Question], quiet_s: float) -> float:
    """Seconds until the account that asked for too much is answered as before, several times in a row."""
    loop = asyncio.get_running_loop()
    begun = since = loop.time()
    well = 0
    for question in itertools.cycle(questions):
        asked = await client.ask(question, "after", loop.time())
        well = well + 1 if asked.served and asked.took_s <= SAME * quiet_s else 0
        if well == 1:
            since = asked.at
        if well == IN_A_ROW or loop.time() - begun > RECOVER_MAX_S:
            break
    return since - begun if well else RECOVER_MAX_S


def _p99(times: list[float]) -> float:
    return float(np.percentile(times, 99)) if times else 0.0
