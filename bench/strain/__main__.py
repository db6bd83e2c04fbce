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
from rich.progress import Progress

from bench.fault.load import MAX_TOKENS, made_pool
from bench.gateway.contenders import Setup, started
from bench.gateway.material import made_material
from bench.rig import fleet
from bench.rig.command import bench, check_names, model_folder, progress, run_async
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


def measure(parts: Sequence[str], seconds: float = 60.0, requests: int = 1_000_000) -> Figures:
    """Some of it, or all."""
    check_names(parts, PARTS)
    parts = parts or PARTS
    found: dict[str, Any] = {}
    with progress() as bar:
        if "overload" in parts:
            found["overload"] = run_async(_overload(seconds, bar))
        if "stalled" in parts or "soak" in parts:
            with made_material() as material, started(Setup("hold"), material) as gateway:
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


if __name__ == "__main__":
    bench(measure, parts=f"of {', '.join(PARTS)}; none is all", seconds="of overload", requests="of the soak")
