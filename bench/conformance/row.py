"""A row of the matrix, and how it is tried."""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from bench.conformance.bed import Bed
from bench.conformance.caller import Broken, NotClaimed


class Row(NamedTuple):
    """`attempt` says how the promise was kept, in words or none; raises Broken or NotClaimed."""

    group: str
    promise: str
    attempt: Callable[[Bed], str]


class Cell(msgspec.Struct, frozen=True):
    """What was found of one peer: `state` is kept, broken, or n.a."""

    state: str
    words: str = ""


def tried(row: Row, bed: Bed) -> Cell:
    """One cell."""
    try:
        return Cell("kept", row.attempt(bed))
    except Broken as what:
        return Cell("broken", str(what))
    except NotClaimed:
        return Cell("n.a.")
