"""A machine that is busy with other things: `python -m bench.starved [--seconds N] [--loops N] [--json]`.

A real `serve` with the default model, and 24 busy loops beside it, each in a session of its own. Callers send 64 texts
a request, one request after another and then 8 at once, and check every vector. What must hold:

* every answer is right, the engine is never restarted, no caller is refused: a 504 only past the request's own time;
* `/readyz` says that the engine is starved, and of what;
* an engine that is stopped, runs round and round or hangs is found within 15 s, and within 5 s on a quiet machine;
* a server that is started meanwhile becomes ready;
* the same with a CPU quota in place of the loops, where this machine lets us set one.

The last line is the verdict; the exit code is 0 when all of it held.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from bench.rig.command import CannotRun, bench, model_folder, say
from bench.rig.live import Live, serving
from bench.rig.processes import meanwhile, wait_for
from bench.starved.hogs import NoQuota, hogs, quota
from bench.starved.load import FAULTS, Answers, BulkCallers, found_s, reasons, starts
from embedmesh.rules.nodes import SHORTAGES

LOOPS = 24
SECONDS = 180.0
AT_ONCE = 8
FOUND_QUIET_S, FOUND_BUSY_S = 5.0, 15.0
SHARE = 0.1  # of one CPU: as much as the loops leave
QUOTA_PART = 0.25  # of the seconds
READY_S = 300.0  # for a start beside the loops: it takes a few seconds of CPU time, and gets a twelfth of a core
BACK_S = 60.0
READY_POLL_S = 2.0
BROKEN = Path(__file__).parent / "broken"


class Figures(msgspec.Struct):
    """What was measured, in seconds. `no_quota` says why nothing was measured with a quota."""

    answers: dict[str, Answers] = {}
    restarts: dict[str, int] = {}
    found_s: dict[str, float] = {}
    reasons: set[str] = set()  # in the replies of /readyz
    start_s: float | None = None
    no_quota: str = ""
    broken: list[str] = []


def under(figures: Figures, live: Live, what: str, work: Callable[[], Answers]) -> None:
    """Work during which nothing may go wrong."""
    before = starts(live)
    answers = figures.answers[what] = work()
    restarts = figures.restarts[what] = starts(live) - before
    if restarts:
        figures.broken.append(f"{what}: the engine was restarted {restarts} times")
    if answers.wrong:
        figures.broken.append(f"{what}: {answers.wrong} answers were wrong")
    if answers.refused:
        figures.broken.append(f"{what}: refused: {dict(answers.refused)}")
    if not answers.right:
        figures.broken.append(f"{what}: no request was answered")


def break_it(figures: Figures, live: Live, callers: BulkCallers, where: str, within_s: float) -> None:
    """Every fault once, and each time back to answers."""
    for fault in FAULTS:
        took_s = figures.found_s[f"{fault}, {where}"] = found_s(live, fault, 2 * within_s)
        if took_s > within_s:
            figures.broken.append(f"{fault}, {where}: found after {took_s:.1f} s only")
        if not wait_for(lambda: callers.run(1, 0.0).right, BACK_S):
            figures.broken.append(f"{fault}, {where}: no answer for {BACK_S:.0f} s after it was found")


def check_said(figures: Figures, shortage: str) -> None:
    """Note whether /readyz said that the engine was short of this."""
    if not any(SHORTAGES[shortage] in reason for reason in figures.reasons):
        figures.broken.append(f"/readyz never said that the engine is starved: {SHORTAGES[shortage]}")


def measure(seconds: float = SECONDS, loops: int = LOOPS) -> Figures:
    """All of it."""
    model_folder()
    figures = Figures()

    def watch_ready(stop: threading.Event) -> None:
        while not stop.wait(READY_POLL_S):
            with suppress(OSError, EOFError):
                figures.reasons.update(reasons(live))

    with serving(environment={"PYTHONPATH": str(BROKEN)}) as live:
        say("on a quiet machine")
        callers = BulkCallers(live)
        under(figures, live, "quiet", lambda: callers.run(1, 2.0))
        break_it(figures, live, callers, "quiet", FOUND_QUIET_S)
        with meanwhile(watch_ready):
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
                figures.broken.append("a server that was started beside the loops did not become ready")
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
    """Seconds until a new server is ready; None where it never is."""
    began = time.monotonic()
    try:
        with serving(start_s=READY_S):
            return time.monotonic() - began
    except CannotRun:
        return None


if __name__ == "__main__":
    bench(measure, seconds="of requests beside the loops", loops="busy loops")
