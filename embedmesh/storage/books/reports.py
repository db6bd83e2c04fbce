"""What happened: usage by day, entries, statements of a month, and one request with all that followed from it."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from embedmesh.rules.batches import line_of
from embedmesh.rules.errors import NotFound
from embedmesh.rules.holds import HoldEnd, HoldState, Metered
from embedmesh.rules.ids import began_ms
from embedmesh.rules.limits import PAGE_ROWS_MAX
from embedmesh.storage.books.accounts import AccountBooks
from embedmesh.storage.books.session import BooksSession
from embedmesh.storage.db import Row
from embedmesh.storage.ledger.writes import as_rows
from embedmesh.storage.sql import REPORTS_SQL
from embedmesh.storage.times import month_span_ms

ENTRY_MAX = 2**62  # above every entry
LOCK_ID = re.compile("[0-9]{1,18}")  # what fits 64 bits
CAPTURED, CAPTURE = HoldState.CAPTURED.value, HoldEnd.CAPTURE.value


class Usage(msgspec.Struct, frozen=True):
    """What a key of an account used of a model on a day (days since 1970, UTC). `cost` is nano-USD."""

    day: int
    model: str
    key_id: str
    requests: int
    tokens: int
    cost: int


class LedgerEntry(msgspec.Struct, frozen=True):
    """One side of a transfer, as its account sees it: money came (above 0) or went. Amounts are nano-USD.

    A charge is for a number of `requests`: for one, or for those that were settled together under a tab.
    """

    entry_id: int
    kind: str
    amount: int
    source_id: str
    target_id: str
    request_id: str | None
    reference: str | None
    created_ms: int
    tab_id: str | None = None
    requests: int | None = None


class StatementLine(msgspec.Struct, frozen=True):
    """One line of a statement. What was bought is known as long as usage is kept.

    Of several `requests` it is what all have in common, and the sum of their tokens.
    """

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
    tab_id: str | None = None
    requests: int | None = None


class ChargedRequest(msgspec.Struct, frozen=True):
    """One of the requests that an entry is the charge for. `cost` is nano-USD."""

    request_id: str
    key_id: str
    model: str
    tokens: int
    price: int | None
    cost: int


class Move(msgspec.Struct, frozen=True):
    """Money that was moved for a number of `requests`; of a tab, 0 for a node's part of a settlement."""

    transfer_id: int
    kind: str
    source_id: str
    target_id: str
    amount: int
    reference: str | None
    created_ms: int
    requests: int = 1


class Bought(msgspec.Struct, frozen=True):
    """What a captured hold was for. What is charged by several meters has no one `price`, but `meters`."""

    key_id: str
    model: str
    node_id: str
    tokens: int
    price: int | None
    cost: int
    payable: int
    user_hash: str | None
    meters: tuple[Metered, ...] = ()


class ExplainedLock(msgspec.Struct, frozen=True):
    """The lock that a hold was placed for: `units` tokens at `price` nano-USD per million, on one node."""

    lock_id: int
    node_id: str
    scheme: str
    model: str
    units: int
    price: int
    expires_ms: int
    used_ms: int | None


class ExplainedNote(msgspec.Struct, frozen=True):
    """What the stream of an open hold had cost by `noted_ms`, in nano-USD."""

    cost: int
    noted_ms: int


class ExplainedBatch(msgspec.Struct, frozen=True):
    """The batch whose money a tab has: where it stands, and how many of its lines are done."""

    state: str
    endpoint: str
    model: str | None
    lines: int
    completed: int
    failed: int


class Explained(msgspec.Struct, frozen=True):
    """A request, as the ledger knows it: its hold, what ended it, what it was for, and all money that was moved.

    What was set aside for a request under a tab is not written down: `held` is None. What was set aside for a `lock`
    came before its request. A stream that runs has a `note`. A line of a batch has its number, from 1 on: `line`.
    """

    request_id: str
    account_id: str
    key_id: str | None
    held: int | None
    state: str
    ended_by: str | None
    captured: int | None
    gateway: str
    created_ms: int
    deadline_ms: int
    ended_ms: int | None
    bought: Bought | None
    moves: tuple[Move, ...]
    tab_id: str | None = None
    lock: ExplainedLock | None = None
    note: ExplainedNote | None = None
    line: int | None = None


