"""Acts: what operators change, and accounts of their own keys. Each is a row of the audit: who, what, from where."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

ACT_VALUE_CHARS_MAX = 400  # of one value in a row, as JSON: a row is kept for ever; a list of models may have 10 kB
CUT = "…"


class Verb(StrEnum):
    """What can be done. `docs/how-to/audit.md` says it of each."""

    ACCOUNT_CREATE = "account.create"
    ACCOUNT_CHANGE = "account.change"
    ACCOUNT_CREDIT = "account.credit"
    REQUEST_REFUND = "request.refund"
    NODE_PAYOUT = "node.payout"
    KEY_CREATE = "key.create"
    KEY_CHANGE = "key.change"
    KEY_ROTATE = "key.rotate"
    KEY_REVOKE = "key.revoke"
    KEY_DEFAULTS_CHANGE = "key_defaults.change"
    PRICE_SET = "price.set"
    PRICE_END = "price.end"
    INVITE_CREATE = "invite.create"
    INVITE_REVOKE = "invite.revoke"
    NODE_ADD = "node.add"
    NODE_APPROVE = "node.approve"
    NODE_DRAIN = "node.drain"
    NODE_RESUME = "node.resume"
    NODE_READMIT = "node.readmit"
    NODE_REMOVE = "node.remove"
    NODE_TRUST = "node.trust"
    NODE_DISTRUST = "node.distrust"
    NODE_WEIGHT = "node.weight"
    SETTINGS_RELOAD = "settings.reload"


class Actor(msgspec.Struct, frozen=True):
    """Who acts, and from where.

    `name` is the id of a key, `oidc:ISSUER#SUBJECT`, or `user:NAME` for a user of the machine `origin`. For the others
    `origin` is the address that their request came from, and `request_id` its x-request-id.
    """

    name: str
    origin: str
    request_id: str = ""


class Act(msgspec.Struct, frozen=True):
    """One thing that was done, to the object of that id. `changes`: name -> value, or [old, new] of what was changed.

    Never a secret, nor a text that a person wrote freely: a row cannot be deleted.
    """

    verb: Verb
    object_id: str
    changes: Mapping[str, Any] = {}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Name -> [old, new], of what is not the same."""
    return {name: [before.get(name), value] for name, value in after.items() if before.get(name) != value}


def changes_text(changes: Mapping[str, Any]) -> str:
    """Changes as JSON; a value that is too long becomes the beginning of its JSON, as a text that ends in CUT."""
    bounded = {
        name: list(map(_bounded, value)) if isinstance(value, list) else _bounded(value)
        for name, value in changes.items()
    }
    return msgspec.json.encode(bounded).decode()


def _bounded(value: Any) -> Any:
    text = msgspec.json.encode(value).decode()
    return value if len(text) <= ACT_VALUE_CHARS_MAX else text[:ACT_VALUE_CHARS_MAX] + CUT
