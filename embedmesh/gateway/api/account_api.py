"""`/v1/account`: what an account sees of itself with any of its keys, and the keys that its keys can create."""

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.key_bodies import OwnKeyRequest
from embedmesh.gateway.api.keys_api import KeyQuery, keys_after, revoked
from embedmesh.gateway.api.queries import PAGE_ROWS, Limit
from embedmesh.gateway.api.replies import (
    ChargedRequestReply,
    EntryPage,
    EntryReply,
    KeyReply,
    NewKey,
    OwnAccount,
    ReplyPage,
    UsageList,
    UsageReply,
    doc,
    key_reply,
    new_key,
    page_of,
    reply_of,
)
from embedmesh.gateway.api.routes import ADMIN_SCOPE, ANY_KEY, Api, ApiCall, Route, Scope, account_of, in_room
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import Handler
from embedmesh.rules.errors import InsufficientScope, InvalidValue, ModelNotFound, NotFound
from embedmesh.rules.limits import (
    ACCOUNT_CALLS_MAX,
    ACCOUNT_KEYS_A_DAY_MAX,
    ACCOUNT_KEYS_MAX,
    KEYS_ABOVE_MAX,
    USAGE_DAYS_MAX,
    USAGE_ROWS_MAX,
)
from embedmesh.rules.ports import Catalogue, Clock
from embedmesh.rules.shares import Room
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import OPERATOR_SCOPES, Key
from embedmesh.storage.books.reports import ENTRY_MAX, Usage

KEYS_SCOPE: Scope = ("keys",)
USAGE_DAYS = 30  # without `from`
EPOCH = date(1970, 1, 1)
ENTRY_ID = re.compile("[0-9]{1,18}")

T = TypeVar("T")


class UsageQuery(msgspec.Struct, frozen=True, rename={"first": "from", "last": "to"}):
    first: Annotated[date | None, doc(f"The first day; by default {USAGE_DAYS} days are shown.")] = None
    last: Annotated[
        date | None, doc(f"The last day, today by default; a query covers at most {USAGE_DAYS_MAX} days.")
    ] = None


class EntryQuery(msgspec.Struct, frozen=True):
    before: Annotated[int, Meta(ge=1, le=ENTRY_MAX, description="List entries before this one.")] = ENTRY_MAX
    limit: Limit = PAGE_ROWS


class RequestQuery(msgspec.Struct, frozen=True):
    after: Annotated[str, Meta(max_length=64, description="List requests after this one.")] = ""
    limit: Limit = PAGE_ROWS