class ExplainedTab(msgspec.Struct, frozen=True):
    """A tab, as the ledger knows it, and the latest money that was moved for it, the latest first."""

    tab_id: str
    account_id: str
    key_id: str
    amount: int
    captured: int
    requests: int
    settlements: int
    state: str
    gateway: str
    opened_ms: int
    deadline_ms: int
    ended_ms: int | None
    moves: tuple[Move, ...]
    batch: ExplainedBatch | None = None


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
        rows = self._session.rows(REPORTS_SQL["statement_of_account"], values)
        settled = [(tab_id, settlement) for *_, tab_id, _, settlement in rows if settlement is not None]
        bought = self._bought_under_tabs(settled) if settled else {}
        lines = [(*row[:7], *bought.get((row[10], row[12]), row[7:10]), *row[10:12]) for row in rows]
        return [StatementLine(*line) for line in lines]

    def charged_requests(
        self, account_id: str, entry_id: int, *, after: str = "", rows_max: int = PAGE_ROWS_MAX
    ) -> Sequence[ChargedRequest]:
        """The requests that an entry charged an account for, by their ids, from one on. Raises NotFound."""
        entry = {"transfer_id": entry_id, "account_id": account_id}
        if not 0 < entry_id < ENTRY_MAX or (found := self._session.row(REPORTS_SQL["charge_of_entry"], entry)) is None:
            raise NotFound(f"There is no charge {entry_id} of this account.")
        hold_id, tab_id, settlement = found
        if tab_id is None:
            rows = self._session.rows(REPORTS_SQL["requests_of_hold"], {"hold_id": hold_id, "after": after})
        else:
            page = {"tab_id": tab_id, "settlement": settlement, "after": after, "rows_max": rows_max}
            rows = self._session.rows(REPORTS_SQL["requests_of_settlement"], page)
        return [ChargedRequest(*row) for row in rows]

    def explain(self, request_id: str) -> Explained:
        """A request, or a lock by its number: its hold and the request that has used it. Raises NotFound."""
        of_tab: dict[str, Any] = {"tab_id": None, "settlement": None}
        if LOCK_ID.fullmatch(request_id):
            request_id = self._hold_of_lock(int(request_id))
        found = self._session.row(REPORTS_SQL["one_hold"], {"hold_id": request_id})
        if found is None:
            found, of_tab = self._under_tab(request_id)
        bought = self._session.row(REPORTS_SQL["usage_of_hold"], {"hold_id": request_id})
        moves = self._session.rows(REPORTS_SQL["transfers_of_request"], {"hold_id": request_id} | of_tab)
        of_lock = self._session.row(REPORTS_SQL["lock_of_hold"], {"hold_id": request_id})
        noted = self._session.row(REPORTS_SQL["note_of_hold"], {"hold_id": request_id})
        known, lock = _bought(bought) if bought else None, ExplainedLock(*of_lock) if of_lock else None
        note = ExplainedNote(*noted) if noted else None
        line = line_of(of_tab["tab_id"] or "", request_id)
        number = None if line is None else line + 1
        fields = (*found, known, tuple(Move(*move) for move in moves), of_tab["tab_id"], lock, note, number)
        return Explained(*fields)

    def explain_tab(self, tab_id: str) -> ExplainedTab:
        """Raises NotFound."""
        tab = self._session.row(REPORTS_SQL["one_tab"], {"tab_id": tab_id})
        if tab is None:
            raise NotFound(f"The ledger knows no tab {tab_id[:64]}.")
        moves = self._session.rows(REPORTS_SQL["transfers_of_tab"], {"tab_id": tab_id, "rows_max": PAGE_ROWS_MAX})
        batch = self._session.row(REPORTS_SQL["batch_of_tab"], {"tab_id": tab_id})
        fields = (*tab, tuple(Move(*move) for move in moves), ExplainedBatch(*batch) if batch else None)
        return ExplainedTab(*fields)

    def _hold_of_lock(self, lock_id: int) -> str:
        found = self._session.row(REPORTS_SQL["hold_of_lock"], {"lock_id": lock_id})
        if found is None:
            raise NotFound(
                f"The ledger knows no lock {lock_id}. A lock is kept for a day after a request has used it, and for an "
                "hour if none has."
            )
        return str(found[0])

    def _under_tab(self, request_id: str) -> tuple[Row, dict[str, Any]]:
        """A request that was settled under a tab, as if it had had a hold; and the settlement. Raises NotFound."""
        found = self._session.row(REPORTS_SQL["request_under_tab"], {"hold_id": request_id})
        if found is None:
            raise NotFound(
                f"The ledger knows no request {request_id[:64]}: no money was held for it, or it was to be paid from a "
                "tab and was not charged, or it repeated another one, or its usage is not kept any more, or its caller "
                "chose this id. The reply's header x-embedmesh-request has the ledger's id."
            )
        account_id, key_id, cost, owner, deadline_ms, settled_ms, tab_id, settlement = found
        ended = CAPTURED, CAPTURE, cost, owner, began_ms(request_id, settled_ms), deadline_ms, settled_ms
        return (request_id, account_id, key_id, None, *ended), {"tab_id": tab_id, "settlement": settlement}

    def _bought_under_tabs(self, settled: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Row]:
        """Model, tokens and price by tab and settlement."""
        rows = self._session.rows(REPORTS_SQL["bought_under_tabs"], as_rows(settled))
        return {(tab_id, settlement): tuple(bought) for tab_id, settlement, *bought in rows}


def _bought(row: Row) -> Bought:
    known, meters = Bought(*row[:-1]), row[-1]
    if meters is None:
        return known
    return msgspec.structs.replace(known, meters=msgspec.json.decode(meters, type=tuple[Metered, ...]))
