"""What routes reply about accounts, keys and money. Amounts are nano-USD and say so; times are Unix milliseconds.

The OpenAPI document names a schema after its struct, without the suffix `Reply`. All fields are always there.
"""

from collections.abc import Callable, Sequence
from datetime import date as Day
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from embedmesh.rules.caching import CachePolicy
from embedmesh.storage.books.keys import SCOPES, Key
from embedmesh.storage.ledger.acts import AuditHead
from embedmesh.storage.ledger.chain import ChainHead
from embedmesh.storage.ledger.check import Broken, Recovered

T = TypeVar("T")
Row = TypeVar("Row")


def doc(description: str) -> Meta:
    """A field's description in the OpenAPI document."""
    return Meta(description=description)


Count = Annotated[int, Meta(ge=0)]
Always = Annotated[bool, Meta(extra_json_schema={"const": True})]
Amount = Annotated[int, doc("Nano-USD (1e-9 USD); negative when money left.")]
TokenPrice = Annotated[int, Meta(ge=0, description="Nano-USD per million tokens.")]
LimitNumber = Annotated[Count | None, doc("Null: no limit.")]
KeyScope = Annotated[str, Meta(extra_json_schema={"enum": sorted(SCOPES)})]

JSON_NAMES = {
    "account_id": "account",
    "amount": "amount_nanousd",
    "captured": "captured_nanousd",
    "cost": "cost_nanousd",
    "held": "held_nanousd",
    "payable": "payable_nanousd",
}
"""Names in the books -> names in the API."""


class ReplyList(msgspec.Struct, Generic[T], frozen=True):
    """A whole list."""

    object: Literal["list"]
    data: list[T]


class ReplyPage(ReplyList[T], Generic[T], frozen=True):
    """One page of a list."""

    has_more: Annotated[bool, doc("Whether there is another page.")]


class OwnAccount(msgspec.Struct, frozen=True, rename={"account_id": "id"}):
    """An account, as its own keys see it."""

    account_id: str
    balance_nanousd: int
    held_nanousd: Annotated[Count, doc("Held for running requests, and by tabs for those to come.")]
    credit_limit_nanousd: Annotated[Count, doc("How much may be owed; 0 is prepaid.")]
    available_nanousd: Annotated[int, doc("What further requests may hold: balance + limit - held.")]
    cache: CachePolicy


class AccountReply(OwnAccount, frozen=True, rename={"account_id": "id"}):
    """An account, as operators see it."""

    kind: Annotated[str, doc("`customer`, `node`, or the purpose of one of our own accounts.")]
    created_ms: Count


class Moved(msgspec.Struct, frozen=True):
    """Money that was moved under a reference."""

    applied: Annotated[bool, doc("False if the same was done before under this reference.")]
    amount_nanousd: int
    reference: str


class PayableReply(msgspec.Struct, frozen=True):
    """What a node has earned and was not paid out."""

    node_id: str
    balance_nanousd: int


class PriceReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """A price that was set."""

    price_id: Count
    model: str
    account_id: Annotated[str | None, doc("Null: for all accounts.")]
    price: Annotated[Count, doc("Nano-USD per million tokens; of images and searches, for one.")]
    from_ms: Count
    to_ms: Count | None
    meter: Annotated[str, doc("`input`, `cached`, `output`, `searches`, or images of a size: `images:1024x1024`.")]


class EndedPrice(msgspec.Struct, frozen=True):
    """A price that ends now."""

    model: str
    account: str | None
    meter: str
    ended: Always


class LimitsReply(msgspec.Struct, frozen=True):
    """The limits of a key. Budgets are nano-USD; days are UTC."""

    models: Annotated[tuple[str, ...], doc("Ids of models; an empty list allows all.")]
    requests_a_minute: LimitNumber
    tokens_a_minute: LimitNumber
    concurrency: LimitNumber
    budget_day: LimitNumber
    budget_month: LimitNumber


class KeyReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=JSON_NAMES):
    """A key, without its secret."""

    key_id: str
    account_id: str
    name: str
    scopes: tuple[KeyScope, ...]
    state: Literal["active", "expired", "revoked"]
    created_ms: Count
    expires_ms: Count | None
    revoked_ms: Count | None
    rotated_to: Annotated[str | None, doc("The key that replaces it.")]
    parent_id: Annotated[str | None, doc("The key that made or replaced it, and whose limits and budgets it shares.")]
    last_used_ms: Annotated[Count | None, doc("Updated about twice a minute.")]
    limits: LimitsReply


