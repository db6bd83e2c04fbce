"""The form of every bench's command: options, a progress bar, figures as tables or JSON, the verdict last.

Exit codes: 0 where every promise is kept, 1 where one is broken or the bench cannot run, 130 where it is interrupted.
"""

import argparse
import asyncio
import inspect
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Protocol, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import uvloop
from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.rig.tables import print_figures
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


def bench(
    measure: Callable[..., Any],
    *,
    show: Callable[[Any, Console], None] = print_figures,
    file: str = "",
    width: int = 120,
    **help_: str,
) -> NoReturn:
    """Run `measure` as a command, whose options are its parameters, and exit. SIGTERM interrupts it, so that its
    processes end with it.

    `help_` has a sentence for some options. `measure` returns figures (see Judged), or a coroutine for them. They are
    shown by `show`, whose tables need `width` characters, and are written to `bench/results/FILE`, if that is named.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        made = options_of(measure, help_)
        made.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        options = given(made)
        as_json = options.pop("json")
        figures = measure(**options)
        code = finish(run_async(figures) if inspect.iscoroutine(figures) else figures, show, as_json, file, width)
    except CannotRun as why:
        print(f"bench: {why}", file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 130
    sys.exit(code)


def options_of(work: Callable[..., Any], help_: Mapping[str, str]) -> argparse.ArgumentParser:
    """One option for each parameter: its type and its default. A parameter without a default is a list of names."""
    module = inspect.getmodule(work)
    assert module is not None and module.__spec__ is not None
    name, doc = module.__spec__.name.removesuffix(".__main__"), module.__doc__ or ""
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=doc.partition("\n")[0])
    hints = get_type_hints(work)
    for parameter in inspect.signature(work).parameters.values():
        words, default = help_.get(parameter.name), parameter.default
        if default is parameter.empty:
            made.add_argument(parameter.name, nargs="*", metavar="NAME", help=words)
            continue
        option: dict[str, Any] = {"help": f"{words} (default: {default})" if words and default else words}
        (kind,) = (each for each in _alternatives(hints[parameter.name]) if each is not NoneType)
        if kind is bool:
            option |= {"action": "store_true", "default": None}
        elif get_origin(kind) is Literal:
            option["choices"] = get_args(kind)
        elif get_origin(kind) is not None:
            option |= {"action": "extend", "nargs": "*", "type": get_args(kind)[0]}
        else:
            option["type"] = kind
        made.add_argument(f"--{parameter.name.rstrip('_').replace('_', '-')}", dest=parameter.name, **option)
    return made


def given(made: argparse.ArgumentParser) -> dict[str, Any]:
    """The options of the command line; the parameters' own defaults are for those that are left out."""
    return {name: value for name, value in vars(made.parse_args()).items() if value is not None}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is UnionType else (hint,)


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Raises CannotRun for names that do not exist."""
    if unknown := [name for name in names if name not in known]:
        raise CannotRun(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` under uvloop. SIGINT and SIGTERM cancel it, so that its processes end with it."""

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await work

    try:
        return uvloop.run(cancellable())
    finally:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `bench` has set it


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
    """A line on standard error."""
    Console(stderr=True).print(words, markup=False, highlight=False, soft_wrap=True)


def wrong(conditions: Mapping[str, object]) -> list[str]:
    """The words whose condition is true: what does not hold."""
    return [words for words, condition in conditions.items() if condition]


def save(name: str, data: bytes | str) -> Path:
    """Write `bench/results/NAME`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def finish(figures: Judged, show: Callable[[Any, Console], None], as_json: bool, file: str, width: int) -> int:
    """Print and write the figures and the verdict. Returns the exit code."""
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