class AccountApi(Api):
    """Handlers for callers. Each call sees the account of its own key, and no other."""

    TAG = "Account"

    def __init__(self, books: BooksThread, bodies: BodyBudget, clock: Clock, catalogue: Catalogue) -> None:
        self._books = books
        self._room = Room(
            ACCOUNT_CALLS_MAX,
            f"The gateway handles {ACCOUNT_CALLS_MAX} such calls at a time, shared among accounts. Try again shortly.",
        )
        self.bodies = bodies
        self._clock = clock
        self._catalogue = catalogue

    def bounded(self, handler: Handler) -> Handler:
        return in_room(self._room, handler, account_of)

    async def get_account(self, call: ApiCall[None, None]) -> OwnAccount:
        """Get your account.

        Its balance, what running requests hold, what further requests may hold, and whether answers may come from the
        cache.
        """
        account_id = call.caller.account_id
        return reply_of(OwnAccount, await self._ask(call, lambda books: books.accounts.find(account_id)))

    async def get_usage(self, call: ApiCall[None, UsageQuery]) -> UsageList:
        """List your account's usage. By day (UTC), model and key, the latest day first."""
        account_id, query = call.caller.account_id, call.query
        last = query.last or datetime.fromtimestamp(self._clock.unix_ms() / 1000, UTC).date()
        if min(last, query.first or last) < EPOCH:
            raise InvalidValue("No day before 1970 has usage.", param="from")
        first = query.first or last - timedelta(USAGE_DAYS - 1)
        if not 1 <= (last - first).days + 1 <= USAGE_DAYS_MAX:
            raise InvalidValue(f"`from` to `to` covers 1 to {USAGE_DAYS_MAX} days, both days included.", param="from")
        days = (first - EPOCH).days, (last - EPOCH).days
        found = await self._ask(call, lambda books: books.reports.usage(account_id, *days, rows_max=USAGE_ROWS_MAX + 1))
        page = page_of(found, USAGE_ROWS_MAX, _usage_reply)
        return UsageList(page.object, page.data, page.has_more, first, last)

    async def list_entries(self, call: ApiCall[None, EntryQuery]) -> EntryPage:
        """List your account's entries in the ledger. All money that came and went, the latest entry first."""
        account_id, query = call.caller.account_id, call.query
        found = await self._ask(
            call, lambda books: books.reports.entries(account_id, before=query.before, rows_max=query.limit + 1)
        )
        page = page_of(found, query.limit, lambda entry: reply_of(EntryReply, entry))
        return EntryPage(page.object, page.data, page.has_more, page.data[-1].entry_id if page.has_more else None)

    async def list_charged_requests(self, call: ApiCall[None, RequestQuery]) -> ReplyPage[ChargedRequestReply]:
        """List the requests of a charge.

        A charge is for one request, or for several that were settled together. They are listed by their ids, as long as
        usage is kept.
        """
        account_id, query = call.caller.account_id, call.query
        entry_id = int(call.parameter) if ENTRY_ID.fullmatch(call.parameter) else 0
        found = await self._ask(
            call,
            lambda books: books.reports.charged_requests(
                account_id, entry_id, after=query.after, rows_max=query.limit + 1
            ),
        )
        return page_of(found, query.limit, lambda request: reply_of(ChargedRequestReply, request))

    async def list_keys(self, call: ApiCall[None, KeyQuery]) -> ReplyPage[KeyReply]:
        """List your account's keys. The oldest first, revoked and expired keys included."""
        account_id, query = call.caller.account_id, call.query
        found = await self._ask(call, lambda books: keys_after(books, account_id, query.after, query.limit))
        return page_of(found, query.limit, self._reply)

    async def create_key(self, call: ApiCall[OwnKeyRequest, None]) -> NewKey:
        """Create a key.

        Its secret is shown only once. The new key can do no more than the key that creates it: no other scopes, no
        looser limits, no later expiry, and never the scope `admin`. Its usage also counts against the limits and
        budgets of that key, and it ends with it.
        """
        new = call.body

        def make(books: Books) -> tuple[Key, str]:
            own = books.keys.find(call.caller.key_id)
            limits = new.limits.over(books.new_keys.read().limits.within(own.limits), self._catalogue)
            expires_ms = own.expires_ms if new.expires_ms is UNSET else new.expires_ms
            return books.keys.create_below(own.key_id, new.scopes, name=new.name, expires_ms=expires_ms, limits=limits)

        made = await self._books.ask(make, call.caller.account_id, by=call.by)
        return new_key(*made, self._clock.unix_ms())

    async def revoke_key(self, call: ApiCall[None, None]) -> KeyReply:
        """Revoke a key.

        The key and all keys that it made end at once, on every gateway. Revoking it again changes nothing.
        """
        caller, key_id = call.caller, call.parameter

        def end(books: Books) -> Key:
            scopes = books.keys.find(key_id, account_id=caller.account_id).scopes
            if ADMIN_SCOPE not in caller.scopes and not set(scopes).isdisjoint(OPERATOR_SCOPES):
                raise InsufficientScope("Only the operator, or a key with the scope `admin`, can revoke such a key.")
            return revoked(books, key_id, caller.account_id)

        return self._reply(await self._books.ask(end, caller.account_id, by=call.by))

    async def _ask(self, call: ApiCall[Any, Any], do: Callable[[Books], T]) -> T:
        return await self._books.ask(do, call.caller.account_id)

    def _reply(self, key: Key) -> KeyReply:
        return key_reply(key, self._clock.unix_ms())

    ROUTES = (
        Route("GET", "/v1/account", ANY_KEY, get_account),
        Route("GET", "/v1/account/usage", ANY_KEY, get_usage),
        Route("GET", "/v1/account/entries", ANY_KEY, list_entries),
        Route("GET", "/v1/account/entries/{entry_id}/requests", ANY_KEY, list_charged_requests, failures=(NotFound,)),
        Route("GET", "/v1/account/keys", KEYS_SCOPE, list_keys, failures=(NotFound,)),
        Route(
            "POST",
            "/v1/account/keys",
            KEYS_SCOPE,
            create_key,
            failures=(ModelNotFound,),
            details=f"Keys create keys to a depth of {KEYS_ABOVE_MAX}, at most {ACCOUNT_KEYS_A_DAY_MAX:,} a day in one "
            f"account. An account has at most {ACCOUNT_KEYS_MAX:,} active keys.",
        ),
        Route("DELETE", "/v1/account/keys/{key_id}", KEYS_SCOPE, revoke_key),
    )


def _usage_reply(usage: Usage) -> UsageReply:
    return reply_of(UsageReply, usage, date=EPOCH + timedelta(usage.day))
