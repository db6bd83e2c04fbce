"""Charging holds that were captured: customer to revenue, the nodes' shares from there, and a usage record."""

from collections.abc import Sequence
from typing import Any

import msgspec

from embedmesh.rules.holds import Charge, Hold
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.writes import as_rows
from embedmesh.storage.sql import HOLDS_SQL
from embedmesh.storage.times import MS_PER_DAY

REVENUE = "revenue"


def node_account(node_id: str) -> str:
    """The account of what a node has earned."""
    return f"node:{node_id}"


def accounts_of(hold: Hold, charge: Charge) -> set[str]:
    """Whose money a charge moves."""
    return {hold.account_id, REVENUE, *(node_account(payable.node_id) for payable in charge.payables)}


def charge_holds(db: Db, now_ms: int, charges: Sequence[tuple[Hold, Charge]]) -> None:
    """Record all that follows from a capture, of those of some holds that were captured just now.

    No statement needs what another has found, so that they are sent together.
    """
    transfers, usage, nodes = [], [], set()
    for hold, charge in charges:
        transfers.append(_transfer("charge", hold.account_id, REVENUE, charge.cost_nanousd, hold))
        for payable in charge.payables:
            nodes.add(node := node_account(payable.node_id))
            transfers.append(_transfer("payable", REVENUE, node, payable.nanousd, hold))
        usage.append(_usage(hold, charge))
    if nodes:
        made = as_rows([{"account_id": node} for node in sorted(nodes)])
        db.execute(HOLDS_SQL["insert_nodes"], made | {"now_ms": now_ms})
    db.execute(HOLDS_SQL["insert_transfers"], as_rows(transfers) | {"now_ms": now_ms})
    db.execute(HOLDS_SQL["insert_usage"], as_rows(usage) | {"day": now_ms // MS_PER_DAY})


def _transfer(kind: str, source: str, target: str, amount: int, hold: Hold) -> dict[str, Any]:
    return {"kind": kind, "source_id": source, "target_id": target, "amount": amount, "hold_id": hold.hold_id}


def _usage(hold: Hold, charge: Charge) -> dict[str, Any]:
    return {
        "hold_id": hold.hold_id,
        "account_id": hold.account_id,
        "key_id": charge.key_id,
        "model": charge.model,
        "node_id": charge.node_id,
        "tokens": charge.tokens,
        "price": charge.price,
        "cost": charge.cost_nanousd,
        "payable": sum(payable.nanousd for payable in charge.payables),
        "user_hash": charge.user_hash,
        "meters": msgspec.json.encode(charge.meters).decode() if charge.meters else None,
    }
