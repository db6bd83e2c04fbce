"""Five times as much as the nodes can do: one account sends nine tenths of it, another politely the remainder.

A gateway in front of one scripted node that takes its time for each text, and so sets the capacity, which is measured
first, closed loop. Then an open loop, each request due at its own moment, and times from that moment. Afterwards the
account that had sent too much sends one request after another, until it is answered as fast as before.
"""

import asyncio
import gc
import itertools
from collections import Counter
from collections.abc import Sequence
from random import Random

import msgspec
from rich.progress import Progress

from bench.fault.load import CheckingClient, Pool, Question, Record
from bench.rig.command import wrong
from bench.rig.figures import percentile
from bench.rig.fleet import Fleet, Speed

TIMES = 5.0
POLITE = 0.1  # of the requests
CAPACITY_S, CALLERS = 5.0, 64
NODE = Speed(tokens_per_s=20_000.0, fixed_ms=9.0, fifo=True)  # some 100 a second: the machine has to send requests, too
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
    sent: float
    seconds: float
    served: float
    refused_p99_s: float
    polite_sent: int
    polite_served: int
    polite_p99_s: float
    recovered_s: float
    wrong_vectors: int
    outcomes: dict[str, int]

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        goodput, polite = self.served / self.capacity, self.polite_served / max(1, self.polite_sent)
        others = {what: count for what, count in self.outcomes.items() if what not in ("200", "503 overloaded")}
        conditions: dict[str, object] = {
            f"served {goodput:.2f} of the capacity, below {GOODPUT_MIN}": goodput < GOODPUT_MIN,
            f"p99 of refusals {1000 * self.refused_p99_s:.0f} ms": not self.refused_p99_s <= REFUSED_P99_MAX_S,
            f"{polite:.1%} of the polite account's requests served": polite < POLITE_MIN,
            f"{self.recovered_s:.1f} s until all was as before": not self.recovered_s <= RECOVERED_MAX_S,
            f"{self.wrong_vectors} wrong vectors": self.wrong_vectors,
            f"other answers: {others}": bool(others),
        }
        return wrong(conditions)


async def overload(nodes: Fleet, pool: Pool, seconds: float, bar: Progress) -> Overload:
    """The whole run, over a gateway without nodes."""
    await nodes.join(await nodes.start(NODE))
    greedy = CheckingClient(nodes.port, nodes.credentials.api_key, pool)
    polite = CheckingClient(nodes.port, await _another_key(nodes), pool)
    dice = Random(1)
    questions = [pool.question(0.0, [dice.randrange(len(pool.texts))]) for _ in range(1_000)]
    await _one_by_one(greedy, questions, QUIET_REQUESTS)
    capacity = await _capacity(greedy, questions)
    quiet = await _one_by_one(greedy, questions, QUIET_REQUESTS)
    per_s = TIMES * capacity
    gc.freeze()
    gc.disable()  # ours would stop our clients for a tenth of a second, and they would blame the gateway
    running = await _open_loop(greedy, polite, questions, per_s, seconds, bar)
    recovered_s = await _recovered(greedy, questions, percentile([each.took_s for each in quiet], 50))
    records = await asyncio.gather(*running)
    gc.enable()
    for client in (greedy, polite):
        client.close()
    politely = [each for each in records if each.user == "polite"]
    ends = records[0].at + seconds
    served = sum(each.served and each.at + each.took_s <= ends for each in records)
    return Overload(
        capacity=capacity,
        sent=per_s,
        seconds=seconds,
        served=served / seconds,
        refused_p99_s=percentile([each.took_s for each in records if not each.served], 99),
        polite_sent=len(politely),
        polite_served=sum(each.served for each in politely),
        polite_p99_s=percentile([each.took_s for each in politely if each.served], 99),
        recovered_s=recovered_s,
        wrong_vectors=sum(each.wrong for each in records),
        outcomes=dict(Counter(sorted(each.outcome for each in records))),
    )


async def _another_key(nodes: Fleet) -> str:
    await nodes.ask("POST", "/v1/admin/accounts", {"id": "polite"})
    await nodes.ask("POST", "/v1/admin/accounts/polite/credits", {"amount_nanousd": 10**12, "reference": "start"})
    made = await nodes.ask("POST", "/v1/admin/keys", {"account": "polite", "name": "polite", "scopes": ["embeddings"]})
    return str(made["key"])


async def _capacity(client: CheckingClient, questions: Sequence[Question]) -> float:
    """Requests a second when CALLERS each send the next request as soon as they are answered."""
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


async def _one_by_one(client: CheckingClient, questions: Sequence[Question], count: int) -> list[Record]:
    loop = asyncio.get_running_loop()
    return [await client.ask(question, "quiet", loop.time()) for question in questions[:count]]


async def _open_loop(
    greedy: CheckingClient,
    polite: CheckingClient,
    questions: Sequence[Question],
    per_s: float,
    seconds: float,
    bar: Progress,
) -> "list[asyncio.Task[Record]]":
    """Every request is sent at its moment, whatever came of those before it. Returns when the last is sent."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    running: list[asyncio.Task[Record]] = []
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


async def _recovered(client: CheckingClient, questions: Sequence[Question], quiet_s: float) -> float:
    """Seconds until the account that sent too much is answered as before, several times in a row."""
    loop = asyncio.get_running_loop()
    begun = since = loop.time()
    well = 0
    for question in itertools.cycle(questions):
        record = await client.ask(question, "after", loop.time())
        well = well + 1 if record.served and record.took_s <= SAME * quiet_s else 0
        if well == 1:
            since = record.at
        if well == IN_A_ROW or loop.time() - begun > RECOVER_MAX_S:
            break
    return since - begun if well else RECOVER_MAX_S
