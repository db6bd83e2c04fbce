"""Opening tabs, closing them, and asking for them before their time."""

from collections.abc import Callable, Sequence
from typing import Any

from embedmesh.rules.tabs import SHARE_OF_MONEY, Tab, TabState
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, Write, as_rows, later_ids
from embedmesh.storage.sql import TABS_SQL
from embedmesh.storage.times import MS_PER_DAY, first_day_of_month


class OpenTab(WaitedWrite[int]):
    """Open a tab. `outcome` becomes its amount once that is durable: at most `wanted`, and 0 where it was not opened.

    It is opened only for at least `least`, and never for more than a share of what the account and each budget have
    left. If the caller has gone, or nobody knows what became of the batch, the tab expires.
    """

    rank = 4

    def __init__(self, tab: Tab, owner: str, wanted: int, least: int) -> None:
        super().__init__()
        self.tab = tab
        self._owner = owner
        self._wanted = wanted
        self._least = least
        self._opened: Callable[[], Sequence[Row]] | None = None  # ids and amounts of all tabs opened with this one
        self._amount = 0

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self.tab.account_id}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[OpenTab]") -> None:
        opening: list[OpenTab] = []
        for write in writes:
            write._opened, write._amount = None, 0
            if not write.outcome.done():  # else the caller has gone
                opening.append(write)
        if not opening:
            return
        days = {"day": now_ms // MS_PER_DAY, "month_day": first_day_of_month(now_ms)}
        rows = as_rows([write._row() for write in opening])
        terms = {"owner": writes[0]._owner, "now_ms": now_ms, "share": SHARE_OF_MONEY, "tabs_max": len(opening)}
        opened = db.later(TABS_SQL["open_tabs"], rows | terms | days)
        for write in opening:
            write._opened = opened

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[OpenTab]") -> None:
        amounts: dict[str, int] = {}
        for opened in {write._opened for write in writes if write._opened is not None}:
            amounts.update((tab_id, amount) for tab_id, amount in opened())
        for write in writes:
            write._amount = amounts.get(write.tab.tab_id, 0)

    def committed(self, stats: Stats) -> None:
        stats.tabs_opened += self._amount > 0
        self._succeed(self._amount)

    def _row(self) -> dict[str, Any]:
        return {
            "tab_id": self.tab.tab_id,
            "account_id": self.tab.account_id,
            "key_id": self.tab.key_id,
            "deadline_ms": self.tab.deadline_ms,
            "wanted": self._wanted,
            "least": max(1, self._least),
        }


class CloseTab(Write):
    """Close a tab: what it has not captured goes back. After whatever is settled with it; harmless if it has ended."""

    rank = 1

    def __init__(self, tab_id: str, account_id: str) -> None:
        self._tab_id = tab_id
        self._account_id = account_id
        self._ended_ids: Callable[[], frozenset[str]] | None = None  # of all tabs that are closed with this one
        self._ended = False

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self._account_id}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[CloseTab]") -> None:
        ended_ids = end_tabs(db, now_ms, [write._tab_id for write in writes], TabState.CLOSED)
        for write in writes:
            write._ended_ids = ended_ids

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[CloseTab]") -> None:
        for write in writes:
            write._ended = write._ended_ids is not None and write._tab_id in write._ended_ids()

    def committed(self, stats: Stats) -> None:
        stats.tabs_closed += self._ended


class RecallTabs(WaitedWrite[int]):
    """Ask for the money of an account's tabs, or of those that have a budget in common with a key.

    `outcome` becomes how many have not ended yet, once that is durable; their gateways hear of it.
    """

    rank = 2

    def __init__(self, account_id: str, key_id: str | None) -> None:
        super().__init__()
        self._whose = {"account_id": account_id, "key_id": key_id}
        self._found: Callable[[], Sequence[Row]] | None = None
        self._live = 0

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {str(self._whose["account_id"])}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[RecallTabs]") -> None:
        for write in writes:
            db.execute(TABS_SQL["recall_tabs"], write._whose)
            write._found = db.later(TABS_SQL["count_live_tabs"], write._whose)

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[RecallTabs]") -> None:
        for write in writes:
            assert write._found is not None
            ((write._live,),) = write._found()

    def committed(self, stats: Stats) -> None:
        self._succeed(self._live)


def recalled_tabs(db: Db, owner: str) -> list[str]:
    """The ids of a gateway's tabs whose money is asked for, and that have not ended."""
    return [tab_id for (tab_id,) in db.execute(TABS_SQL["recalled_tabs"], {"owner": owner}).fetchall()]


def end_tabs(db: Db, now_ms: int, tab_ids: Sequence[str], state: TabState) -> Callable[[], frozenset[str]]:
    """End those of some tabs that are live; ask for their ids later."""
    if not tab_ids:
        return frozenset
    rows = as_rows([{"tab_id": tab_id, "state": state.value} for tab_id in tab_ids])
    return later_ids(db, TABS_SQL["end_tabs"], rows | {"now_ms": now_ms})
