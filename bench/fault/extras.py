"""What is done to whole nodes: one of two is killed or stopped; both kinds get all the load that they can take."""

import asyncio
import itertools
import signal
from collections import Counter

from bench.fault.figures import Saturated, Whole
from bench.fault.load import CheckingClient, Load, Pool
from bench.rig.fleet import Fleet, Node, Speed

CALM_S, SEEN_S = 1.0, 3.0  # before it happens, and after
CALLERS = 96  # more than one node gets at one time
ROUNDS, ROUND_S, WARM_S = 4, 1.0, 0.3
FAST, REAL = Speed(1_000_000.0, 0.1), Speed(15_000.0, 2.0)


async def lose(fleet: Fleet, load: Load, name: str, number: signal.Signals, *, dials_out: bool, count: int) -> Whole:
    """All but one of the good nodes are sent a signal."""
    loop = asyncio.get_running_loop()
    nodes = await asyncio.gather(*(fleet.start(Speed(), dials_out=dials_out) for _ in range(count)))
    for node in nodes:
        await fleet.join(node)
    begun = loop.time()
    await asyncio.sleep(CALM_S)
    for node in nodes:
        node.process.send_signal(number)
    await asyncio.sleep(SEEN_S)
    ended = loop.time()
    await load.answered(ended)
    for node in nodes:
        await fleet.drop(node)
    records = load.between(begun, ended)
    failed = [record for record in records if not record.served]
    return Whole(
        name=name,
        requests=len(records),
        failed=len(failed),
        refused=dict(Counter(record.outcome for record in failed)),
        worst_ms=1000 * max(record.took_s for record in records),
        wrong_vectors=sum(record.wrong for record in records),
        users=[record.user for record in records],
    )


async def saturate(
    fleet: Fleet, client: CheckingClient, pool: Pool, healthy: Node, name: str, speed: Speed, size: int
) -> Saturated:
    """The same closed loop on a node with an address and on one that dials out, in turns. No other load meanwhile."""
    nodes = [await fleet.start(speed), await fleet.start(speed, dials_out=True)]
    for node in nodes:
        await fleet.join(node)
        await fleet.act(node, "drain")
    await fleet.act(healthy, "drain")
    rates: list[list[float]] = [[], []]
    failed = 0
    for number in range(ROUNDS):
        for node, found in list(zip(nodes, rates, strict=True))[:: -1 if number % 2 else 1]:  # each is first in turns
            await fleet.act(node, "resume")
            rate, lost = await _rate(client, pool, size, f"s{name}".replace(" ", ""))
            await fleet.act(node, "drain")
            found.append(rate)
            failed += lost
    await fleet.act(healthy, "resume")
    for node in nodes:
        await fleet.drop(node)
    ratios = [dialled / address for address, dialled in zip(*rates, strict=True)]
    return Saturated(name, sum(rates[0]) / ROUNDS, sum(rates[1]) / ROUNDS, ratios, failed)


async def _rate(client: CheckingClient, pool: Pool, size: int, user: str) -> tuple[float, int]:
    """Requests a second, and how many were not served right."""
    loop = asyncio.get_running_loop()
    rows = [[(number * size + at) % len(pool.texts) for at in range(size)] for number in range(200)]
    questions = [pool.question(0.0, each) for each in rows]
    numbers = itertools.count()
    begins = loop.time() + WARM_S
    ends = begins + ROUND_S
    done = failed = 0

    async def caller() -> None:
        nonlocal done, failed
        while (now := loop.time()) < ends:
            record = await client.ask(questions[next(numbers) % len(questions)], user, now)
            done += begins <= loop.time() < ends
            failed += not record.served or record.wrong > 0

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done / ROUND_S, failed
