"""What a gateway does under strain: `python -m bench.strain [overload] [stalled] [soak] [--json]`.

overload: five times as much as the nodes can do, for a minute; stalled: two thousand connections that say half of
something; soak: a million requests. All three where none is named (a quarter of an hour). Exit code 1 when a promise is
broken.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.fault.load import Pool
from bench.fault.rig import rigged
from bench.gateway.contenders import Contender, started
from bench.gateway.material import Material, build
from bench.strain.overload import Overload, overload
from bench.strain.soak import Soak, soak
from bench.strain.stalled import Stalled, stalled
from embedmesh.catalogue import load_catalogue
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.provision.assets import assets_dir
from tests.data import find_model_folder

PARTS = ("overload", "stalled", "soak")
MAX_TOKENS = 256  # of the model


class Figures(msgspec.Struct, frozen=True):
    """What was measured; None for what was not asked for."""

    overload: Overload | None = None
    stalled: Stalled | None = None
    soak: Soak | None = None

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        return [words for part in (self.overload, self.stalled, self.soak) if part is not None for words in part.broken]


def measure(parts: Sequence[str], seconds: float, requests: int, console: Console) -> Figures:
    """Some of it, in a folder that is removed in the end."""
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="embedmesh-strain-") as name, Progress(*columns, console=console) as bar:
        folder = Path(name)
        found: dict[str, Any] = {}
        if "overload" in parts:
            (folder / "overload").mkdir()
            found["overload"] = uvloop.run(_overload(folder / "overload", seconds, bar))
        if "stalled" in parts or "soak" in parts:
            model = load_catalogue(None, assets=assets_dir()).models[0]
            material = Material(folder / "material", model)
            with started("hold", build(), material, folder / "gateway") as gateway:
                found |= _of_one_gateway(gateway, parts, requests, bar)
        return Figures(**found)


async def _overload(folder: Path, seconds: float, bar: Progress) -> Overload:
    model_folder = find_model_folder()
    assert model_folder is not None
    pool = Pool(ModelTokenizer(model_folder, MAX_TOKENS))
    async with rigged(folder) as rig:
        return await overload(rig, pool, seconds, bar)


def _of_one_gateway(gateway: Contender, parts: Sequence[str], requests: int, bar: Progress) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "stalled" in parts:
        found["stalled"] = stalled(gateway, bar)
    if "soak" in parts:
        found["soak"] = soak(gateway, requests, bar)
    return found


def show(figures: Figures, console: Console) -> None:
    """The figures for a person."""
    table = Table("what", "figure")
    if (over := figures.overload) is not None:
        table.add_row(
            "capacity", f"{over.capacity:.0f} requests/s; asked for {over.asked:.0f} for {over.seconds:.0f} s"
        )
        table.add_row("served meanwhile", f"{over.served:.0f} requests/s: {over.served / over.capacity:.2f} of it")
        table.add_row("refusals, p99", f"{1000 * over.refused_p99_s:.1f} ms")
        table.add_row(
            "the polite account",
            f"{over.polite_served:,} of {over.polite_asked:,} served, p99 {1000 * over.polite_p99_s:.0f} ms",
        )
        table.add_row("as before again after", f"{over.recovered_s:.1f} s")
        table.add_row("all answers", ", ".join(f"{said}: {count:,}" for said, count in over.said.items()))
    if (stall := figures.stalled) is not None:
        table.add_row("others alone", f"p50 {stall.alone_p50_ms:.1f} ms, p99 {stall.alone_p99_ms:.1f} ms")
        table.add_row(f"beside {stall.connections:,} stalled", f"p50 {stall.p50_ms:.1f} ms, p99 {stall.p99_ms:.1f} ms")
        table.add_row("memory then", f"{stall.rss_mb:.0f} MB")
        table.add_row("all of those closed after", f"{stall.closed_s:.0f} s")
    if (long := figures.soak) is not None:
        first, last = long.looks[0], long.looks[-1]
        table.add_row("requests", f"{long.requests:,} in {long.seconds:.0f} s, {long.not_right} not right")
        table.add_row("memory", f"{first.rss_mb:.0f} MB after {first.requests:,}, {last.rss_mb:.0f} MB at the end")
        table.add_row("growth for 100,000", f"{long.growth_mb:.2f} MB")
        table.add_row("open files", f"{long.files:+}")
    console.print(table)


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.strain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none is all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the soak")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    asked: Any = parser.parse_args(arguments)
    parts = asked.parts or PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}")
    if "overload" in parts and find_model_folder() is None:
        print("the default model's files are not here; run `embedmesh setup` first", file=sys.stderr)
        return 1
    try:
        figures = measure(parts, asked.seconds, asked.requests, Console(stderr=True))
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 130
    if asked.json:
        print(msgspec.json.encode({"ok": not figures.broken, "broken": figures.broken, "figures": figures}).decode())
    else:
        show(figures, Console())
        print("BROKEN: " + "; ".join(figures.broken) if figures.broken else "All promises kept.")
    return 1 if figures.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
