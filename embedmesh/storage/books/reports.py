"""What happened: usage by day, entries, statements of a month, and one request with all that followed from it."""

from collections.abc import Sequence

import msgspec

from embedmesh.rules.errors import NotFound
from embedmesh.rules.limits import PAGE_ROWS_MAX
from embedmesh.storage.books.accounts import AccountBooks
from embedmesh.storage.books.session import BooksSession
from embedmesh.storage.sql import REPORTS_SQL
from embedmesh.storage.times import month_span_ms

ENTRY_MAX = 2**62  # above every entry


class Usage(msgspec.Struct, frozen=True):
    """What a key of an account used of a model on a day (days since 1970, UTC). `cost` is nano-USD."""

    day: int
    model: str
    key_id: str
    requests: int
    tokens: int
    cost: int


class LedgerEntry(msgspec.Struct, frozen=True):
    """One side of a transfer, as its account sees it: money came (above 0) or went. Amounts are nano-USD."""

    entry_id: int
    kind: str
    amount: int
    source_id: str
    target_id: str
    request_id: str | None
    reference: str | None
    created_ms: int


class StatementLine(msgspec.Struct, frozen=True):
    """One line of a statement. What was bought is known as long as usage is kept."""

    entry_id: int
    created_ms: int
    kind: str
    amount: int
    request_id: str | None
    reference: str | None
    key_id: str | None
    model: str | None
    tokens: int | None
    price: int | None


class Move(msgspec.Struct, frozen=True):
    """Money that was moved for a request."""

    transfer_id: int
    kind: str
    source_id: str
    target_id: str
    amount: int
    reference: str | None
    created_ms: int


class Bought(msgspec.Struct, frozen=True):
    """What a captured hold was for."""

    key_id: str
    model: str
    node_id: str
    tokens: int
    price: int | None
    cost: int
    payable: int
    user_hash: str | None


class Explained(msgspec.Struct, frozen=True):
    """A request, as the ledger knows it: its hold, what ended it, what it was for, and all money that was moved."""

    request_id: str
    account_id: str
    key_id: str | None
    held: int
    state: str
    ended_by: str | None
    captured: int | None
    gateway: str
    created_ms: int
    deadline_ms: int
    ended_ms: int | None
    bought: Bought | None
    moves: tuple[Move, ...]


class Reports:
    """Reports of one store. Every method raises StoreUnavailable, too."""

    def __init__(self, session: BooksSession, accounts: AccountBooks) -> None:
        self._session = session
        self._accounts = accounts

    def usage(self, account_id: str, from_day: int, to_day: int, *, rows_max: int = PAGE_ROWS_MAX) -> Sequence[Usage]:
        """By day, model and key, the latest day first. Raises NotFound."""
        self._accounts.find(account_id)
        page = {"account_id": account_id, "from_day": from_day, "to_day": to_day, "rows_max": rows_max}
        return [Usage(*row) for row in self._session.rows(REPORTS_SQL["usage_of_account"], page)]

    def entries(
        self, account_id: str, *, before: int = ENTRY_MAX, rows_max: int = PAGE_ROWS_MAX
    ) -> Sequence[LedgerEntry]:
        """The latest first, those before an entry. Raises NotFound."""
        self._accounts.find(account_id)
        page = {"account_id": account_id, "before": before, "rows_max": rows_max}
        return [LedgerEntry(*row) for row in self._session.rows(REPORTS_SQL["entries_of_account"], page)]

    def balance_at(self, account_id: str, until_ms: int) -> int:
        """What an account had at a moment, in nano-USD."""
        rows = self._session.rows(REPORTS_SQL["balance_before"], {"account_id": account_id, "until_ms": until_ms})
        return int(rows[0][0])

    def statement(
        self, account_id: str, month: str, *, after: int = 0, rows_max: int = PAGE_ROWS_MAX
    ) -> Sequence[StatementLine]:
        """An account's entries of a month (`2026-11`, UTC), in their order, from one on. Raises NotFound, InvalidValue.

        `after` is the id of the entry before; 0 is from the first on.
        """
        from_ms, to_ms = month_span_ms(month)
        self._accounts.find(account_id)
        values = {"account_id": account_id, "from_ms": from_ms, "to_ms": to_ms, "after": after, "rows_max": rows_max}
        return [StatementLine(*row) for row in self._session.rows(REPORTS_SQL["statement_of_account"], values)]

    def explain(self, request_id: str) -> Explained:
        """Raises NotFound."""
        hold = self._session.row(REPORTS_SQL["one_hold"], {"hold_id": request_id})
        if hold is None:
            raise NotFound(
                f"The ledger knows no request {request_id[:64]}: no money was held for it, or it repeated another one, "
                "or its caller chose this id. The reply's header x-embedmesh-request has the ledger's id."
            )
        bought = self._session.row(REPORTS_SQL["usage_of_hold"], {"hold_id": request_id})
        moves = self._session.rows(REPORTS_SQL["transfers_of_hold"], {"hold_id": request_id})
        return Explained(*(*hold, Bought(*bought) if bought else None, tuple(Move(*move) for move in moves)))
