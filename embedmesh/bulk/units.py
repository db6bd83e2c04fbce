"""Cuts inputs into units of work. What cuts them is the input alone, so that a unit is the same in every run.

A unit brings its texts along, and the values of the other columns: workers on other machines need not reach the input,
and nobody reads a row group of a million rows again for each of its units. It is a dict of plain values when it
travels (`as_dict`). Its key is a digest of the input up to its end, of its place, and of what is asked for.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import orjson

from embedmesh.bulk.lines import LineBatch, Refusal
from embedmesh.bulk.usage import WrongUsage

UNIT_TEXTS_MAX = 2_048  # what one request could have
JOB_UNIT_BYTES_MAX = 600_000  # about 150,000 tokens, a minute of one small node: what is lost with a worker
REQUEST_TEXTS_MAX = 512  # of a request of a unit: 4 MiB of reply at 1,536 components
REQUEST_TEXT_BYTES_MAX = 64 * 1024  # about 16,384 tokens, as the client packs them
UNIT_KEY_HEX = 32  # 128 bits of SHA-256

Settings = dict[str, str | int | None]


class JobPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has to know. `fields` are those of every request beside the input.

    `output` is a sink, as `sinks.sink_for` takes it. `ids` is the column of ids; rows without one are numbered.
    `ledger_job` is the job at the gateway that its requests are charged to. `width` is that of the vectors, if it is
    known before the first one.
    """

    base_url: str
    api_key: str
    fields: dict[str, str | int]
    output: str
    column: str | None = None
    ids: str | None = None
    ledger_job: str | None = None
    width: int | None = None

    @property
    def settings(self) -> Settings:
        """What decides about the rows of the output, for the manifest. There is no secret in it."""
        return {**self.fields, "column": self.column, "id": self.ids, "output": self.output}

    def as_dict(self) -> dict[str, Any]:
        """For other processes. It holds the key: never write it down."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    def __repr__(self) -> str:
        return f"JobPlan({self.settings})"  # without the key


class JobUnit(msgspec.Struct, frozen=True, kw_only=True):
    """Texts that are embedded and written together. `number` counts units from 0, `first` rows, over all inputs.

    `refused` has the rows that cannot be sent, with a code and a message; their texts are empty. `ids` is None where
    rows are numbered; a row that is refused may have none. `columns` are the values of the other columns; those of
    Parquet, which have types, are in `arrow`, an Arrow stream. `size` is about its part of the inputs, in bytes.
    """

    key: str
    number: int
    first: int
    texts: list[str]
    refused: list[tuple[int, str, str]]
    ids: list[str | int | None] | None
    columns: dict[str, list[Any]]
    arrow: bytes | None = None
    size: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Of str, int, list, dict, None and bytes; what JSON input holds, too."""
        plain: dict[str, Any] = msgspec.to_builtins(self, builtin_types=(bytes,))
        return plain

    @classmethod
    def of_dict(cls, plain: dict[str, Any]) -> "JobUnit":
        """What `as_dict` has made."""
        return msgspec.convert(plain, cls, builtin_types=(bytes,))


def units_of(batches: Iterable[LineBatch], plan: JobPlan) -> Iterator[JobUnit]:
    """All units of these rows, cut as they are asked for. Raises WrongUsage where there is no column of that name."""
    settings = orjson.dumps({**plan.settings, "output": None}, option=orjson.OPT_SORT_KEYS)
    number = first = 0
    end_bytes = 0
    for batch in batches:
        size = max(batch.end_bytes - end_bytes, 0) if batch.first else batch.end_bytes
        end_bytes = batch.end_bytes
        for rows in pieces([_size(line) for line in batch.lines], UNIT_TEXTS_MAX, JOB_UNIT_BYTES_MAX):
            place = f"{batch.digest} {number} {first} {rows.start} {len(rows)} ".encode()
            yield _unit(
                batch,
                rows,
                plan,
                key=hashlib.sha256(place + settings).hexdigest()[:UNIT_KEY_HEX],
                number=number,
                first=first,
                size=size * len(rows) // len(batch.lines),
            )
            number, first = number + 1, first + len(rows)


def pieces(sizes: list[int], count_max: int, size_max: int) -> Iterator[range]:
    """Consecutive ranges of things of these sizes: at most `count_max`, and `size_max` unless it is a single one."""
    start = total = 0
    for at, size in enumerate(sizes):
        if at > start and (at - start >= count_max or total + size > size_max):
            yield range(start, at)
            start, total = at, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


def _unit(batch: LineBatch, rows: range, plan: JobPlan, **place: Any) -> JobUnit:
    if len(set(batch.columns)) < len(batch.columns):
        raise WrongUsage("The input has two columns of one name. Give each its own.")
    lines = batch.lines[rows.start : rows.stop]
    refused = {at: line for at, line in enumerate(lines) if isinstance(line, Refusal)}
    ids = None
    if isinstance(batch.kept, list):
        kept = batch.kept[rows.start : rows.stop]
        columns = {name: [row[at] if at < len(row) else None for row in kept] for at, name in enumerate(batch.columns)}
        arrow = None
    else:
        part = batch.kept.slice(rows.start, len(rows))
        columns, arrow = {}, arrow_stream(part)
    if plan.ids is not None:
        if plan.ids not in batch.columns:
            raise WrongUsage(f"The input has no column {plan.ids!r}, beside the one that is embedded, for --id.")
        values = columns[plan.ids] if arrow is None else part.column(plan.ids).to_pylist()
        ids = [one if isinstance(one, int | str) and not isinstance(one, bool) else None for one in values]
        missing = Refusal("missing_id", f"the row has neither a text nor a whole number in the column {plan.ids!r}")
        refused = {at: missing for at, one in enumerate(ids) if one in (None, "")} | refused
    return JobUnit(
        texts=["" if at in refused else orjson.loads(line) for at, line in enumerate(lines)],  # type: ignore[arg-type]
        refused=[(at, refusal.code, refusal.message) for at, refusal in sorted(refused.items())],
        ids=ids,
        columns=columns,
        arrow=arrow,
        **place,
    )


def arrow_stream(batch: Any) -> bytes:
    """A record batch as bytes."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _size(line: bytes | Refusal) -> int:
    return len(line) if isinstance(line, bytes) else 0
