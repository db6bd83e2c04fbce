"""What a run prints while it goes and when it ends: a progress bar, the first refusals, a summary."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import click
import rich.console
import rich.progress
import rich.text

from embedmesh.bulk.lines import LineBatch, Refusal
from embedmesh.commands.bulk.client import Vector
from embedmesh.commands.output import print_json
from embedmesh.commands.progress import ProgressBar
from embedmesh.rules.money import format_usd

NOTHING_DONE = ("refused", "unreachable")  # there is nothing to sum up
REFUSALS_SHOWN_MAX = 20  # a screenful; the output holds them all
WAITING_EVERY_S = 60.0  # without a terminal: a line a minute of a server that is away


class RunBar(ProgressBar):
    """With one more line below while requests wait."""

    waiting = ""

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        yield from super().get_renderables()
        if self.waiting:
            yield rich.text.Text(self.waiting, no_wrap=True, overflow="ellipsis")


class RunReport:
    """Counts what is written and draws it on stderr: lines and lines a second, and by bytes of input how far it is.

    `total_bytes` is None where the input is a pipe, `target` where the output is stdout.
    Without a terminal it prints refusals and pauses only.
    """

    def __init__(self, total_bytes: int | None, target: Path | None) -> None:
        self.bar = RunBar(
            "{task.fields[lines]:,} lines, {task.fields[rate]:,.0f}/s",
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._task = self.bar.add_task("", total=total_bytes, lines=0, rate=0.0)
        self._began = time.monotonic()
        self._target = target
        self._waiting_said_at = -math.inf
        self._resumed, self._refused_before = 0, 0
        self._tokens = 0
        self._cost_nanousd = 0
        self._first: list[tuple[int, Refusal]] = []  # the first refusals, with their line numbers from 1
        self.lines = 0
        self.embedded = 0
        self.refused = 0

    def __enter__(self) -> "RunReport":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def waiting(self, why: str, pause_s: float, requests: int) -> None:
        """One line for all that wait: below the bar, each in place of the last; else one a minute."""
        many = f" ({requests} requests waiting)" if requests > 1 else ""
        line = f"{why}; trying again in {pause_s:.0f} s{many}" if pause_s >= 1 else f"{why}; trying again{many}"
        self.bar.waiting = line
        now = time.monotonic()
        if self.bar.disable and now - self._waiting_said_at >= WAITING_EVERY_S:
            self._waiting_said_at = now
            self.bar.say(line)

    def begin(self, resumed_lines: int, refused_before: int) -> None:
        """Print where a run that was stopped continues."""
        self._resumed, self._refused_before = resumed_lines, refused_before
        if resumed_lines:
            before = f" ({refused_before:,} lines before it were refused)" if refused_before else ""
            self.bar.say(f"continuing at line {resumed_lines + 1:,}{before}")

    def stopped_before(self, line: int, why: str) -> None:
        """Print why the run ends early and how to continue; `line` counts from 0."""
        where = f" to continue at line {line + 1:,}" if line else ""
        hint = f" Run the same command again{where}." if self._target else ""
        self.bar.say(f"embedmesh: {why.rstrip('.')}.{hint}")

    def complete_before(self, lines: int, refused: int, as_json: bool) -> None:
        """Print that an earlier run has done it all."""
        self._resumed, self._refused_before = lines, refused
        if as_json:
            self.summary("finished", as_json=True)
            return
        but = f", {refused:,} of them refused" if refused else ""
        click.echo(f"already complete: {lines:,} lines{but}", err=True)

    def paid(self, tokens: int, cost_nanousd: int) -> None:
        """Add up what requests cost: one was answered, so that nothing is waited for as far as we know."""
        self.bar.waiting = ""
        self._tokens += tokens
        self._cost_nanousd += cost_nanousd

    def written(self, batch: LineBatch, outcomes: list[Vector | Refusal]) -> None:
        """Take note of a batch whose rows are in the output."""
        self.lines += len(outcomes)
        for number, outcome in enumerate(outcomes, batch.first + 1):
            if not isinstance(outcome, Refusal):
                self.embedded += 1
                continue
            self.refused += 1
            if len(self._first) < REFUSALS_SHOWN_MAX:
                self._first.append((number, outcome))
                here = "; here: --truncate end" if "truncate" in outcome.message else ""  # the API's word for it
                self.bar.say(f"line {number:,}: {outcome.message} ({outcome.code}{here})")
        self.bar.update(self._task, completed=batch.end_bytes, lines=self.lines, rate=self._rate())

    def summary(self, ended: str, as_json: bool) -> None:
        """Print what was done, on stderr; as JSON on stdout, unless the vectors are there."""
        if as_json:
            value = {
                "ended": ended,
                "output": str(self._target) if self._target else None,
                "lines_before": self._resumed,
                "refused_before": self._refused_before,
                "lines": self.lines,
                "embedded": self.embedded,
                "refused": self.refused,
                "refusals": [
                    {"line": number, "code": refusal.code, "message": refusal.message}
                    for number, refusal in self._first
                ],
                "tokens": self._tokens,
                "cost_nanousd": self._cost_nanousd,
                "seconds": round(self._seconds(), 3),
            }
            print_json(value, err=self._target is None)
            return
        if ended in NOTHING_DONE:
            return
        if self.refused > len(self._first):
            click.echo(f"... and {self.refused - len(self._first):,} more refused lines", err=True)
        click.echo(
            f"{self.lines:,} lines in {self._seconds():.1f} s ({self._rate():,.0f}/s): {self.embedded:,} embedded,"
            f" {self.refused:,} refused, {self._tokens:,} tokens, {format_usd(self._cost_nanousd)}",
            err=True,
        )

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _rate(self) -> float:
        return self.lines / max(self._seconds(), 0.001)
