"""Where a job's rows go: a folder of parts, a file that is made of them at the end, or a database."""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from embedmesh.bulk.units import JobUnit
from embedmesh.bulk.usage import WrongUsage

if TYPE_CHECKING:
    from embedmesh.client.bulk.replies import Rows


class UnitTable(NamedTuple):
    """The rows of a unit with their vectors, (rows, width) float32; a refused row is NaN, and `errors` says why.

    `ids` are the values of the column of ids, else the rows' numbers from 0 over all inputs; only a refused row may
    have none. `columns` are the input's others, by name. `arrow` is a record batch of the same, if they have types.
    The width is 0 where nothing was embedded and it is not known from elsewhere. `texts` are empty for refused rows.
    """

    first: int
    ids: list[str | int | None]
    texts: list[str]
    vectors: "Rows"
    errors: list[str | None]
    columns: dict[str, list[Any]]
    arrow: Any = None


class Sink(Protocol):
    """Takes the rows of units, in any order, of several threads at one time."""

    def write(self, unit: JobUnit, table: UnitTable) -> str:
        """Write a unit's rows, durably, and in place of what was written of this unit before. Raises Stopped, OSError.

        What it returns stands in the manifest, and comes back at the end: the name of a part, or nothing.
        """
        ...

    def begin(self, *, resumed: bool, overwrite: bool, width: int | None) -> None:
        """Called by the driver before the first unit. `resumed`: the job goes on; else `overwrite` what is there.

        `width` is that of the vectors, if it is known before the first one.
        Raises WrongUsage where the output cannot be used, or holds what another job may want.
        """
        ...

    def finish(self, parts: Iterable[str]) -> None:
        """Called by the driver when every unit is committed, with what `write` gave for each, in order of units.

        It may be called again after it has succeeded. Raises Stopped where something is missing.
        """
        ...


SINKS = {
    "parquet": "embedmesh.bulk.folder:PartFolder",
    "jsonl": "embedmesh.bulk.folder:PartFolder",
    "npy": "embedmesh.bulk.folder:PartFolder",
    "file": "embedmesh.bulk.joined:JoinedFile",
    "pgvector": "embedmesh.bulk.to_pgvector:PgvectorSink",
    "qdrant": "embedmesh.bulk.to_qdrant:QdrantSink",
}
"""By what stands before the colon of an output. Each is called with the whole output."""


def sink_name(output: str) -> str | None:
    """`parquet` of `parquet:out`; None where no sink has that name."""
    name, colon, _ = output.partition(":")
    return name if colon and name in SINKS else None


def sink_for(output: str) -> Sink:
    """The sink that an output names, as `parquet:FOLDER`. Raises WrongUsage."""
    name = sink_name(output)
    if name is None:
        raise WrongUsage(f"There is no output of that kind. There are: {', '.join(SINKS)}.")
    module, _, made = SINKS[name].partition(":")
    sink: Sink = getattr(importlib.import_module(module), made)(output)
    return sink


def job_output(output: str) -> str | None:
    """The sink that an output means, as `parquet:out` for `out/`; None for a file, which needs no job."""
    if sink_name(output) is not None:
        return output
    if output.endswith(".lance"):
        return f"file:{output}"
    return f"parquet:{output.rstrip('/') or '/'}" if output.endswith("/") else None
