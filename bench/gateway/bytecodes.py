"""What an ordinary request costs, counted: `python -m bench.gateway.bytecodes [VARIANT ...] [--by module] [--json]`.

Times on a shared machine say little; the bytecodes that the interpreter runs, and the Python functions that it enters,
say the same on every machine and under every load. Counted is what a request causes on the gateway's event loop, from
its first byte to its settlement: a whole gateway in this process (see bench.gateway.inprocess), 32 requests at once,
a thousand a second as time goes for it, the mean of four such bursts, of each the lesser of two times. C costs nothing
here, nor does another thread: `make guard` keeps the time beside it.

A *call* is a Python function entered, or a coroutine gone on. What a program does without being asked (IDLE) is left
out. Other Pythons than 3.11 have other bytecodes: compare counts of one version only.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import CO_COROUTINE
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

import msgspec
from rich.console import Console

import embedmesh
from bench.gateway.inprocess import BURST, DIFFERENT_BURSTS, VARIANTS, Variant, in_process
from bench.gateway.still_time import StillLoop
from bench.rig.command import bench, check_names, track
from bench.rig.postgres import serving
from bench.rig.tables import print_table

ROOT = Path(__file__).parent.parent.parent
OWN = str(ROOT / "bench")
WARM_BURSTS, TIMES = 2 * DIFFERENT_BURSTS, 2
SHOWN = 60  # rows of a table
IDLE = {"TabKeeper.watch", "Changes.watch", "KeyRing.note_uses", "PriceList.watch", "expire", "upkeep"}
"""Coroutines that run by the clock: not of requests, whatever they call."""


class Row(msgspec.Struct):
    """A function or a module, a request."""

    name: str
    bytecodes: float
    calls: float


class Cost(msgspec.Struct):
    """Of one variant, a request. `rows`: the dearest first, means over all bursts."""

    variant: Variant
    bytecodes: float
    calls: float
    rows: list[Row]


class Tracer:
    """Counts what this thread runs in the functions that the event loop enters."""

    def __init__(self, *, opcodes: bool = True) -> None:
        """Without `opcodes`, only calls: in a fifth of the time."""
        self.bytecodes: Counter[CodeType] = Counter()
        self.calls: Counter[CodeType] = Counter()
        self._opcodes = opcodes
        self._base: FrameType | None = None  # that runs the loop
        self._own: FrameType | None = None  # of the task that counts
        self._skipping = False  # what the loop has entered is not of a request
        self.steps = 0  # how often it has entered something that is

    @contextmanager
    def counting(self) -> Iterator[None]:
        """In a task, whose own steps are not counted: what called its outermost coroutine runs the loop."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and not frame.f_code.co_flags & CO_COROUTINE:
            frame = frame.f_back
        while frame is not None and frame.f_code.co_flags & CO_COROUTINE:
            self._own, frame = frame, frame.f_back
        self._base, self._skipping = frame, True  # to the end of this step
        before = sys.gettrace()
        sys.settrace(self._entered)
        try:
            yield
        finally:
            sys.settrace(before)

    def _entered(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if frame.f_back is self._base:
            self._skipping = frame is self._own or code.co_qualname in IDLE
            self.steps += not self._skipping
        if self._skipping or code.co_filename.startswith(OWN):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        self.calls[code] += 1
        return self._ran if self._opcodes else None

    def _ran(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.bytecodes[frame.f_code] += 1
        return self._ran


def cost_of(variant: Variant, dsn: str | None = None, by: str = "function") -> Cost:
    """Of one variant. `dsn`: see in_process. Raises CannotRun, RuntimeError."""
    with asyncio.Runner(loop_factory=StillLoop) as runner:
        return runner.run(_cost_of(variant, dsn, by))


async def _cost_of(variant: Variant, dsn: str | None, by: str) -> Cost:
    totals: list[tuple[int, int]] = []
    bursts = TIMES * DIFFERENT_BURSTS
    bytecodes: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    async with in_process(variant, dsn) as gateway:
        assert gateway.background >= IDLE, "what runs by the clock has other names now"
        for number in range(WARM_BURSTS + bursts):
            tracer = Tracer(opcodes=number >= WARM_BURSTS)
            with tracer.counting():
                await gateway.ask(lambda tracer=tracer: tracer.steps)  # type: ignore[misc]
            if number < WARM_BURSTS:
                continue
            totals.append((tracer.bytecodes.total(), tracer.calls.total()))
            for code, count in tracer.bytecodes.items():
                bytecodes[_name(code, by)] += count
            for code, count in tracer.calls.items():
                calls[_name(code, by)] += count
    requests = BURST * bursts
    rows = [Row(name, count / requests, calls[name] / requests) for name, count in bytecodes.most_common()]
    least = [list(map(min, zip(*totals[at::DIFFERENT_BURSTS], strict=True))) for at in range(DIFFERENT_BURSTS)]
    a_request, calls_a_request = (sum(each) / len(least) / BURST for each in zip(*least, strict=True))
    return Cost(variant, a_request, calls_a_request, rows)


def _name(code: CodeType, by: str) -> str:
    path = code.co_filename
    for folder in (Path(embedmesh.__file__).parent, ROOT, Path(asyncio.__file__).parent.parent):
        path = path.removeprefix(f"{folder}/")
    return f"{path}::{code.co_qualname}" if by == "function" else path


class Figures(msgspec.Struct):
    """All that were counted."""

    costs: list[Cost]

    @property
    def broken(self) -> list[str]:
        """Nothing: tests/test_cost.py has the bounds."""
        return []


def measure(variants: Sequence[str], by: Literal["function", "module"] = "function") -> Figures:
    """The variants that are named, or all."""
    check_names(variants, list(VARIANTS))
    costs = []
    for variant in track([each for each in VARIANTS if not variants or each in variants], "counting"):
        if variant == "postgres":
            with serving() as server:
                costs.append(cost_of(variant, server.new(), by))
        else:
            costs.append(cost_of(variant, None, by))
    return Figures(costs)


def show(figures: Figures, console: Console) -> None:
    """A table a variant, and one of all."""
    for cost in figures.costs:
        rows = ((row.name, f"{row.bytecodes:.1f}", f"{row.calls:.2f}") for row in cost.rows[:SHOWN])
        print_table(console, ("what", "bytecodes", "calls"), rows, VARIANTS[cost.variant].words)
    totals = ((cost.variant, f"{cost.bytecodes:,.0f}", f"{cost.calls:.1f}") for cost in figures.costs)
    print_table(console, ("a request of", "bytecodes", "calls"), totals)


if __name__ == "__main__":
    bench(measure, show=show, variants="all, unless some of: " + " ".join(VARIANTS), by="what a row is")
