"""Settling tabs: all that was captured under them since the last batch, in one settlement a tab.

A settlement is a usage record for each request, one charge, and one payable for each node. The charge carries a digest
of the usage records, and so the chain covers them: BLAKE2b-256 over the records in the order of their ids, each as a
JSON array on a line of its own.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from embedmesh.rules.holds import Charge, Hold
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.end_hold import REVENUE, node_account
from embedmesh.storage.ledger.writes import Stats, Write, as_rows, later_ids
from embedmesh.storage.sql import HOLDS_SQL, TABS_SQL
from embedmesh.storage.times import MS_PER_DAY

Record = tuple[str, str, str, str, int, int | None, int, int, str | None, str | None]
"""What the digest covers: tab, request, model, node, tokens, price, cost, payable, user, meters."""

logger = logging.getLogger(__name__)


class SettleRequest(Write):
    """Charge a request that was delivered under a tab. Where the tab has ended, nothing is charged: that is counted.

    Kept until it is durable: nobody waits for it, and it must not be lost. All of a batch are settled together.
    """

    def __init__(self, tab_id: str, hold: Hold, charge: Charge) -> None:
        self.tab_id = tab_id
        self.hold = hold
        self.charge = charge
        self._settled_ids: Callable[[], frozenset[str]] | None = None  # of all tabs that were settled with this one
        self._tried = False  # then nobody may know whether it was settled
        self._settled_before = False
        self._settled = False

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self.hold.account_id, REVENUE, *(node_account(payable.node_id) for payable in self.charge.payables)}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[SettleRequest]") -> None:
        first: dict[str, SettleRequest] = {}
        for write in writes:
            write._settled = False
            write._settled_ids = None
            first.setdefault(write.hold.hold_id, write)  # a request is settled once
        if tried := [write for write in first.values() if write._tried]:
            _find_settled(db, tried)
        settling = [write for write in first.values() if not write._settled_before]
        if not settling:
            return
        for write in settling:
            write._tried = True
        settled_ids = _settle(db, now_ms, settling)
        for write in settling:
            write._settled_ids = settled_ids

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[SettleRequest]") -> None:
        for write in writes:
            write._settled = write._settled_ids is not None and write.tab_id in write._settled_ids()

    def committed(self, stats: Stats) -> None:
        if self._settled_before or self._settled:
            stats.captured += 1
        elif self._settled_ids is not None:
            stats.late_captures += 1
            logger.warning(
                "tab %s had ended before request %s was settled: delivered, not charged", self.tab_id, self.hold.hold_id
            )


def digest_of(records: Sequence[Record | Row]) -> str:
    """The digest of a settlement's usage records, in hex; they are in the order of their ids."""
    digest = hashlib.blake2b(digest_size=32, person=b"embedmesh settle")
    for record in records:
        digest.update(msgspec.json.encode(tuple(record)) + b"\n")
    return digest.hexdigest()


def _find_settled(db: Db, writes: Sequence[SettleRequest]) -> None:
    """A batch that failed may be durable all the same, where its connection was lost."""
    rows = as_rows([(write.hold.hold_id, write.tab_id) for write in writes])
    found = {hold_id for (hold_id,) in db.execute(TABS_SQL["settled_before"], rows).fetchall()}
    for write in writes:
        write._settled_before = write.hold.hold_id in found


def _settle(db: Db, now_ms: int, writes: Sequence[SettleRequest]) -> Callable[[], frozenset[str]]:
    """Settle those of some requests whose tabs are live, and nothing of the others. Returns the ids of these tabs.

    No statement needs what another has found, so that they are sent together.
    """
    of_tab: dict[str, list[SettleRequest]] = {}
    for write in writes:
        of_tab.setdefault(write.tab_id, []).append(write)
    records: list[Record] = []
    transfers: list[dict[str, Any]] = []
    nodes: set[str] = set()
    for tab_id, requests in of_tab.items():
        requests.sort(key=lambda write: write.hold.hold_id)
        settled = [_record(write) for write in requests]
        records += settled
        amount = sum(write.charge.cost_nanousd for write in requests)
        about = {"requests": len(requests), "digest": digest_of(settled)}
        transfers.append(_transfer("charge", tab_id, requests[0].hold.account_id, REVENUE, amount) | about)
        for node, share in _shares(requests).items():
            nodes.add(node)
            transfers.append(_transfer("payable", tab_id, REVENUE, node, share))
    if nodes:
        made = as_rows([{"account_id": node} for node in sorted(nodes)])
        db.execute(HOLDS_SQL["insert_nodes"], made | {"now_ms": now_ms})
    db.execute(TABS_SQL["insert_usage_of_tabs"], as_rows(records) | {"day": now_ms // MS_PER_DAY})
    return later_ids(db, TABS_SQL["settle_tabs"], as_rows(transfers) | {"now_ms": now_ms})


def _record(write: SettleRequest) -> Record:
    charge = write.charge
    meters = msgspec.json.encode(charge.meters).decode() if charge.meters else None
    payable = sum(payable.nanousd for payable in charge.payables)
    return (
        write.tab_id,
        write.hold.hold_id,
        charge.model,
        charge.node_id,
        charge.tokens,
        charge.price,
        charge.cost_nanousd,
        payable,
        charge.user_hash,
        meters,
    )


def _shares(writes: Sequence[SettleRequest]) -> dict[str, int]:
    """What each node gets of some requests."""
    shares: dict[str, int] = {}
    for write in writes:
        for payable in write.charge.payables:
            node = node_account(payable.node_id)
            shares[node] = shares.get(node, 0) + payable.nanousd
    return shares


def _transfer(kind: str, tab_id: str, source: str, target: str, amount: int) -> dict[str, Any]:
    return {"kind": kind, "tab_id": tab_id, "source_id": source, "target_id": target, "amount": amount}
