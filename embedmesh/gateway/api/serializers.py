"""How accounts, keys and money are shown: amounts are nano-USD and say so, times are Unix milliseconds."""

from typing import Any

import msgspec

from embedmesh.storage.books.accounts import Account
from embedmesh.storage.books.keys import Key

NAMES = {
    "account_id": "account",
    "amount": "amount_nanousd",
    "captured": "captured_nanousd",
    "cost": "cost_nanousd",
    "held": "held_nanousd",
    "payable": "payable_nanousd",
}
"""Names of the books -> names of the API."""


def shown(row: msgspec.Struct) -> dict[str, Any]:
    """A row of the books."""
    return {NAMES.get(name, name): value for name, value in msgspec.structs.asdict(row).items()}


def shown_account(account: Account) -> dict[str, Any]:
    """An account, with what may be held for further requests."""
    row = msgspec.structs.asdict(account)
    return {"id": row.pop("account_id"), **row, "available_nanousd": account.available_nanousd}


def shown_key(key: Key, now_ms: int, token: str | None = None) -> dict[str, Any]:
    """A key; a new one with its token, this one time."""
    expired = key.expires_ms is not None and key.expires_ms <= now_ms
    state = "revoked" if key.revoked_ms is not None else "expired" if expired else "active"
    return {**shown(key), "state": state, **({} if token is None else {"key": token})}
