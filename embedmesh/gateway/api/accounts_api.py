"""`/v1/admin/accounts`: customers, what they may owe, and what they paid."""

import functools
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.key_bodies import given
from embedmesh.gateway.api.queries import PAGE_ROWS, Limit, NonEmpty
from embedmesh.gateway.api.replies import (
    AccountReply,
    Moved,
    ReplyPage,
    StatementLineReply,
    StatementPage,
    doc,
    page_of,
    reply_of,
)
from embedmesh.gateway.api.routes import ADMIN_KEY, READ_KEY, Api, ApiCall, Route
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import InsufficientQuota, InvalidValue, NotFound
from embedmesh.rules.limits import REFERENCE_CHARS_MAX
from embedmesh.storage.books import Books
from embedmesh.storage.books.accounts import Account
from embedmesh.storage.books.reports import StatementLine
from embedmesh.storage.times import month_span_ms

Reference = Annotated[str, Meta(min_length=1, max_length=REFERENCE_CHARS_MAX, pattern=r"^[^\x00]*$")]


class AccountQuery(msgspec.Struct, frozen=True):
    limit: Limit = PAGE_ROWS
    after: Annotated[NonEmpty | None, doc("The id of the last account of the page before.")] = None


class StatementQuery(msgspec.Struct, frozen=True):
    month: Annotated[NonEmpty, doc("As 2026-11, UTC.")]
    limit: Limit = PAGE_ROWS
    after: Annotated[int, Meta(ge=0, description="The `entry_id` of the last line of the page before.")] = 0


class AccountRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new account. A credit limit of 0 is prepaid."""

    id: str
    credit_limit_nanousd: int = 0
    cache: CachePolicy = CachePolicy.OFF


class AccountChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the fields, or both. Fields that are not given stay as they are."""

    credit_limit_nanousd: int | UnsetType = UNSET
    cache: CachePolicy | UnsetType = UNSET


OneAccountChange = Annotated[AccountChange, Meta(extra_json_schema={"minProperties": 1})]


class CreditRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Money that came, or (negative) goes back; once for each reference."""

    amount_nanousd: int
    reference: Reference


_reply = functools.partial(reply_of, AccountReply)


class AccountsApi(Api):
    TAG = "Administration"

    def __init__(self, books: BooksThread, bodies: BodyBudget) -> None:
        self._books = books
        self.bodies = bodies

    async def list_accounts(self, call: ApiCall[None, AccountQuery]) -> ReplyPage[AccountReply]:
        """List accounts. The oldest first, our own accounts and those of nodes included."""
        limit, last = call.query.limit, call.query.after

        def read(books: Books) -> list[Account]:
            after = None if last is None else books.accounts.find(last)
            return list(books.accounts.list(after=after, rows_max=limit + 1))

        return page_of(await self._books.ask(read, viewer=call.viewer), limit, _reply)

    async def create_account(self, call: ApiCall[AccountRequest, None]) -> AccountReply:
        """Create an account. For a customer: prepaid or, with a credit limit, postpaid."""
        limit, cache = call.body.credit_limit_nanousd, call.body.cache
        return _reply(
            await self._books.ask(
                lambda books: books.accounts.create(call.body.id, credit_limit_nanousd=limit, cache=cache), by=call.by
            )
        )

    async def get_an_account(self, call: ApiCall[None, None]) -> AccountReply:
        """Get an account. Its balance, holds and credit limit, and whether its answers may come from the cache."""
        return _reply(await self._books.ask(lambda books: books.accounts.find(call.parameter), viewer=call.viewer))

    async def change_account(self, call: ApiCall[OneAccountChange, None]) -> AccountReply:
        """Change an account.

        Its credit limit, which cannot be less than it owes now; and whether its answers may come from the cache.
        """
        changes = given(call.body)
        if not changes:
            raise InvalidValue("Name what to change: `credit_limit_nanousd`, `cache`, or both.")
        return _reply(await self._books.ask(lambda books: books.accounts.change(call.parameter, **changes), by=call.by))

    async def credit_account(self, call: ApiCall[CreditRequest, None]) -> Moved:
        """Credit an account, or take money back.

        Once for each reference: `applied` is false if that was done before.
        """
        amount, reference = call.body.amount_nanousd, call.body.reference
        applied = await self._books.ask(
            lambda books: books.accounts.credit(call.parameter, amount, reference), by=call.by
        )
        return Moved(applied, amount, reference)

    async def get_statement(self, call: ApiCall[None, StatementQuery]) -> StatementPage:
        """Get an account's statement of a month.

        All entries, the oldest first, with what was bought; a page at a time.
        """
        month, limit, after = call.query.month, call.query.limit, call.query.after
        from_ms, to_ms = month_span_ms(month)

        def read(books: Books) -> tuple[Sequence[StatementLine], int | None]:
            opening = books.reports.balance_at(call.parameter, from_ms) if after == 0 else None
            return books.reports.statement(call.parameter, month, after=after, rows_max=limit + 1), opening

        found, opening = await self._books.ask(read, viewer=call.viewer)
        lines = [reply_of(StatementLineReply, line) for line in found[:limit]]
        return StatementPage("list", lines, len(found) > limit, from_ms, to_ms, opening)

    ROUTES = (
        Route("GET", "/v1/admin/accounts", READ_KEY, list_accounts, failures=(NotFound,)),
        Route("POST", "/v1/admin/accounts", ADMIN_KEY, create_account),
        Route("GET", "/v1/admin/accounts/{account_id}", READ_KEY, get_an_account),
        Route("POST", "/v1/admin/accounts/{account_id}", ADMIN_KEY, change_account),
        Route(
            "POST", "/v1/admin/accounts/{account_id}/credits", ADMIN_KEY, credit_account, failures=(InsufficientQuota,)
        ),
        Route("GET", "/v1/admin/accounts/{account_id}/statement", READ_KEY, get_statement),
    )
