"""The shapes of accounts, keys and money. Where a struct decodes what is sent, its schema is the struct's own."""

from embedmesh.gateway.api.key_bodies import KeyChange, KeyLimits, KeyRequest, OwnKeyRequest, RotateRequest
from embedmesh.gateway.api.money_api import (
    AccountChange,
    AccountRequest,
    CreditRequest,
    PayoutRequest,
    PriceRequest,
    RefundRequest,
)
from embedmesh.gateway.api.openapi.shapes import (
    COUNT,
    FLAG,
    TEXT,
    Json,
    list_of,
    of_structs,
    or_null,
    page_of,
    ref,
    whole,
)
from embedmesh.storage.books.keys import SCOPES

STRUCTS = (
    AccountRequest,
    AccountChange,
    CreditRequest,
    RefundRequest,
    PayoutRequest,
    PriceRequest,
    KeyLimits,
    KeyRequest,
    OwnKeyRequest,
    KeyChange,
    RotateRequest,
)
AMOUNT: Json = {"type": "integer", "description": "Nano-USD (1e-9 USD); below 0 what went."}
PRICE: Json = COUNT | {"description": "Nano-USD a million tokens."}
AVAILABLE: Json = {"type": "integer", "description": "What may be held for further requests: all that is not held."}
CACHE = ref("CachePolicy")


def money_schemas() -> Json:
    """All of them, by name."""
    asked = of_structs(STRUCTS)
    asked["AccountChange"]["minProperties"] = 1
    return asked | _accounts() | _keys() | _reports()


def _accounts() -> Json:
    amounts = {
        "balance_nanousd": {"type": "integer"},
        "held_nanousd": COUNT | {"description": "For requests that are running."},
        "credit_limit_nanousd": COUNT | {"description": "How much may be owed; 0 is prepaid."},
        "available_nanousd": AVAILABLE,
    }
    kind = {"type": "string", "description": "`customer`, `node`, or what our own accounts are for."}
    return {
        "OwnAccount": whole({"id": TEXT, **amounts, "cache": CACHE}),
        "Account": whole({"id": TEXT, "kind": kind, **amounts, "cache": CACHE, "created_ms": COUNT}),
        "AccountPage": page_of("Account"),
        "Moved": whole(
            {
                "applied": FLAG | {"description": "Whether it was done now, and not before under the same reference."},
                "amount_nanousd": {"type": "integer"},
                "reference": TEXT,
            }
        ),
        "Payable": whole({"node_id": TEXT, "balance_nanousd": {"type": "integer"}}),
        "PayableList": list_of("Payable"),
        "Price": whole(
            {
                "price_id": COUNT,
                "model": TEXT,
                "account": or_null(TEXT) | {"description": "Null: for all accounts."},
                "price": PRICE,
                "from_ms": COUNT,
                "to_ms": or_null(COUNT),
            }
        ),
        "PricePage": page_of("Price"),
        "EndedPrice": whole({"model": TEXT, "account": or_null(TEXT), "ended": {"const": True}}),
    }


def _keys() -> Json:
    limit = or_null(COUNT) | {"description": "Null: no limit."}
    numbers = ("requests_a_minute", "tokens_a_minute", "concurrency", "budget_day", "budget_month")
    key = {
        "key_id": TEXT,
        "account": TEXT,
        "name": TEXT,
        "scopes": {"type": "array", "items": {"enum": sorted(SCOPES)}},
        "state": {"enum": ["active", "expired", "revoked"]},
        "created_ms": COUNT,
        "expires_ms": or_null(COUNT),
        "revoked_ms": or_null(COUNT),
        "rotated_to": or_null(TEXT) | {"description": "The key that takes its place."},
        "parent_id": or_null(TEXT)
        | {"description": "The key that made it, or took its place: it draws from that one's limits and budgets, too."},
        "last_used_ms": or_null(COUNT) | {"description": "Written down about twice a minute."},
        "limits": ref("Limits"),
    }
    models = {"type": "array", "items": TEXT, "description": "Ids of models; none are: all."}
    return {
        "Limits": whole({"models": models, **dict.fromkeys(numbers, limit)}),
        "Key": whole(key, additionalProperties=False),
        "KeyPage": page_of("Key"),
        "NewKey": whole(
            {**key, "key": TEXT | {"description": "What requests bring. It is not shown again."}},
            additionalProperties=False,
        ),
    }


def _reports() -> Json:
    day = {"type": "string", "format": "date"}
    move = {"kind": TEXT, "amount_nanousd": AMOUNT, "source_id": TEXT, "target_id": TEXT}
    return {
        "Usage": whole(
            {"date": day, "model": TEXT, "key_id": TEXT, "requests": COUNT, "tokens": COUNT, "cost_nanousd": COUNT}
        ),
        "UsageList": page_of("Usage", **{"from": day, "to": day}),
        "Entry": whole(
            {"entry_id": COUNT, **move, "request_id": or_null(TEXT), "reference": or_null(TEXT), "created_ms": COUNT}
        ),
        "EntryPage": page_of("Entry", next=or_null(COUNT) | {"description": "`before` of the next page."}),
        "Explained": whole(
            {
                "request_id": TEXT,
                "account": TEXT,
                "key_id": or_null(TEXT),
                "held_nanousd": COUNT,
                "state": {"enum": ["open", "captured", "released"]},
                "ended_by": or_null(TEXT),
                "captured_nanousd": or_null(COUNT),
                "gateway": TEXT,
                "created_ms": COUNT,
                "deadline_ms": COUNT,
                "ended_ms": or_null(COUNT),
                "bought": {"anyOf": [ref("Bought"), {"type": "null"}]},
                "moves": {"type": "array", "items": ref("Move")},
            }
        ),
        "Bought": whole(
            {
                "key_id": TEXT,
                "model": TEXT,
                "node_id": TEXT,
                "tokens": COUNT,
                "price": or_null(PRICE),
                "cost_nanousd": COUNT,
                "payable_nanousd": COUNT | {"description": "What its nodes have earned with it."},
                "user_hash": or_null(TEXT),
            },
            description="What was bought; told as long as usage is kept.",
        ),
        "Move": whole({"transfer_id": COUNT, **move, "reference": or_null(TEXT), "created_ms": COUNT}),
        "LedgerReport": whole(
            {
                "ok": FLAG,
                "promises": {"type": "array", "items": TEXT, "description": "What was looked at."},
                "broken": {"type": "array", "items": whole(dict.fromkeys(("promise", "subject", "detail"), TEXT))},
                "tallies": {"type": "object", "additionalProperties": COUNT},
                "recovered": {
                    "type": "array",
                    "items": whole({"hold_id": TEXT, "account_id": TEXT, "amount_nanousd": COUNT, "ended_ms": COUNT}),
                    "description": "In flight at a crash, and not charged.",
                },
                "head": {"type": "object", "description": "The end of the chain over all entries."},
            }
        ),
    }
