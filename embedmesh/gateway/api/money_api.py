"""`/v1/admin`: accounts, prices, refunds and payouts. Every route needs a key with the scope `admin`."""

from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.key_bodies import Id, UnixMs
from embedmesh.gateway.api.queries import page, query_of, rest_of, rows_of
from embedmesh.gateway.api.serializers import shown, shown_account
from embedmesh.http.bodies import decoded, json_reply, small_body
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import Routes
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import InvalidValue, ModelNotFound, NotFound
from embedmesh.rules.limits import PAGE_ROWS_MAX, REFERENCE_CHARS_MAX
from embedmesh.rules.ports import Catalogue
from embedmesh.storage.books import Books
from embedmesh.storage.books.accounts import Account

CHECK_S = 60.0  # a million requests; a proxy waits no longer
CHECKS_MAX = 2  # one that runs, one that waits

Reference = Annotated[str, Meta(min_length=1, max_length=REFERENCE_CHARS_MAX, pattern=r"^[^\x00]*$")]


class AccountRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/accounts`. A credit limit of 0 is: prepaid."""

    id: str
    credit_limit_nanousd: int = 0
    cache: CachePolicy = CachePolicy.OFF


class AccountChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/accounts/{id}`: either or both. What is not named stays as it is."""

    credit_limit_nanousd: int | UnsetType = UNSET
    cache: CachePolicy | UnsetType = UNSET


class CreditRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/accounts/{id}/credits`: money that came, or (below 0) goes back; once for each reference."""

    amount_nanousd: int
    reference: Reference


class RefundRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/requests/{id}/refund`: null is all that was not given back yet; once for each reference."""

    reference: Reference
    amount_nanousd: int | None = None


class PayoutRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/payouts`: money that a node's operator was paid; once for each reference."""

    node: Id
    amount_nanousd: int
    reference: Reference


class PriceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/prices`: nano-USD per million tokens, for an account or for all, from now on or later."""

    model: str
    price: int
    account: Id | None = None
    from_ms: UnixMs | None = None


class MoneyApi:
    """Handlers for operators. `checks` are books for what takes long, so that nobody else waits for it."""

    def __init__(self, books: BooksThread, checks: BooksThread, bodies: BodyBudget, catalogue: Catalogue) -> None:
        self._books = books
        self._checks = checks
        self._bodies = bodies
        self._catalogue = catalogue

    def routes(self) -> Routes:
        """The paths for operators."""
        return {
            "/v1/admin/accounts": {"GET": self.accounts, "POST": self.create},
            "/v1/admin/accounts/*": {"GET": self.account, "POST": self.act},
            "/v1/admin/prices": {"GET": self.prices, "POST": self.set_price, "DELETE": self.end_price},
            "/v1/admin/requests/*": {"GET": self.explain, "POST": self.refund},
            "/v1/admin/payables": {"GET": self.payables},
            "/v1/admin/payouts": {"POST": self.pay_out},
            "/v1/admin/ledger": {"GET": self.check},
        }

    async def accounts(self, request: web.BaseRequest) -> web.StreamResponse:
        """A page of the accounts, our own and the nodes' among them."""
        query = query_of(request, "limit", "after")
        limit = rows_of(query)

        def look(books: Books) -> list[Account]:
            after = books.accounts.find(query["after"]) if "after" in query else None
            return list(books.accounts.list(after=after, rows_max=limit + 1))

        return json_reply(page(await self._books.ask(look), limit, shown_account))

    async def create(self, request: web.BaseRequest) -> web.StreamResponse:
        """A customer's new account."""
        asked = decoded(await small_body(request, self._bodies), AccountRequest)
        limit, cache = asked.credit_limit_nanousd, asked.cache
        made = await self._books.ask(
            lambda books: books.accounts.create(asked.id, credit_limit_nanousd=limit, cache=cache)
        )
        return json_reply(shown_account(made))

    async def account(self, request: web.BaseRequest) -> web.StreamResponse:
        """One account."""
        account_id = rest_of(request)
        return json_reply(shown_account(await self._books.ask(lambda books: books.accounts.find(account_id))))

    async def act(self, request: web.BaseRequest) -> web.StreamResponse:
        """Change what holds for an account, or give it money."""
        account_id, _, what = rest_of(request).partition("/")
        body = await small_body(request, self._bodies)
        if what == "credits":
            asked = decoded(body, CreditRequest)
            amount = asked.amount_nanousd
            applied = await self._books.ask(lambda books: books.accounts.credit(account_id, amount, asked.reference))
            return json_reply(_moved(applied, amount, asked.reference))
        if what:
            raise NotFound("An account takes changes, or credits.")
        members = msgspec.structs.asdict(decoded(body, AccountChange))
        named = {name: value for name, value in members.items() if value is not UNSET}
        if not named:
            raise InvalidValue("Name what to change: `credit_limit_nanousd`, `cache`, or both.")
        changed = await self._books.ask(lambda books: books.accounts.change(account_id, **named))
        return json_reply(shown_account(changed))

    async def prices(self, request: web.BaseRequest) -> web.StreamResponse:
        """The latest prices that were set, of one model or of all."""
        query = query_of(request, "model")
        model = self._model_id(query["model"]) if "model" in query else None
        found = await self._books.ask(lambda books: books.prices.list(model, rows_max=PAGE_ROWS_MAX + 1))
        return json_reply(page(found, PAGE_ROWS_MAX, shown))

    async def set_price(self, request: web.BaseRequest) -> web.StreamResponse:
        """A new price."""
        asked = decoded(await small_body(request, self._bodies), PriceRequest)
        model = self._catalogue.find(asked.model)
        if model is None:
            raise ModelNotFound("The catalogue has no model of that name.", param="model")
        made = await self._books.ask(
            lambda books: books.prices.set(model.id, asked.price, account_id=asked.account, from_ms=asked.from_ms)
        )
        return json_reply(shown(made))

    async def end_price(self, request: web.BaseRequest) -> web.StreamResponse:
        """Let a price that was set end now."""
        query = query_of(request, "model", "account")
        if "model" not in query:
            raise InvalidValue("Name the model whose price is to end.", param="model")
        model, account = self._model_id(query["model"]), query.get("account")
        if not await self._books.ask(lambda books: books.prices.end(model, account_id=account)):
            raise NotFound("No price is set that could end.")
        return json_reply({"model": model, "account": account, "ended": True})

    async def explain(self, request: web.BaseRequest) -> web.StreamResponse:
        """A request, as the ledger knows it."""
        request_id = rest_of(request)
        found = await self._books.ask(lambda books: books.reports.explain(request_id))
        bought = None if found.bought is None else shown(found.bought)
        return json_reply({**shown(found), "bought": bought, "moves": [shown(move) for move in found.moves]})

    async def refund(self, request: web.BaseRequest) -> web.StreamResponse:
        """Give back what a request cost, or some of it."""
        request_id, _, what = rest_of(request).partition("/")
        if what != "refund":
            raise NotFound("A request can be refunded, no more.")
        asked = decoded(await small_body(request, self._bodies), RefundRequest)
        applied, amount = await self._books.ask(
            lambda books: books.accounts.refund(request_id, asked.amount_nanousd, asked.reference)
        )
        return json_reply(_moved(applied, amount, asked.reference))

    async def payables(self, request: web.BaseRequest) -> web.StreamResponse:
        """What each node has earned and was not paid out."""
        found = await self._books.ask(lambda books: books.accounts.payables())
        return json_reply({"object": "list", "data": [shown(row) for row in found]})

    async def pay_out(self, request: web.BaseRequest) -> web.StreamResponse:
        """Note that a node's operator was paid."""
        asked = decoded(await small_body(request, self._bodies), PayoutRequest)
        amount = asked.amount_nanousd
        applied = await self._books.ask(lambda books: books.accounts.pay_out(asked.node, amount, asked.reference))
        return json_reply(_moved(applied, amount, asked.reference))

    async def check(self, request: web.BaseRequest) -> web.StreamResponse:
        """Look at every promise of the ledger. For a large store `embedmesh ledger check` has more time."""
        report = await self._checks.ask(lambda books: books.check())
        return json_reply({"ok": report.ok, **msgspec.to_builtins(report)})

    def _model_id(self, name: str) -> str:
        """The id of a catalogue model; one that is no longer there is named by its id."""
        model = self._catalogue.find(name)
        return name if model is None else model.id


def _moved(applied: bool, amount_nanousd: int, reference: str) -> dict[str, object]:
    """`applied` is false where the same was done before, under the same reference."""
    return {"applied": applied, "amount_nanousd": amount_nanousd, "reference": reference}
