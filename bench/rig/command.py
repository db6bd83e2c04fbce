"""The form of every bench's command: options, a progress bar, figures as tables or JSON, the verdict last.

Exit codes: 0 where every promise is kept, 1 where one is broken or the bench cannot run, 130 where it is interrupted.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec
import uvloop
from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.data import CHECKOUT, find_model_folder

RESULTS = CHECKOUT / "bench" / "results"
T = TypeVar("T")


class CannotRun(Exception):
    """Why a bench cannot run here, in words."""


class Judged(Protocol):
    """Figures that know which promises they break."""

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The options of `python -m NAME`: `--json`, and what the caller adds. The help is the docstring's first line."""
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=(doc or "").partition("\n")[0])
    made.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return made


def store_option(made: argparse.ArgumentParser, default: str = "sqlite") -> None:
    """Add `--store`."""
    made.add_argument(
        "--store", choices=("sqlite", "postgres"), default=default, help=f"which kind (default: {default})"
    )


def known_only(made: argparse.ArgumentParser, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that do not exist."""
    if unknown := [name for name in given if name not in known]:
        made.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a bench's `main` and exit with its code. SIGTERM interrupts it, so that its processes end with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main(sys.argv[1:])
    except CannotRun as why:
        print(f"bench: {why}", file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 130
    sys.exit(code)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` under uvloop. SIGINT and SIGTERM cancel it, so that its processes end with it."""

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await work

    return uvloop.run(cancellable())


def model_folder() -> Path:
    """The default model's files. Raises CannotRun."""
    folder = find_model_folder()
    if folder is None:
        raise CannotRun("the default model's files are missing; run `embedmesh setup` first")
    return folder


def progress() -> Progress:
    """A bar on standard error: what is done, how much of it, and how long it takes."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def track(items: Iterable[T], words: str) -> Iterable[T]:
    """The items, with a bar on standard error."""
    return rich_progress.track(items, words, console=Console(stderr=True))


def say(words: str) -> None:
    """A line for whoever watches: on standard error."""
    Console(stderr=True).print(words, markup=False, highlight=False, soft_wrap=True)


def wrong(said: Mapping[str, object]) -> list[str]:
    """The words whose condition is true: what does not hold."""
    return [words for words, condition in said.items() if condition]


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Iterable[object]], title: str = "") -> None:
    """A table whose first column is text, and whose others are figures."""
    table = Table(title=title or None)
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def save(name: str, data: bytes | str) -> Path:
    """Write `bench/results/NAME`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def finish(
    figures: Judged, show: Callable[[Any, Console], None], *, as_json: bool, file: str = "", width: int = 0
) -> int:
    """Print the figures and the verdict, and write them to `bench/results/FILE`, if named. Returns the exit code.

    `width` is the least number of characters that the tables need.
    """
    broken = figures.broken
    report = {"ok": not broken, "broken": broken, **msgspec.to_builtins(figures)}
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=1)
    if file:
        save(file, encoded)
    if as_json:
        print(encoded.decode())
    else:
        console = Console()
        console.width = max(console.width, width)
        show(figures, console)
        print("BROKEN: " + "; ".join(broken) if broken else "All promises kept.")
    return 1 if broken else 0
