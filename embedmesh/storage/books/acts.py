"""The audit, as operators read it: who did what, when, to what, from where."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from embedmesh.rules.limits import PAGE_ROWS_MAX
from embedmesh.storage.books.session import BooksSession
from embedmesh.storage.sql import ACTS_SQL

ACT_ID_MAX = 2**63 - 1


class ActRow(msgspec.Struct, frozen=True):
    """A row of the audit. Times are Unix milliseconds; `changes` is name -> value, or [old, new]."""

    act_id: int
    created_ms: int
    actor: str
    verb: str
    object_id: str
    changes: Mapping[str, Any]
    origin: str
    request_id: str
    hash: str


class ActBooks:
    """The acts of one store. Every method raises StoreUnavailable."""

    def __init__(self, session: BooksSession) -> None:
        self._session = session

    def list(
        self,
        *,
        after: int | None = None,
        oldest_first: bool = False,
        since_ms: int = 0,
        actor: str | None = None,
        verb: str | None = None,
        object_id: str | None = None,
        rows_max: int = PAGE_ROWS_MAX,
    ) -> Sequence[ActRow]:
        """Acts of that kind, from the one with the number `after` on. The verb `key`: all of `key.create` and so on."""
        if after is None:
            after = 0 if oldest_first else ACT_ID_MAX
        kind = {"since_ms": since_ms, "actor": actor, "verb": verb, "object_id": object_id}
        statement = ACTS_SQL["list_acts" if oldest_first else "list_acts_backwards"]
        return [_row(row) for row in self._session.rows(statement, kind | {"after": after, "rows_max": rows_max})]


def _row(row: Sequence[Any]) -> ActRow:
    fields = dict(zip(ActRow.__struct_fields__, row, strict=True))
    return ActRow(**fields | {"changes": msgspec.json.decode(fields["changes"]), "hash": fields["hash"].hex()})
