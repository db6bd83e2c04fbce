"""The machine's own limit: how many operations a second a large matrix product reaches in the same OpenVINO."""

import sys
from pathlib import Path

from bench.engine.contenders import Runner
from bench.engine.runner import MATMUL, MATMULS

REPEATS = 8  # products of 58 GFLOP in each round


class Peaks:
    """The best of the run, by precision, in GFLOP/s. A peak is what was reached once; so it counts against us."""

    def __init__(self, precisions: list[str], threads: int) -> None:
        self._runners = {
            name: Runner(f"peak {name}", Path(sys.executable), f"peak-{name}", Path(), threads) for name in precisions
        }
        self.gflops = dict.fromkeys(precisions, 0.0)

    def measure(self) -> None:
        """Once more."""
        work = 2 * MATMUL**3 * MATMULS / 1e9
        for name, runner in self._runners.items():
            best = max(work / seconds for seconds in runner.singles([""] * REPEATS))
            self.gflops[name] = max(self.gflops[name], best)

    def stop(self) -> None:
        """End the processes."""
        for runner in self._runners.values():
            runner.stop()
