"""What the gateway adds to streams of chats: `python -m bench.generation [--rounds N] [--only NAME ...] [--json]`.

Loopback only, in turns in one run: no gateway, ours, nginx as a plain proxy, and a router written in Rust, each on a
core of its own; the cheap node and the readers share another. First one stream at a time, then 200 that bring 50 events
a second each, then a reader of a kilobyte a second. A peer that does not install is named and left out.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from bench.gateway.measure import OTHER_CORE
from bench.generation.contenders import DIRECT, OURS, PEERS, Contender, cheap_node, started
from bench.generation.figures import Figures, Row, Turn, show, targets_of
from bench.generation.node import Spoken
from bench.generation.readers import alone, together
from bench.generation.slow import growth_kb
from bench.rig.command import bench, check_names, progress, run_async
from bench.rig.figures import Spread
from bench.rig.install import NotInstalled
from bench.rig.processes import before_others
from embedmesh.process import python_in_words

ALONE_STREAMS, ALONE = 40, Spoken(events=12, pace_s=0.01)
PACE_S = 0.02
SYNCS, SYNC_BYTES = 15, 4_096
NAMES = (DIRECT, OURS, "nginx", "vllm-router")


def measure(
    rounds: int = 5,
    seconds: float = 5.0,
    streams: int = 200,
    slow_s: float = 30.0,
    only: Sequence[str] = (),
    first: bool = False,
) -> Figures:
    """All of it, or some."""
    known = (DIRECT, OURS, *PEERS)
    check_names(only, known)
    os.sched_setaffinity(0, {OTHER_CORE})
    turns: dict[str, list[Turn]] = {}
    left_out: dict[str, str] = {}
    busy = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-generation-")))
        node, node_pid = stack.enter_context(cheap_node(folder))
        contenders: list[Contender] = []
        bar = stack.enter_context(progress())
        for name in bar.track(only or NAMES, description="starting"):
            try:
                contenders.append(stack.enter_context(started(name, folder, node)))
            except NotInstalled as why:
                left_out[name] = str(why)
        for contender in bar.track(contenders * rounds, description="measuring"):
            pids = [node_pid] if contender.process is None else [node_pid, contender.process.pid]
            with before_others(*pids) if first else nullcontext():
                turn = Turn(
                    run_async(alone(contender.target, ALONE_STREAMS, ALONE)),
                    run_async(
                        together(
                            contender.target,
                            streams,
                            Spoken(int(seconds / PACE_S), PACE_S),
                            lambda which=contender: which.cpu_s,  # type: ignore[misc]
                        )
                    ),
                    sync_ms(folder),
                )
            turns.setdefault(contender.name, []).append(turn)
        ours = next((each for each in contenders if each.name == OURS), None)
        grown = None if ours is None else growth_kb(ours, slow_s)
    rows = {name: Row.of(name, found) for name, found in turns.items()}
    syncs = Spread.of([turn.sync_ms for found in turns.values() for turn in found])
    machine = f"{platform.machine()}, {python_in_words()}"
    return Figures(
        machine,
        busy,
        rounds,
        streams,
        streams / PACE_S,
        syncs,
        [*rows.values()],
        grown,
        left_out,
        targets_of(rows, grown),
    )


def sync_ms(folder: Path) -> float:
    """What the disk needs now for a small write that is durable: the median of some."""
    took = []
    with (folder / "sync").open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            begun = time.perf_counter()
            file.write(bytes(SYNC_BYTES))
            os.fdatasync(file.fileno())
            took.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(took)


if __name__ == "__main__":
    bench(
        measure,
        show=show,
        file="generation.json",
        width=140,
        seconds="of the streams that run at one time",
        slow_s="seconds of the slow reader",
        only="names, such as embedmesh",
        first="measure before all other work of the machine (needs root)",
    )
