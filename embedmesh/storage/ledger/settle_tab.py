"""Settling tabs: all that was captured under them since the last batch, in one settlement a tab.

A settlement is a usage record for each request, one charge, and one payable for each node. The charge carries a digest
of the usage records, and so the chain covers them: BLAKE2b-256 over the records in the order of their ids, each as a
JSON array on a line of its own.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import msgspec

from embedmesh.rules.holds import Charge, Hold
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.end_hold import REVENUE, node_account
from embedmesh.storage.ledger.writes import Stats, Write, as_rows, later_ids
from embedmesh.storage.sql import HOLDS_SQL, TABS_SQL
from embedmesh.storage.times import MS_PER_DAY

Record = tuple[str, str, str, str, int, int | None, int, int, str | None, str | None]
"""What the digest covers: tab, request, model, node, tokens, price, cost, payable, user, meters."""
REQUEST, COST = itemgetter(1), itemgetter(6)
ENCODER = msgspec.json.Encoder()

logger = logging.getLogger(__name__)


class SettleRequest(Write):
    """Charge a request that was delivered under a tab. Where the tab has ended, nothing is charged: that is counted.

    Kept until it is durable: nobody waits for it, and it must not be lost. All of a batch are settled together.
    """

    def __init__(self, tab_id: str, hold: Hold, charge: Charge) -> None:
        self.tab_id = tab_id
        self.hold = hold
        self.charge = charge
        self._settled_ids: Callable[[], frozenset[str]] = frozenset  # of all tabs that were settled with this one
        self._tried = False  # then nobody may know whether it was settled
        self._twice = False  # the batch has the request already
        self._settled = False

    @classmethod
    def prepare_all(cls, db: Db, now_ms: int, writes: "Sequence[SettleRequest]") -> set[str]:
        accounts = {write.hold.account_id for write in writes}
        accounts.add(REVENUE)
        for write in writes:
            if write.charge.payables:
                accounts.update(node_account(payable.node_id) for payable in write.charge.payables)
        return accounts

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[SettleRequest]") -> None:
        settling = {write.hold.hold_id: write for write in writes}
        if len(settling) < len(writes):
            for write in writes:
                write._twice = settling[write.hold.hold_id] is not write
        if tried := [write for write in settling.values() if write._tried]:
            for hold_id in _settled_before(db, tried):
                settling.pop(hold_id)._settled = True
        if not settling:
            return
        for write in settling.values():
            write._tried = True
        settled_ids = _settle(db, now_ms, settling.values())
        for write in settling.values():
            write._settled_ids = settled_ids

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[SettleRequest]") -> None:
        for write in writes:
            if not write._settled:
                write._settled = write.tab_id in write._settled_ids()

    def committed(self, stats: Stats) -> None:
        if self._twice:
            return
        if self._settled:
            stats.captured += 1
            return
        stats.late_captures += 1
        logger.warning(
            "tab %s had ended before request %s was settled: delivered, not charged", self.tab_id, self.hold.hold_id
        )


def digest_of(records: Iterable[Record]) -> str:
    """The digest of a settlement's usage records, in hex; they are in the order of their ids."""
    return _digest(ENCODER.encode_lines(records))


def _digest(lines: bytes) -> str:
    return hashlib.blake2b(lines, digest_size=32, person=b"embedmesh settle").hexdigest()


def _settled_before(db: Db, writes: Sequence[SettleRequest]) -> set[str]:
    """The requests that were settled: a batch that failed may be durable, where its connection was lost."""
    rows = as_rows([(write.hold.hold_id, write.tab_id) for write in writes])
    return {hold_id for (hold_id,) in db.execute(TABS_SQL["settled_before"], rows).fetchall()}


def _settle(db: Db, now_ms: int, writes: Iterable[SettleRequest]) -> Callable[[], frozenset[str]]:
    """Settle those of some requests whose tabs are live, and nothing of the others. Returns the ids of these tabs.

    No statement needs what another has found, so that they are sent together.
    """
    records: dict[str, list[Record]] = {}
    shares: dict[tuple[str, str], int] = {}  # by tab and node
    accounts: dict[str, str] = {}
    for write in writes:
        charge, hold, tab_id = write.charge, write.hold, write.tab_id
        payable = 0
        for each in charge.payables:
            to = tab_id, node_account(each.node_id)
            shares[to] = shares.get(to, 0) + each.nanousd
            payable += each.nanousd
        record = (
            *(tab_id, hold.hold_id, charge.model, charge.node_id, charge.tokens, charge.price, charge.cost_nanousd),
            *(payable, charge.user_hash, msgspec.json.encode(charge.meters).decode() if charge.meters else None),
        )
        if tab_id in records:
            records[tab_id].append(record)
        else:
            records[tab_id] = [record]
            accounts[tab_id] = hold.account_id
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
