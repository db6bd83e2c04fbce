"""Rows of batches as values: what a statement is given, and what it has found."""

from collections.abc import Sequence
from typing import Any

import msgspec

from embedmesh.rules.batches import Batch, BatchState, BatchUnit, LineError, NewBatch, Segment, UsedTokens
from embedmesh.storage.db import Row


class DoneUnit(msgspec.Struct, frozen=True):
    """A unit that is done, and where its results are."""

    unit: BatchUnit
    segment: Segment


def batch_of(row: Row) -> Batch:
    """A row as `find_batch` selects it."""
    values = dict(zip(FIELDS, row, strict=True))
    used = UsedTokens(values.pop("input_tokens"), values.pop("cached_tokens"), values.pop("output_tokens"))
    decoded = {
        "state": BatchState(values["state"]),
        "metadata": _decoded(values["metadata"], dict[str, str], None),
        "errors": _decoded(values["errors"], tuple[LineError, ...], ()),
        "prices": _decoded(values["prices"], dict[str, int], {}),
    }
    return Batch(**values | decoded, used=used)


def values_of_new(new: NewBatch) -> dict[str, Any]:
    """For the statement `create_batch`."""
    metadata = None if new.metadata is None else msgspec.json.encode(new.metadata).decode()
    return msgspec.structs.asdict(new) | {"metadata": metadata}


def errors_text(errors: Sequence[LineError]) -> str:
    """Errors as they are kept."""
    return msgspec.json.encode(errors).decode()


def done_unit_of(row: Row) -> DoneUnit:
    """A row as `done_units` selects it."""
    return DoneUnit(BatchUnit(*row[:6]), Segment(*row[6:]))


def _decoded(text: str | None, kind: Any, otherwise: Any) -> Any:
    return otherwise if text is None else msgspec.json.decode(text, type=kind)


FIELDS = (  # in the order in which statements select them
    "batch_id", "account_id", "key_id", "state", "endpoint", "model", "input_file_id", "output_file_id",
    "error_file_id", "window_s", "output_expires_s", "metadata", "errors", "prices", "amount_nanousd", "units", "total",
    "completed", "failed", "input_tokens", "cached_tokens", "output_tokens", "created_ms", "expires_ms",
    "in_progress_ms", "finalizing_ms", "completed_ms", "failed_ms", "expired_ms", "cancelling_ms", "cancelled_ms",
)  # fmt: skip