class NewKey(KeyReply, frozen=True, forbid_unknown_fields=True, rename=JSON_NAMES):
    """A new key, with its secret."""

    key: Annotated[str, doc("The secret that requests send. It is shown only here.")]


class UsageReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """What a key used of a model on one day (UTC)."""

    date: Day
    model: str
    key_id: str
    requests: Count
    tokens: Count
    cost: Count


class UsageList(ReplyPage[UsageReply], frozen=True, rename={"from_date": "from", "to_date": "to"}):
    """Usage, the latest day first."""

    from_date: Day
    to_date: Day


class EntryReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """An entry of the ledger, as its account sees it."""

    entry_id: Count
    kind: str
    amount: Amount
    source_id: str
    target_id: str
    request_id: str | None
    reference: str | None
    created_ms: Count
    tab_id: Annotated[str | None, doc("The tab under which a charge was settled, or a refunded request was.")]
    requests: Annotated[Count | None, doc("How many requests a charge is for; null for what is no charge.")]


class EntryPage(ReplyPage[EntryReply], frozen=True):
    """One page of entries, the latest first."""

    next: Annotated[Count | None, doc("`before` of the next page.")]


class ChargedRequestReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """A request that an entry is the charge for; known as long as usage is kept."""

    request_id: str
    key_id: str
    model: str
    tokens: Count
    price: TokenPrice | None
    cost: Count


class StatementLineReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """An entry of a statement; what was bought is known as long as usage is kept.

    A charge of a tab is for several requests: it has the sum of their tokens, and the model and the price that all of
    them have in common.
    """

    entry_id: Count
    created_ms: Count
    kind: str
    amount: Amount
    request_id: str | None
    reference: str | None
    key_id: str | None
    model: str | None
    tokens: Count | None
    price: TokenPrice | None
    tab_id: str | None
    requests: Annotated[Count | None, doc("How many requests a charge is for; null for what is no charge.")]


class StatementPage(ReplyPage[StatementLineReply], frozen=True):
    """One page of a statement, in the order of the entries."""

    from_ms: Annotated[Count, doc("When the month begins.")]
    to_ms: Annotated[Count, doc("When the next month begins.")]
    opening_nanousd: Annotated[int | None, doc("The balance when the month began; null on all pages but the first.")]


class LedgerReport(msgspec.Struct, frozen=True):
    """What a check of the ledger found."""

    ok: bool
    head_known: Annotated[bool | None, doc("Whether the chain, or the audit, had the head that was asked for.")]
    promises: Annotated[list[str], doc("What was checked.")]
    broken: list[Broken]
    tallies: dict[str, Count]
    recovered: Annotated[list[Recovered], doc("In flight at a crash, and not charged.")]
    head: ChainHead
    audit: AuditHead


def reply_of(kind: type[T], row: object, **more: Any) -> T:
    """A reply with the row's fields of the same names, and `more`."""
    names = (name for name in kind.__struct_fields__ if name not in more)  # type: ignore[attr-defined]
    return kind(**{name: getattr(row, name) for name in names}, **more)


def page_of(rows: Sequence[Row], limit: int, reply: Callable[[Row], T]) -> ReplyPage[T]:
    """One page; `rows` has one more row than the page if there is another page."""
    return ReplyPage("list", [reply(row) for row in rows[:limit]], len(rows) > limit)


def key_reply(key: Key, now_ms: int) -> KeyReply:
    """A key, with its state."""
    return reply_of(KeyReply, key, **_computed(key, now_ms))


def new_key(key: Key, token: str, now_ms: int) -> NewKey:
    """A new key, with its secret."""
    return reply_of(NewKey, key, key=token, **_computed(key, now_ms))


def _computed(key: Key, now_ms: int) -> dict[str, Any]:
    expired = key.expires_ms is not None and key.expires_ms <= now_ms
    state = "revoked" if key.revoked_ms is not None else "expired" if expired else "active"
    return {"state": state, "limits": reply_of(LimitsReply, key.limits)}
