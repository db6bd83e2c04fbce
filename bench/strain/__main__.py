"""What a gateway does under strain: `python -m bench.strain [overload] [stalled] [soak] [--json]`.

overload: five times as much as the nodes can do, for a minute; stalled: two thousand connections that send half of
something; soak: a million requests. All three where none is named (a quarter of an hour). Exit code 1 when a promise is
broken.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from bench.fault.load import MAX_TOKENS, made_pool
from bench.gateway.contenders import started
from bench.gateway.material import made_material
from bench.rig import fleet
from bench.rig.command import finish, known_only, model_folder, parser, print_table, progress, run, run_async
from bench.strain.overload import Overload, overload
from bench.strain.soak import GatewaySoak, soak
from bench.strain.stalled import Stalled, stalled
from embedmesh.engine.tokens import ModelTokenizer

PARTS = ("overload", "stalled", "soak")


class Figures(msgspec.Struct, frozen=True):
    """What was measured; None for a part that was not chosen."""

    overload: Overload | None = None
    stalled: Stalled | None = None
    soak: GatewaySoak | None = None

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        return [words for part in (self.overload, self.stalled, self.soak) if part is not None for words in part.broken]


def measure(parts: Sequence[str], seconds: float, requests: int) -> Figures:
    """Some of it, in a folder that is removed in the end."""
    found: dict[str, Any] = {}
    with progress() as bar:
        if "overload" in parts:
            found["overload"] = run_async(_overload(seconds, bar))
        if "stalled" in parts or "soak" in parts:
            with made_material() as material, started("hold", material) as gateway:
                if "stalled" in parts:
                    found["stalled"] = stalled(gateway, bar)
                if "soak" in parts:
                    found["soak"] = soak(gateway, requests, bar)
    return Figures(**found)


async def _overload(seconds: float, bar: Progress) -> Overload:
    pool = made_pool(ModelTokenizer(model_folder(), MAX_TOKENS))
    with tempfile.TemporaryDirectory(prefix="embedmesh-strain-") as folder:
        async with fleet.running(Path(folder)) as nodes:
            return await overload(nodes, pool, seconds, bar)


def show(figures: Figures, console: Console) -> None:
    """The figures for a person."""
    rows: dict[str, str] = {}
    if (over := figures.overload) is not None:
        rows["capacity"] = f"{over.capacity:.0f} requests/s; {over.sent:.0f} were sent for {over.seconds:.0f} s"
        rows["served meanwhile"] = f"{over.served:.0f} requests/s: {over.served / over.capacity:.2f} of it"
        rows["refusals, p99"] = f"{1000 * over.refused_p99_s:.1f} ms"
        polite = f"{over.polite_served:,} of {over.polite_sent:,} served"
        rows["the polite account"] = f"{polite}, p99 {1000 * over.polite_p99_s:.0f} ms"
        rows["as before again after"] = f"{over.recovered_s:.1f} s"
        rows["all answers"] = ", ".join(f"{outcome}: {count:,}" for outcome, count in over.outcomes.items())
    if (stall := figures.stalled) is not None:
        rows["others alone"] = f"p50 {stall.alone_p50_ms:.1f} ms, p99 {stall.alone_p99_ms:.1f} ms"
        rows[f"beside {stall.connections:,} stalled"] = f"p50 {stall.p50_ms:.1f} ms, p99 {stall.p99_ms:.1f} ms"
        rows["memory then"] = f"{stall.rss_mb:.0f} MB"
        rows["all of those closed after"] = f"{stall.closed_s:.0f} s"
    if (long := figures.soak) is not None:
        first, last = long.looks[0], long.looks[-1]
        rows["requests"] = f"{long.requests:,} in {long.seconds:.0f} s, {long.not_right} not right"
        rows["memory"] = f"{first.rss_mb:.0f} MB after {first.requests:,}, {last.rss_mb:.0f} MB at the end"
        rows["growth for 100,000"] = f"{long.growth_mb:.2f} MB"
        rows["open files"] = f"{long.files:+}"
    print_table(console, ("what", "figure"), rows.items())


def main(arguments: Sequence[str]) -> int:
    """The command."""
    made = parser("bench.strain", __doc__)
    made.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none is all")
    made.add_argument("--seconds", type=float, default=60.0, help="of overload")
    made.add_argument("--requests", type=int, default=1_000_000, help="of the soak")
    options: Any = made.parse_args(arguments)
    known_only(made, options.parts, PARTS)
    figures = measure(options.parts or PARTS, options.seconds, options.requests)
    return finish(figures, show, as_json=options.json)


if __name__ == "__main__":
    run(main)
