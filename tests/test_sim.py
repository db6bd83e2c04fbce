"""The simulator is right where that can be known: one queue by the formula, every request answered once, and the same
seed the same figures."""

import msgspec
import pytest

from bench.sim.check import one_queue, twice
from bench.sim.figures import Queue, targets
from bench.sim.scenarios import CONTENDERS, SCHEDULER, Scenario, dies, run, slows
from bench.sim.servers import FIXED_S, Fifo, Log, Noise, Server, Turns
from bench.sim.workload import NOISY, Trace, moments
from bench.sim.world import World


def test_one_queue_waits_as_long_as_the_formula_says() -> None:
    queue = one_queue(runs=5, requests=600)
    assert queue.ok
    assert queue.off_s < 1e-6
    assert not Queue(queue.found_s + 4 * queue.error_s + 1, queue.error_s, queue.right_s, 0.0).ok


def test_the_same_seed_gives_the_same_figures() -> None:
    assert twice(requests=60)


@pytest.mark.parametrize("befalls", [dies, slows])
@pytest.mark.parametrize("kind", [Fifo, Turns])
@pytest.mark.parametrize("who", [SCHEDULER, "two choices"])
def test_every_request_is_ended_once_whatever_befalls_the_nodes(who: str, kind: type[Server], befalls) -> None:
    """`run` itself asserts that each request ends, and once; here, that few fail."""
    scenario = Scenario("", [16_000.0, 8_000.0, 4_000.0], kind=kind, befalls=befalls)
    found = run(scenario, 70, who, Trace(30, 1), 1)
    assert found.failed <= 5
    assert 0.0 < found.utilisation <= 1.0


def test_all_contenders_get_the_same_requests_and_work_is_kept() -> None:
    """The fleet does the same tokens whoever chooses: at a low load it is busy for as long, but for noise and parts."""
    scenario = Scenario("", [16_000.0] * 3)
    busy = [run(scenario, 30, who, Trace(60, 2), 2).utilisation for who in CONTENDERS]
    assert max(busy) - min(busy) < 0.1


def test_a_trace_is_what_it_says() -> None:
    trace = Trace(2_000, 3)
    mean, square = moments()
    assert trace.mean_tokens == pytest.approx(mean, rel=0.33)  # three standard deviations
    assert square > mean**2
    calm, flood = trace.at(1.0), trace.at(1.0, flood=3.0)
    middle = slice(2_000 // 3, 2 * 2_000 // 3)
    span = calm[middle][-1].at - calm[middle][0].at
    assert flood[middle][-1].at - flood[middle][0].at == pytest.approx(span / 2)  # (3 x 0.5 + 0.5) as many
    assert sum(request.account == NOISY for request in flood[middle]) / len(flood[middle]) == pytest.approx(
        0.75, abs=0.05
    )


@pytest.mark.parametrize(("kind", "small_first"), [(Fifo, False), (Turns, True)])
def test_a_short_call_passes_bulk_work_only_at_a_node_that_takes_turns(kind: type[Server], small_first: bool) -> None:
    world, ended = World(), []
    server = kind(world, 0, 10_000.0, Noise(1, 0.0), Log(), wire_s=0.0)
    server.ask(10_000, lambda failure: ended.append("bulk"))
    server.ask(10, lambda failure: ended.append("small"))
    world.run([], lambda request: None)
    assert ended == (["small", "bulk"] if small_first else ["bulk", "small"])


def test_a_slow_node_takes_longer_also_for_what_runs() -> None:
    world, ended = World(), []
    server = Fifo(world, 0, 1_000.0, Noise(1, 0.0), Log(), wire_s=0.0, fixed_s=0.0)
    server.ask(1_000, lambda failure: ended.append(world.now))
    world.call_at(0.5, lambda: server.slow_down(10.0))
    world.call_at(1.5, lambda: server.slow_down(1.0))
    world.run([], lambda request: None)
    assert ended == [pytest.approx(0.5 + 1.0 + 0.4)]
    assert FIXED_S > 0


def test_targets_are_judged_by_what_was_run() -> None:
    cell = run(Scenario("4 very unequal", [16_000.0]), 70, SCHEDULER, Trace(50, 1), 1)
    worse = msgspec.structs.replace(
        cell, contender="round robin", all=msgspec.structs.replace(cell.all, p99=3 * cell.all.p99)
    )
    found = targets([cell, worse], ["4 very unequal"], SCHEDULER)
    assert [(target.found, target.ok) for target in found] == [(pytest.approx(3.0), False)]
