"""Nodes that misbehave under load: `python -m bench.fault [--only MODE,...] [--quick] [--json]`."""

import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.fault import books, extras, pair
from bench.fault.cells import Cell, CellRunner, plan
from bench.fault.figures import Figures, Row, Saturated, Whole, in_a_line, set_bases, show
from bench.fault.load import MAX_TOKENS, CheckingClient, loading, made_pool
from bench.faultnode.modes import MODES
from bench.rig import fleet, ledger
from bench.rig.command import bench, check_names, model_folder, progress
from embedmesh.engine.tokens import ModelTokenizer

WIDTH = 170  # characters that the table needs
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


async def measure(only: str = "", quick: bool = False, keep: Path | None = None, gateway_options: str = "") -> Figures:
    """The whole run."""
    modes = [name for name in only.split(",") if name]
    check_names(modes, list(MODES))
    more = not only and not quick
    with tempfile.TemporaryDirectory(prefix="embedmesh-fault-") as scratch:
        options = tuple(gateway_options.split())
        return await run_cells(plan(modes, quick=quick), more, keep or Path(scratch), options)


async def run_cells(cells: Sequence[Cell], more: bool, folder: Path, options: tuple[str, ...]) -> Figures:
    """All cells, with files in `folder`; `more` is what is done to whole nodes. Raises CannotRun."""
    model = model_folder()
    pool = made_pool(ModelTokenizer(model, MAX_TOKENS))
    began = time.monotonic()
    rows: list[Row] = []
    wholes: list[Whole] = []
    saturated: list[Saturated] = []
    with progress() as bar:
        task = bar.add_task("starting", total=len(cells) + more * (len(LOSSES) + len(SATURATED)))
        async with fleet.running(folder, options) as nodes:
            client = CheckingClient(nodes.port, nodes.credentials.api_key, pool)
            async with loading(client, pool) as load:
                runner = CellRunner(nodes, load)
                await runner.begin()
                await load.second()  # warm
                load.records.clear()
                for cell, following in zip(cells, [*cells[1:], None], strict=True):
                    bar.update(task, description=f"{cell.name} {cell.share:g}")
                    rows.append(await runner.run(cell, following))
                    bar.console.print(in_a_line(rows[-1]), highlight=False, soft_wrap=True)
                    bar.advance(task)
                for name, number, dials_out, count in LOSSES if more else ():
                    bar.update(task, description=name)
                    wholes.append(await extras.lose(nodes, load, name, number, dials_out=dials_out, count=count))
                    bar.advance(task)
            for name, speed, size in SATURATED if more else ():
                bar.update(task, description=name)
                saturated.append(await extras.saturate(nodes, client, pool, runner.good, name, speed, size))
                bar.advance(task)
            client.close()
            nodes.gateway.stop()
            everything: list[Row | Whole] = [*rows, *wholes]
            open_holds = books.join(nodes, everything, load.records)
            logged = nodes.gateway.log.read_text(errors="replace")
            ledger_ok = ledger.check(nodes.data_dir)
        seconds = time.monotonic() - began
    for one in everything:
        one.users = []
    set_bases(rows)
    return Figures(
        seconds=seconds,
        load_average=os.getloadavg()[1],
        rows=rows,
        wholes=wholes,
        saturated=saturated,
        ledger_ok=ledger_ok,
        open_holds=open_holds,
        internal_errors=logged.count("internal error"),
        pair=await pair.measure() if more else None,
    )


if __name__ == "__main__":
    bench(
        measure,
        show=show,
        file="fault.json",
        width=WIDTH,
        only="modes, separated by commas",
        quick="every mode once, no more than that (4 minutes)",
        keep="an empty folder for logs and ledger (default: removed in the end)",
        gateway_options="such as `--hedge`, handed on",
    )
