"""A machine that is busy with other things: `python -m bench.starved [--seconds N] [--loops N] [--json]`.

A real `serve` with the default model, and 24 busy loops beside it, each in a session of its own. Callers send 64 texts
a request, one request after another and then 8 at once, and check every vector. What must hold:

* every answer is right, the engine is never restarted, and nobody is refused: a 504 only past the request's own time;
* `/readyz` says that the engine is starved, and of what;
* an engine that is stopped, runs round and round or hangs is found within 15 s, and within 5 s on a quiet machine;
* a server that is started meanwhile becomes ready;
* the same with a CPU quota in place of the loops, where this machine lets us set one.

The last line is the verdict; the exit code is 0 when all of it held.
"""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

import msgspec
from rich.console import Console
from rich.table import Table

from bench.live import Live, serving
from bench.starved.hogs import NoQuota, hogs, quota
from bench.starved.load import FAULTS, Callers, Told, found_s, reasons, starts
from embedmesh.rules.nodes import SHORTAGES

LOOPS = 24
SECONDS = 180.0
AT_ONCE = 8
FOUND_QUIET_S, FOUND_BUSY_S = 5.0, 15.0
SHARE = 0.1  # of one CPU: as much as the loops leave
QUOTA_PART = 0.25  # of the seconds
READY_S = 300.0  # for a start beside the loops: it takes a few seconds of CPU time, and gets a twelfth of a core
BACK_S = 60.0
ASK_READY_S = 2.0
BROKEN = Path(__file__).parent / "broken"


class Figures(msgspec.Struct):
    """What was measured. Seconds; `quota` is why there is no such figure, where there is none."""

    told: dict[str, Told] = {}
    restarts: dict[str, int] = {}
    found_s: dict[str, float] = {}
    reasons: set[str] = set()  # that /readyz gave
    start_s: float | None = None
    no_quota: str = ""
    wrong: list[str] = []


def under(figures: Figures, live: Live, what: str, work: Callable[[], Told]) -> None:
    """Work during which nothing may go wrong."""
    before = starts(live)
    told = figures.told[what] = work()
    figures.restarts[what] = starts(live) - before
    if figures.restarts[what]:
        figures.wrong.append(f"{what}: the engine was restarted {figures.restarts[what]} times")
    if told.wrong:
        figures.wrong.append(f"{what}: {told.wrong} answers were wrong")
    if told.refused:
        figures.wrong.append(f"{what}: refused: {dict(told.refused)}")
    if not told.answered:
        figures.wrong.append(f"{what}: nobody was answered")


def break_it(figures: Figures, live: Live, callers: Callers, where: str, within_s: float) -> None:
    """Every fault once, and each time back to answers."""
    for fault in FAULTS:
        took_s = figures.found_s[f"{fault}, {where}"] = found_s(live, fault, 2 * within_s)
        if took_s > within_s:
            figures.wrong.append(f"{fault}, {where}: found after {took_s:.1f} s only")
        ends = time.monotonic() + BACK_S
        while not callers.once().answered:
            if time.monotonic() > ends:
                figures.wrong.append(f"{fault}, {where}: no answer for {BACK_S:.0f} s after it was found")
                break


def watch_ready(figures: Figures, live: Live) -> None:
    """What it says, until the server ends."""
    while live.process.poll() is None:
        with contextlib.suppress(OSError, EOFError):
            figures.reasons.update(reasons(live))
        time.sleep(ASK_READY_S)


def check_said(figures: Figures, shortage: str) -> None:
    """Whether /readyz said that the engine was short of this."""
    if not any(SHORTAGES[shortage] in reason for reason in figures.reasons):
        figures.wrong.append(f"/readyz never said that the engine is starved: {SHORTAGES[shortage]}")


def measure(seconds: float, loops: int, say: Callable[[str], None]) -> Figures:
    """All of it."""
    figures = Figures()
    with serving(environment={"PYTHONPATH": str(BROKEN)}) as live:
        say("on a quiet machine")
        callers = Callers(live)
        under(figures, live, "quiet", lambda: callers.run(1, 2.0))
        break_it(figures, live, callers, "quiet", FOUND_QUIET_S)
        Thread(target=watch_ready, args=(figures, live), daemon=True).start()
        with hogs(loops):
            say(f"beside {loops} busy loops, {seconds:.0f} s")
            under(figures, live, "busy, one by one", lambda: callers.run(1, seconds / 2))
            under(figures, live, f"busy, {AT_ONCE} at once", lambda: callers.run(AT_ONCE, seconds / 2))
            say("breaking the engine beside them")
            break_it(figures, live, callers, "busy", FOUND_BUSY_S)
            say("starting another server beside them")
            figures.start_s = start_s()
        check_said(figures, "cpu")
        if figures.start_s is None:
            figures.wrong.append("a server that was started beside the loops did not become ready")
        try:
            with quota(list(live.pids().values()), SHARE):
                say(f"with a quota of {SHARE:.0%} of a CPU")
                part_s = seconds * QUOTA_PART / 2
                under(figures, live, "quota, one by one", lambda: callers.run(1, part_s))
                under(figures, live, f"quota, {AT_ONCE} at once", lambda: callers.run(AT_ONCE, part_s))
                break_it(figures, live, callers, "quota", FOUND_BUSY_S)
            check_said(figures, "quota")
        except NoQuota as reason:
            figures.no_quota = str(reason)
    return figures


def start_s() -> float | None:
    """Seconds until a new server is ready; None where it does not become so."""
    began = time.monotonic()
    try:
        with serving(start_s=READY_S):
            return time.monotonic() - began
    except RuntimeError:
        return None


def show(figures: Figures, console: Console) -> None:
    """Tables for people."""
    table = Table("", "answered", "late (504)", "wrong", "refused", "slowest", "restarts")
    for what, told in figures.told.items():
        refused = " ".join(f"{key}: {count}" for key, count in told.refused.items()) or "0"
        slowest = f"{told.slowest_s:.1f} s"
        restarts = str(figures.restarts[what])
        table.add_row(what, str(told.answered), str(told.late), str(told.wrong), refused, slowest, restarts)
    console.print(table)
    for fault, took_s in figures.found_s.items():
        console.print(f"{fault}: found after {took_s:.1f} s")
    if figures.start_s is not None:
        console.print(f"a start beside the loops took {figures.start_s:.1f} s")
    if figures.no_quota:
        console.print(f"not tried with a quota: {figures.no_quota}")
    for line in figures.wrong:
        console.print(line)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.starved", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of requests beside the loops")
    parser.add_argument("--loops", type=int, default=LOOPS, help="busy loops")
    parser.add_argument("--json", action="store_true", dest="as_json")
    told = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything that was started is ended
    console = Console(stderr=told.as_json)
    figures = measure(told.seconds, told.loops, lambda words: console.print(f"[dim]{words}[/dim]"))
    if told.as_json:
        print(msgspec.json.encode(figures).decode())
    else:
        show(figures, console)
        console.print(
            "Starved, the engine was slow and nothing else; stuck, it was replaced."
            if not figures.wrong
            else f"Not all held: {len(figures.wrong)} things did not."
        )
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
