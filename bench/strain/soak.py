"""A million requests through one gateway: its memory must not grow, and no file may stay open.

Closed loop, in stretches; after each, when all its connections are closed, memory and open files of the gateway are
looked at. Growth is the slope of a straight line through the stretches after the first third.
"""

import time

import msgspec
from rich.progress import Progress

from bench.gateway.contenders import Measurable
from bench.rig.command import wrong
from bench.rig.figures import slope

STRETCH_S = 10.0
SETTLE_S = 1.0  # connections close, and the last captures become durable
WARM = 1 / 3  # of the requests: caches fill, the allocator finds its size

GROWTH_MB_MAX = 1.0  # for 100,000 requests
LOOKS_MIN = 6  # or the straight line goes through too few


class MemoryLook(msgspec.Struct, frozen=True):
    """The gateway after `requests` requests."""

    requests: int
    rss_mb: float
    files: int


class GatewaySoak(msgspec.Struct, frozen=True):
    """What was found."""

    requests: int
    wanted: int
    seconds: float
    not_right: int
    growth_mb: float  # for 100,000 requests
    looks: list[MemoryLook]

    @property
    def files(self) -> int:
        """How many more files are open than after the first stretch."""
        return self.looks[-1].files - self.looks[0].files

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        conditions: dict[str, object] = {
            f"{self.requests:,} requests of {self.wanted:,}": self.requests < self.wanted,
            f"only {len(self.looks)} looks at its memory": len(self.looks) < LOOKS_MIN,
            f"memory grew by {self.growth_mb:.2f} MB for 100,000 requests": self.growth_mb > GROWTH_MB_MAX,
            f"{self.files:+} open files": self.files != 0,
            f"{self.not_right} answers were not right": self.not_right > 0,
        }
        return wrong(conditions)


def soak(gateway: Measurable, requests_min: int, bar: Progress) -> GatewaySoak:
    """The whole run, over a gateway that answers."""
    begun = time.monotonic()
    shown = bar.add_task("soak", total=requests_min)
    looks: list[MemoryLook] = []
    done = not_right = 0
    while done < requests_min:
        load = gateway.load(STRETCH_S).load
        done += load.right
        not_right += load.bad
        time.sleep(SETTLE_S)
        looks.append(MemoryLook(done, gateway.resident_mb, gateway.open_files))
        bar.update(shown, completed=min(done, requests_min))
        if not load.right:
            break
    return GatewaySoak(done, requests_min, time.monotonic() - begun, not_right, growth_mb(looks), looks)


def growth_mb(looks: list[MemoryLook]) -> float:
    """MB for 100,000 requests: the slope of the least-squares line after the first third of them."""
    return 100_000 * slope(
        [(each.requests, each.rss_mb) for each in looks if each.requests >= WARM * looks[-1].requests]
    )
