"""A million requests through one gateway: its memory must not grow, and no file may stay open.

Closed loop, in stretches; after each, when all its connections are closed, memory and open files of the gateway are
looked at. Growth is the slope of a straight line through the stretches after the first third.
"""

import time
from pathlib import Path

import msgspec
import numpy as np
from rich.progress import Progress

from bench.gateway.contenders import Contender
from bench.gateway.measure import family_of, rss_bytes

STRETCH_S = 10.0
SETTLE_S = 1.0  # connections close, and the last captures become durable
WARM = 1 / 3  # of the requests: caches fill, the allocator finds its size

GROWTH_MB_MAX = 1.0  # for 100,000 requests
LOOKS_MIN = 6  # or the line goes through too few


class Look(msgspec.Struct, frozen=True):
    """After so many requests."""

    requests: int
    rss_mb: float
    files: int


class Soak(msgspec.Struct, frozen=True):
    """What was found."""

    requests: int
    wanted: int
    seconds: float
    not_right: int
    growth_mb: float  # for 100,000 requests
    looks: list[Look]

    @property
    def files(self) -> int:
        """How many more files are open than after the first stretch."""
        return self.looks[-1].files - self.looks[0].files

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        said = {
            f"{self.requests:,} requests of {self.wanted:,}": self.requests < self.wanted,
            f"only {len(self.looks)} looks at its memory": len(self.looks) < LOOKS_MIN,
            f"memory grew by {self.growth_mb:.2f} MB for 100,000 requests": self.growth_mb > GROWTH_MB_MAX,
            f"{self.files:+} open files": self.files != 0,
            f"{self.not_right} answers were not right": self.not_right > 0,
        }
        return [words for words, broken in said.items() if broken]


def soak(gateway: Contender, requests_min: int, bar: Progress) -> Soak:
    """The whole run, over a gateway that answers."""
    begun = time.monotonic()
    shown = bar.add_task("soak", total=requests_min)
    looks: list[Look] = []
    done = not_right = 0
    while done < requests_min:
        load = gateway.ask(STRETCH_S).load
        done += load.right
        not_right += load.bad
        time.sleep(SETTLE_S)
        looks.append(look(gateway, done))
        bar.update(shown, completed=min(done, requests_min))
        if not load.right:
            break
    return Soak(done, requests_min, time.monotonic() - begun, not_right, growth_mb(looks), looks)


def look(gateway: Contender, requests: int) -> Look:
    """At the gateway's processes."""
    return Look(requests, sum(map(rss_bytes, _family(gateway))) / 1e6, open_files(gateway))


def open_files(gateway: Contender) -> int:
    """Of all its processes."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in _family(gateway))


def _family(gateway: Contender) -> list[int]:
    return [one for pid in gateway.pids for one in family_of(pid)]


def growth_mb(looks: list[Look]) -> float:
    """MB for 100,000 requests: the slope of the least-squares line after the first third of them."""
    late = [each for each in looks if each.requests >= WARM * looks[-1].requests]
    if len(late) < 2:
        return 0.0
    slope = np.polyfit([each.requests for each in late], [each.rss_mb for each in late], 1)[0]
    return float(slope * 100_000)
