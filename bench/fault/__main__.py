"""Nodes that misbehave under load: `python -m bench.fault [--only MODE,...] [--quick] [--json]`."""

import os
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.fault import extras, pair
from bench.fault.cells import Cell, CellRunner, plan
from bench.fault.figures import CellRow, Figures, Saturated, Whole, in_a_line, set_bases, show
from bench.fault.load import MAX_TOKENS, CheckingClient, Record, loading, made_pool
from bench.faultnode.modes import MODES
from bench.rig import fleet, ledger
from bench.rig.command import bench, check_names, model_folder, progress
from bench.rig.fleet import Fleet
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.settings import secret_path, store_path
from embedmesh.storage.secrets.secret import hash_user, read_secret

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
    rows: list[CellRow] = []
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
            everything: list[CellRow | Whole] = [*rows, *wholes]
            open_holds = join_ledger(nodes, everything, load.records)
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


def join_ledger(fleet: Fleet, found: Iterable[CellRow | Whole], records: Sequence[Record]) -> int:
    """Compare the ledger with the records: put into each figure how many of its requests were charged, and how many
    wrongly. Returns how many holds are still open."""
    usage, opened = ledger.read(
        store_path(fleet.data_dir),
        "SELECT user_hash, cost FROM usage",
        "SELECT hold_id FROM holds WHERE ended_by IS NULL",
    )
    charges: defaultdict[str, list[int]] = defaultdict(list)
    for user_hash, cost in usage:
        charges[user_hash].append(cost)
    secret = read_secret(secret_path(fleet.data_dir))
    by_user = {each.user: each for each in records}
    for one in found:
        for user in one.users:
            costs = charges[hash_user(secret, user)]
            one.charged += len(costs)
            one.charged_wrongly += costs != ([by_user[user].cost] if by_user[user].served else [])
    return len(opened)


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
