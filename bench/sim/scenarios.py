"""The fleets, what befalls them, and one run of one contender through it."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from bench.sim.contenders import START_S, Contender, Oracle, Routed, Scheduled
from bench.sim.figures import Cell, cell
from bench.sim.routers import ROUTERS
from bench.sim.servers import FIXED_S, WIRE_S, Fifo, Log, Noise, Server, Turns
from bench.sim.workload import Trace
from bench.sim.world import World

EQUAL_8 = [16_000.0] * 8
UNEQUAL_8 = [2_000.0, 2_000.0, 4_000.0, 4_000.0, 8_000.0, 8_000.0, 16_000.0, 32_000.0]
UNEQUAL_4 = [1_000.0, 4_000.0, 16_000.0, 64_000.0]
MIXED = [2_000.0] * 30 + [8_000.0] * 40 + [16_000.0] * 20 + [64_000.0] * 10  # old machines to small accelerators

SCHEDULER, ORACLE = "our scheduler", "oracle"

Befalls = Callable[[World, Sequence[Server], float, float], None]
"""World, servers, start and end of the middle third: what is done to them."""


def nothing(world: World, servers: Sequence[Server], start: float, end: float) -> None: ...


def slows(world: World, servers: Sequence[Server], start: float, end: float) -> None:
    world.call_at(start, lambda: servers[0].slow_down(10.0))
    world.call_at(end, lambda: servers[0].slow_down(1.0))


def dies(world: World, servers: Sequence[Server], start: float, end: float) -> None:
    world.call_at(start, servers[0].die)
    world.call_at(end, servers[0].come_back)


class Scenario(NamedTuple):
    """A fleet and its fate."""

    name: str
    speeds: Sequence[float]  # tokens a second of each node
    requests: int = 4_000  # of a run in passing
    loads: Sequence[int] = (50, 70, 90)  # percent
    kind: type[Server] = Fifo
    befalls: Befalls = nothing
    flood: float = 1.0

    def per_s(self, load: int, tokens: float) -> float:
        """Requests a second, of so many tokens on average, that keep the fleet busy for so many percent, if each is
        whole and every node does its share."""
        return load / 100 * sum(1 / (FIXED_S + tokens / speed) for speed in self.speeds)


STATIC = (
    Scenario("8 equal", EQUAL_8),
    Scenario("8 unequal", UNEQUAL_8),
    Scenario("4 very unequal", UNEQUAL_4),
    Scenario("100 mixed", MIXED, requests=1_000, loads=(70, 90)),
)
LARGE = (Scenario("2,000 mixed", MIXED * 20, requests=400, loads=(70,)),)  # takes minutes: by name only
FATES = (
    Scenario("8 equal, one 10x slower for a while", EQUAL_8, loads=(70,), befalls=slows),
    Scenario("8 equal, one away for a while", EQUAL_8, loads=(70,), befalls=dies),
    Scenario("8 equal, the noisy account floods", EQUAL_8, loads=(70,), flood=3.0),
    Scenario("8 unequal, nodes that take turns", UNEQUAL_8, loads=(70, 90), kind=Turns),
)
CONTENDERS: dict[str, Callable[[World, Sequence[Server], int], Contender]] = {
    **{name: partial(Routed, make) for name, make in ROUTERS.items()},
    SCHEDULER: Scheduled,
    ORACLE: Oracle,
}


def run(scenario: Scenario, load: int, name: str, trace: Trace, seed: int) -> Cell:
    """One contender, one load."""
    world, log = World(), Log()
    noise = Noise(seed)
    wire_s = 0.0 if name == ORACLE else WIRE_S
    servers = [
        scenario.kind(world, number, speed, noise, log, wire_s=wire_s) for number, speed in enumerate(scenario.speeds)
    ]
    requests = trace.at(scenario.per_s(load, trace.mean_tokens), scenario.flood)
    for request in requests:
        request.at += START_S
    third = len(requests) // 3
    began = time.perf_counter()
    contender = CONTENDERS[name](world, servers, seed)
    scenario.befalls(world, servers, requests[third].at, requests[2 * third].at)
    world.run(requests, contender.arrive)
    contender.over()
    took_s = time.perf_counter() - began
    log.waited += contender.waited
    return cell(scenario.name, load, name, scenario.speeds, requests, log, contender.cpu_ns, took_s)
