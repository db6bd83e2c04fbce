"""The command: `python -m bench.fault [--only MODE,...] [--quick] [--json]`."""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.fault import books, extras, pair
from bench.fault.cells import Bench, plan
from bench.fault.figures import Figures, Row, Saturated, Whole, as_json, line, set_bases, show
from bench.fault.load import Client, Load, Mix, Pool, second
from bench.fault.rig import HOST, rigged
from bench.faultnode.modes import MODES
from embedmesh.engine.tokens import ModelTokenizer
from tests.data import find_model_folder

WIDTH = 170  # characters that the table needs
MAX_TOKENS = 256  # of the default model
RESULTS = Path(__file__).parent.parent / "results"
LOSSES = (
    ("kill -9, with an address", signal.SIGKILL, False, 1),
    ("kill -9, dials out", signal.SIGKILL, True, 1),
    ("kill -9, three of four at once", signal.SIGKILL, False, 3),
    ("SIGTERM, with an address", signal.SIGTERM, False, 1),
    ("SIGTERM, dials out", signal.SIGTERM, True, 1),
)
SATURATED = (
    ("as fast as the wire, 1 text", extras.FAST, 1),
    ("as fast as the wire, 32 texts", extras.FAST, 32),
    ("15,000 tokens/s, 1 text", extras.REAL, 1),
)


@asynccontextmanager
async def loading(client: Client, pool: Pool) -> AsyncIterator[Load]:
    """The load, while this is open."""
    load = Load(client, second(pool, Mix()))
    load.start()
    try:
        yield load
    finally:
        await load.stop()


async def measure(only: list[str], place: Path, *, quick: bool, options: tuple[str, ...], console: Console) -> Figures:
    """The whole run, with its files in `place`. Raises RuntimeError where something of our own does not start."""
    folder = find_model_folder()
    assert folder is not None
    pool = Pool(ModelTokenizer(folder, MAX_TOKENS))
    began = time.monotonic()
    cells = plan(only, quick=quick)
    more = not only and not quick
    rows: list[Row] = []
    wholes: list[Whole] = []
    saturated: list[Saturated] = []
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console)
    with bar:
        task = bar.add_task("starting", total=len(cells) + more * (len(LOSSES) + len(SATURATED)))
        async with rigged(place, options) as rig:
            client = Client(HOST, rig.port, rig.credentials.api_key, pool)
            async with loading(client, pool) as load:
                bench = Bench(rig, load)
                await bench.begin()
                await load.second()  # warm
                load.records.clear()
                for cell, following in zip(cells, [*cells[1:], None], strict=True):
                    bar.update(task, description=f"{cell.name} {cell.share:g}")
                    rows.append(await bench.run(cell, following))
                    bar.console.print(line(rows[-1]), highlight=False, soft_wrap=True)
                    bar.advance(task)
                for name, number, dials_out, count in LOSSES if more else ():
                    bar.update(task, description=name)
                    wholes.append(await extras.lose(rig, load, name, number, dials_out=dials_out, count=count))
                    bar.advance(task)
            for name, speed, size in SATURATED if more else ():
                bar.update(task, description=name)
                saturated.append(await extras.saturate(rig, client, pool, bench.good, name, speed, size))
                bar.advance(task)
            client.close()
            await rig.stop()
            checked = await books.check(rig)
            books.join(rig, [*rows, *wholes], load.records)
            logged = rig.log.read_text(errors="replace")
        seconds = time.monotonic() - began
    set_bases(rows)
    return Figures(
        seconds=seconds,
        load_average=os.getloadavg()[1],
        rows=rows,
        wholes=wholes,
        saturated=saturated,
        ledger_ok=checked.ok,
        open_holds=checked.open,
        internal_errors=logged.count("internal error"),
        pair=await pair.measure(folder, pair.TEXTS, console) if more else None,
    )


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.fault", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="modes, separated by commas")
    parser.add_argument("--quick", action="store_true", help="every mode once, no more than that (4 minutes)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--keep", type=Path, help="an empty folder for logs and ledger (default: removed in the end)")
    parser.add_argument("--gateway-options", default="", help="such as `--hedge`, handed on")
    asked: Any = parser.parse_args(arguments)
    only = [name for name in asked.only.split(",") if name]
    if unknown := [name for name in only if name not in MODES]:
        parser.error(f"there is no mode {', '.join(unknown)}; `python -m bench.faultnode --help` lists them")
    if find_model_folder() is None:
        print("the default model's files are not here; run `embedmesh setup` first", file=sys.stderr)
        return 1

    async def run() -> Figures:
        me = asyncio.current_task()
        assert me is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, me.cancel)
        options = tuple(asked.gateway_options.split())
        with tempfile.TemporaryDirectory(prefix="embedmesh-fault-") as folder:
            place = asked.keep or Path(folder)
            return await measure(only, place, quick=asked.quick, options=options, console=Console(stderr=True))

    try:
        figures = uvloop.run(run())
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 130
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fault.json").write_bytes(msgspec.json.encode(as_json(figures)))
    if asked.json:
        print(msgspec.json.encode(as_json(figures)).decode())
    else:
        wide = Console()
        wide.width = max(wide.width, WIDTH)
        show(figures, wide)
    return 1 if figures.missed() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
