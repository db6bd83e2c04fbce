"""Is the simulator right? One queue against the formula that is known for it; the same seed twice."""

import math
import statistics

import msgspec
import numpy as np

from bench.sim.contenders import Routed
from bench.sim.figures import WARM, Queue
from bench.sim.routers import RoundRobin
from bench.sim.scenarios import SCHEDULER, UNEQUAL_4, Scenario, run
from bench.sim.servers import FIXED_S, Fifo, Log, Noise
from bench.sim.workload import Trace, moments
from bench.sim.world import World

TOKENS_PER_S = 16_000.0
LOAD = 0.6
RUNS, REQUESTS = 24, 4_000


def one_queue(runs: int = RUNS, requests: int = REQUESTS, seed: int = 1) -> Queue:
    """M/G/1, first come first served: one node, Poisson arrivals, this workload's sizes, against Pollaczek and
    Khinchine: W = lambda E[S^2] / (2 (1 - rho)). The moments of S are exact: nothing that was drawn is on both sides.
    And each waiting time against Lindley's recursion over the times that were drawn."""
    tokens, tokens_squared = moments()
    waits = []
    right_s = off_s = 0.0
    for number in range(seed, seed + runs):
        noise = Noise(number)
        factor, factor_squared = noise.moments()
        mean_s = (FIXED_S + tokens / TOKENS_PER_S) * factor
        square = FIXED_S**2 + 2 * FIXED_S * tokens / TOKENS_PER_S + tokens_squared / TOKENS_PER_S**2
        per_s = LOAD / mean_s
        right_s += per_s * square * factor_squared / (2 * (1 - LOAD)) / runs
        world, log = World(), Log()
        asked = Trace(requests, number).at(per_s)
        server = Fifo(world, 0, TOKENS_PER_S, noise, log, wire_s=0.0)
        world.run(asked, Routed(RoundRobin, world, [server], number).arrive)
        began, ended = (np.array(each) for each in list(zip(*log.busy, strict=True))[:2])
        arrived = np.array([request.at for request in asked])
        waited = began - arrived
        off_s = max(off_s, float(np.abs(waited - _lindley(arrived, ended - began)).max()))
        waits.append(float(waited[int(WARM * requests) :].mean()))
    return Queue(statistics.fmean(waits), statistics.stdev(waits) / math.sqrt(runs), right_s, off_s)


def _lindley(arrived: np.ndarray, takes: np.ndarray) -> np.ndarray:
    """Waiting times in one queue, by recursion over the requests."""
    waited = np.zeros(len(arrived))
    for at in range(1, len(arrived)):
        waited[at] = max(0.0, waited[at - 1] + takes[at - 1] - (arrived[at] - arrived[at - 1]))
    return waited


def twice(requests: int = 500, seed: int = 1) -> bool:
    """Whether the same seed gives the same figures, our own clock's aside."""
    scenario = Scenario("twice", UNEQUAL_4)
    cells = [run(scenario, 70, SCHEDULER, Trace(requests, seed), seed) for _ in range(2)]
    first, second = (msgspec.structs.replace(cell, cpu_us=0.0, took_s=0.0) for cell in cells)
    return first == second
