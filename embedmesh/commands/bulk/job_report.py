"""What a job prints while it goes and when it ends: a progress bar, the first refusals, a summary."""

import logging
import math
import time
from typing import Any, Self

import click
import rich.progress

from embedmesh.bulk.manifest import Manifest
from embedmesh.bulk.units import JobUnit
from embedmesh.commands.bulk.report import NOTHING_DONE, REFUSALS_SHOWN_MAX, WAITING_EVERY_S, RunBar
from embedmesh.commands.output import print_json
from embedmesh.rules.money import format_usd


class JobReport(logging.Handler):
    """Counts what is committed and draws it on stderr. `total_bytes` is None where the size of an input is not known.

    As a handler of the log it shows below the bar why workers of this process wait.
    """

    def __init__(self, manifest: Manifest, output: str, total_bytes: int | None) -> None:
        super().__init__(logging.INFO)
        self.bar = RunBar(
            "{task.fields[texts]:,} texts, {task.fields[rate]:,.0f}/s",
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._task = self.bar.add_task("", total=total_bytes, texts=0, rate=0.0)
        self._manifest = manifest
        self._output = output
        self._began = time.monotonic()
        self._size = 0
        self._shown = 0
        self._waiting_said_at = -math.inf
        self._before = manifest.texts, manifest.refused
        self._cost_before, self._tokens = manifest.cost_nanousd, 0
        self._log = logging.getLogger("embedmesh.bulk")
        if manifest.texts:
            self.bar.say(f"continuing: {manifest.texts:,} texts are done")

    def __enter__(self) -> Self:
        self._log.setLevel(logging.INFO)
        self._log.addHandler(self)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self._log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """A worker waits."""
        self.bar.waiting = record.getMessage()
        now = time.monotonic()
        if self.bar.disable and now - self._waiting_said_at >= WAITING_EVERY_S:
            self._waiting_said_at = now
            self.bar.say(self.bar.waiting)

    def was_done(self, unit: JobUnit) -> None:
        """An earlier run has committed it."""
        self._advance(unit.size)

    def committed(self, row: dict[str, Any], size: int) -> None:
        """A unit is done."""
        self.bar.waiting = ""
        self._tokens += row["tokens"]
        for number, error in row["refusals"]:
            if self._shown < REFUSALS_SHOWN_MAX:
                self._shown += 1
                self.bar.say(f"row {number + 1:,}: {error}")
        self._advance(size)

    def stopped(self, why: str) -> None:
        """Print why the job ends early, how to go on, and what is still set aside for it."""
        held = self._manifest.ledger_jobs[-1:]
        hint = "".join(
            f" A larger --budget goes on, too; embedmesh jobs cancel {job['ledger_job']} ends it." for job in held
        )
        self.bar.say(f"embedmesh: {why.rstrip('.')}. Run the same command again to continue.{hint}")

    def summary(self, ended: str, as_json: bool, charged_nanousd: int | None) -> None:
        """Print what was done, on stderr; as JSON on stdout. `charged_nanousd` is what the ledger says of all runs."""
        done = self._manifest
        texts, refused = done.texts - self._before[0], done.refused - self._before[1]
        cost = done.cost_nanousd - self._cost_before
        seconds = time.monotonic() - self._began
        if as_json:
            print_json(
                {
                    "ended": ended,
                    "output": self._output,
                    "units": len(done.keys),
                    "texts_before": self._before[0],
                    "refused_before": self._before[1],
                    "texts": texts,
                    "refused": refused,
                    "tokens": self._tokens,
                    "cost_nanousd": cost,
                    "charged_nanousd": charged_nanousd,
                    "seconds": round(seconds, 3),
                }
            )
        elif not texts and ended == "finished":
            but = f", {done.refused:,} of them refused" if done.refused else ""
            click.echo(f"already complete: {done.texts:,} texts{but}", err=True)
        elif ended not in NOTHING_DONE:
            in_all = "" if charged_nanousd is None else f"; for the job in all {format_usd(charged_nanousd)}"
            click.echo(
                f"{texts:,} texts in {seconds:.1f} s ({texts / max(seconds, 0.001):,.0f}/s):"
                f" {texts - refused:,} embedded, {refused:,} refused, {self._tokens:,} tokens,"
                f" {format_usd(cost)}{in_all}",
                err=True,
            )

    def _advance(self, size: int) -> None:
        self._size += size
        texts = self._manifest.texts - self._before[0]
        rate = texts / max(time.monotonic() - self._began, 0.001)
        self.bar.update(self._task, completed=self._size, texts=texts, rate=rate)
