"""The manifest of a job: a JSON line for each unit that is done. That line is the unit's commit.

The first line says what the job is. Others say which job at the gateway it is charged to, and that all is done. Every
line is on disk before the next unit is begun; a last line that was torn is cut off. There is no key in it, and no text.
"""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from embedmesh.bulk.units import Settings
from embedmesh.bulk.usage import WrongUsage

MANIFEST_VERSION = 1
HERE = " Give the same command, another --output, or --overwrite."


class Manifest:
    """Open for one driver: a second one is refused. `keys` are those of the units that are done, by their numbers.

    `texts`, `refused` and `cost_nanousd` add them up. `ledger_jobs` are the jobs at the gateway, the last one in use.
    `name` is the job's own, by which it knows them. `is_leftover`: another job was here, and did nothing.
    """

    def __init__(self, file: Path, settings: Settings, *, overwrite: bool) -> None:
        """Raises WrongUsage where it is of another job, damaged, or in use; OSError."""
        self.file = file
        self.keys: dict[int, str] = {}
        self.parts: dict[int, str] = {}
        self.texts = self.refused = self.cost_nanousd = 0
        self.width: int | None = None
        self.ledger_jobs: list[dict[str, Any]] = []
        self.is_finished = self.is_leftover = False
        self.name = secrets.token_hex(8)
        self._settings = settings
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lines = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            self._lock()
            if overwrite:
                self._forget()
            self.is_new = not self._read()
        except BaseException:
            self._lines.close()
            raise

    def begin(self) -> None:
        """The output may be used: write down what the job is, if it is new."""
        if self.is_new:
            self.note({"version": MANIFEST_VERSION, "name": self.name, "settings": self._settings})
            self.is_new = False

    def commit(self, row: dict[str, Any]) -> None:
        """A unit is done. Raises OSError."""
        self.note(row)
        self._take(row)

    def note(self, line: dict[str, Any]) -> None:
        """Append a line, and wait until it is on disk. Raises OSError."""
        self._lines.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def charged_to(self, job: str, budget_nanousd: int) -> None:
        """From now on requests name this job at the gateway."""
        self.ledger_jobs.append({"ledger_job": job, "budget_nanousd": budget_nanousd})
        self.note(self.ledger_jobs[-1])

    def finish(self, units: int) -> None:
        """All is done."""
        self.note({"finished": units})
        self.is_finished = True

    def close(self) -> None:
        """Another may have it. One that has not begun is removed."""
        if self.is_new:
            self.file.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk was reported already; a line that is torn is cut off by the next run
            self._lines.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WrongUsage(f"Another `embedmesh embed` writes {self.file}. Wait for it to end.") from None

    def _forget(self) -> None:
        """Begin anew. Raises WrongUsage for a file of another kind, which somebody may need."""
        first = self._lines.readline()
        if first and b'"settings"' not in first:
            raise WrongUsage(f"{self.file} is no manifest of a job.{HERE}")
        self._lines.truncate(0)
        self._lines.seek(0)

    def _read(self) -> bool:
        """Whether there is a job that goes on. The file is then cut off after its last whole line."""
        whole = 0
        head: dict[str, Any] = {}
        for number, line in enumerate(self._lines):
            if not line.endswith(b"\n"):
                break
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                raise WrongUsage(f"{self.file} is damaged in line {number + 1:,}.{HERE}") from None
            whole += len(line)
            if number == 0:
                head = row
            elif "unit" in row:
                self._take(row)
            elif "ledger_job" in row:
                self.ledger_jobs.append(row)
            elif "finished" in row:
                self.is_finished = True
        if whole and self._is_other(head):
            whole, self.is_leftover = 0, True  # nothing was done: the command was wrong, and is another now
        self._lines.truncate(whole)
        self._lines.seek(whole)
        return whole > 0

    def _is_other(self, head: dict[str, Any]) -> bool:
        """Whether it is of another job that has done nothing. Raises WrongUsage where that has done something."""
        before = head.get("settings")
        if not isinstance(before, dict) or head.get("version") != MANIFEST_VERSION:
            raise WrongUsage(f"{self.file} is no manifest of a job.{HERE}")
        other = [name for name in before.keys() | self._settings.keys() if before.get(name) != self._settings.get(name)]
        if not other:
            self.name = str(head.get("name"))
            return False
        if self.keys or self.ledger_jobs:
            raise WrongUsage(f"The job of {self.file} was begun with another {' and '.join(sorted(other))}.{HERE}")
        return True

    def _take(self, row: dict[str, Any]) -> None:
        number = row["unit"]
        if number in self.keys:
            return  # an engine that does a unit twice counts once
        self.keys[number] = row["key"]
        self.parts[number] = row["output"]
        self.texts += row["rows"]
        self.refused += row["refused"]
        self.cost_nanousd += row["cost_nanousd"]
        self.width = self.width or row["width"] or None
