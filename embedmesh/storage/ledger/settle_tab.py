"""Settling tabs: all that was captured under them since the last batch, in one settlement a tab.

A settlement is a usage record for each request, one charge, and one payable for each node. The charge carries a digest
of the usage records, and so the chain covers them: BLAKE2b-256 over the records in the order of their ids, each as a
JSON array on a line of its own.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import msgspec

from embedmesh.rules.holds import Charge, Hold
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.charge_holds import REVENUE, node_account
from embedmesh.storage.ledger.writes import Stats, Write, as_rows, later_ids
from embedmesh.storage.sql import HOLDS_SQL, TABS_SQL
from embedmesh.storage.times import MS_PER_DAY

Record = tuple[str, str, str, str, int, int | None, int, int, str | None, str | None]
"""What the digest covers: tab, request, model, node, tokens, price, cost, payable, user, meters."""
Delivered = tuple[str, Charge]
"""The id of a request's part of a tab, and what it is charged."""
REQUEST, COST = itemgetter(1), itemgetter(6)
WORK = attrgetter("model", "node_id", "tokens", "price", "cost_nanousd")
HOLD = itemgetter(0)
ENCODER = msgspec.json.Encoder()

logger = logging.getLogger(__name__)


class SettleTab(Write):
    """Charge requests that were delivered under a tab. Where the tab has ended, nothing is charged: that is counted.

    Kept until it is durable: nobody waits for it, and it must not be lost. All of a batch are settled together.
    """

    def __init__(self, tab_id: str, account_id: str, requests: Sequence[Delivered]) -> None:
        self.tab_id = tab_id
        self.account_id = account_id
        self.requests = requests
        self.weight = len(requests)
        self._settling: Sequence[Delivered] = requests  # those that the batch has not been given by another write
        self._settled_ids: Callable[[], frozenset[str]] = frozenset  # of all tabs that were settled with this one
        self._tried = False  # then nobody may know whether it was settled
        self._settled = 0  # of the requests
        self._late = 0

    @classmethod
    def prepare_all(cls, db: Db, now_ms: int, writes: "Sequence[SettleTab]") -> set[str]:
        accounts = {REVENUE}
        for write in writes:
            accounts.add(write.account_id)
            for _, charge in write.requests:
                if charge.payables:
                    accounts.update([node_account(payable.node_id) for payable in charge.payables])
        return accounts

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[SettleTab]") -> None:
        tried = [write for write in writes if write._tried]
        before = _settled_before(db, tried) if tried else frozenset()
        given: set[str] = set()
        settling: list[SettleTab] = []
        for write in writes:
            ids = set(map(HOLD, write.requests))
            write._settled, write._late, write._settled_ids = 0, 0, frozenset
            if len(ids) == len(write.requests) and given.isdisjoint(ids) and before.isdisjoint(ids):
                write._settling = write.requests
            else:
                write._settled = len(ids & before)
                write._settling = _once(write.requests, before | given)
            given |= ids
            write._tried = True
            if write._settling:
                settling.append(write)
        if not settling:
            return
        settled_ids = settle(db, now_ms, settling)
        for write in settling:
            write._settled_ids = settled_ids

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[SettleTab]") -> None:
        for write in writes:
            if write.tab_id in write._settled_ids():
                write._settled += len(write._settling)
            else:
                write._late = len(write._settling)

    def committed(self, stats: Stats) -> None:
        stats.captured += self._settled
        stats.captured_under_tabs += self._settled
        if self._late:
            stats.late_captures += self._late
            words = "tab %s had ended before request %s was settled: delivered, not charged"
            for hold_id, _ in self._settling[: self._late]:
                logger.warning(words, self.tab_id, hold_id, extra={"request_id": hold_id})

    def parts(self) -> "Sequence[SettleTab]":
        if len(self.requests) == 1:
            return ()
        parts = [SettleTab(self.tab_id, self.account_id, [request]) for request in self.requests]
        for part in parts:
            part._tried = self._tried
        return parts


class SettleRequest(SettleTab):
    """Charge one request that was delivered under a tab."""

    def __init__(self, tab_id: str, hold: Hold, charge: Charge) -> None:
        super().__init__(tab_id, hold.account_id, [(hold.hold_id, charge)])


def digest_of(records: Iterable[Record]) -> str:
    """The digest of a settlement's usage records, in hex; they are in the order of their ids."""
    return _digest(ENCODER.encode_lines(records))


def _digest(lines: bytes) -> str:
    return hashlib.blake2b(lines, digest_size=32, person=b"embedmesh settle").hexdigest()


def _once(requests: Sequence[Delivered], others: Collection[str]) -> list[Delivered]:
    """Each request once, but for those that others have."""
    return [(hold_id, charge) for hold_id, charge in dict(requests).items() if hold_id not in others]


def _settled_before(db: Db, writes: Sequence[SettleTab]) -> frozenset[str]:
    """The requests that were settled: a batch that failed may be durable, where its connection was lost."""
    rows = as_rows([(hold_id, write.tab_id) for write in writes for hold_id, _ in write.requests])
    return frozenset(hold_id for (hold_id,) in db.execute(TABS_SQL["settled_before"], rows).fetchall())


def settle(db: Db, now_ms: int, writes: Iterable[SettleTab]) -> Callable[[], frozenset[str]]:
    """Settle those of some requests whose tabs are live, and nothing of the others. Returns the ids of these tabs.

    No statement needs what another has found, so that they are sent together.
    """
    records: dict[str, list[Record]] = {}
    shares: dict[tuple[str, str], int] = {}  # by tab and node
    accounts: dict[str, str] = {}
    for write in writes:
        tab_id = write.tab_id
        accounts[tab_id] = write.account_id
        append = records.setdefault(tab_id, []).append
        for hold_id, charge in write._settling:
            payable, meters = 0, None
            if charge.payables:
                for each in charge.payables:
                    to = tab_id, node_account(each.node_id)
                    shares[to] = shares.get(to, 0) + each.nanousd
                    payable += each.nanousd
            if charge.meters:
                meters = ENCODER.encode(charge.meters).decode()
            append((tab_id, hold_id, *WORK(charge), payable, charge.user_hash, meters))
    transfers = []
    usage = []
    for tab_id, settled in records.items():
        settled.sort(key=REQUEST)
        usage.append(lines := ENCODER.encode_lines(settled))
        amount = sum(map(COST, settled))
        about = {"requests": len(settled), "digest": _digest(lines)}
        transfers.append(_transfer("charge", tab_id, accounts[tab_id], REVENUE, amount) | about)
    if shares:
        transfers += [_transfer("payable", tab_id, REVENUE, node, share) for (tab_id, node), share in shares.items()]
        made = as_rows([{"account_id": node} for node in sorted({node for _, node in shares})])
        db.execute(HOLDS_SQL["insert_nodes"], made | {"now_ms": now_ms})
    # A line is an element: no JSON text has a line break in it.
    rows = b"[%b]" % b"".join(usage).removesuffix(b"\n").replace(b"\n", b",")
    db.execute(TABS_SQL["insert_usage_of_tabs"], {"rows": rows.decode(), "day": now_ms // MS_PER_DAY})
    return later_ids(db, TABS_SQL["settle_tabs"], as_rows(transfers) | {"now_ms": now_ms})


def _transfer(kind: str, tab_id: str, source: str, target: str, amount: int) -> dict[str, Any]:
    return {"kind": kind, "tab_id": tab_id, "source_id": source, "target_id": target, "amount": amount}
