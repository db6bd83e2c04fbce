"""`/v1/account`: what an account sees of itself with any of its keys, and the keys that a key of it can make."""

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

from aiohttp import web
from msgspec import UNSET

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.callers import ADMIN_SCOPE, account_of, for_keys, in_room
from embedmesh.gateway.api.key_bodies import OwnKeyRequest
from embedmesh.gateway.api.keys_api import list_keys, revoke
from embedmesh.gateway.api.queries import day, number, page, query_of, rest_of, rows_of
from embedmesh.gateway.api.serializers import shown, shown_account, shown_key
from embedmesh.http.bodies import CALLER, decoded, json_reply, small_body
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import Routes
from embedmesh.rules.errors import InsufficientScope, InvalidValue
from embedmesh.rules.ports import Catalogue, Clock, Keys, RateLimits
from embedmesh.rules.shares import Room
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import Key
from embedmesh.storage.books.reports import ENTRY_MAX, Usage

KEYS_SCOPE = "keys"
USAGE_DAYS = 30  # where nobody says how many
USAGE_DAYS_MAX = 366
USAGE_ROWS_MAX = 10_000  # a day, model and key each
CALLS_MAX = 64  # until their replies are read, of which the largest have two megabytes
EPOCH = date(1970, 1, 1)
OWN = ("id", "balance_nanousd", "held_nanousd", "credit_limit_nanousd", "available_nanousd", "cache")

T = TypeVar("T")


class AccountApi:
    """Handlers for callers. Each sees the account of its own key, and no other."""

    def __init__(
        self,
        keys: Keys,
        rate_limits: RateLimits,
        books: BooksThread,
        bodies: BodyBudget,
        clock: Clock,
        catalogue: Catalogue,
    ) -> None:
        self._keys = keys
        self._allowances = rate_limits
        self._books = books
        self._room = Room(
            CALLS_MAX, f"{CALLS_MAX} calls at one time may be here, of each account a share of that. Try again shortly."
        )
        self._bodies = bodies
        self._clock = clock
        self._catalogue = catalogue

    def routes(self) -> Routes:
        """The paths for callers: some for any key, some for those with the scope `keys`."""
        own = {
            "/v1/account": {"GET": self.account},
            "/v1/account/usage": {"GET": self.usage},
            "/v1/account/entries": {"GET": self.entries},
        }
        keys = {
            "/v1/account/keys": {"GET": self.keys, "POST": self.create},
            "/v1/account/keys/*": {"DELETE": self.revoke},
        }
        return {
            **for_keys(self._keys, in_room(self._room, own, account_of), rate_limits=self._allowances),
            **for_keys(self._keys, in_room(self._room, keys, account_of), KEYS_SCOPE, rate_limits=self._allowances),
        }

    async def account(self, request: web.BaseRequest) -> web.StreamResponse:
        """What there is, what is held, what may be spent, and whether answers may come from the cache."""
        account_id = request[CALLER].account_id
        row = shown_account(await self._ask(request, lambda books: books.accounts.find(account_id)))
        return json_reply({name: row[name] for name in OWN})

    async def usage(self, request: web.BaseRequest) -> web.StreamResponse:
        """What was used, by day, model and key."""
        account_id = request[CALLER].account_id
        query = query_of(request, "from", "to")
        last = day(query, "to", datetime.fromtimestamp(self._clock.unix_ms() / 1000, UTC).date())
        first = day(query, "from", last - timedelta(USAGE_DAYS - 1))
        days = (last - first).days + 1
        if not 1 <= days <= USAGE_DAYS_MAX:
            raise InvalidValue(f"From `from` to `to` are 1 to {USAGE_DAYS_MAX} days, both included.", param="from")
        span = (first - EPOCH).days, (last - EPOCH).days
        found: Sequence[Usage] = await self._ask(
            request, lambda books: books.reports.usage(account_id, *span, rows_max=USAGE_ROWS_MAX + 1)
        )
        listed = page(found, USAGE_ROWS_MAX, _shown_usage)
        return json_reply({**listed, "from": first.isoformat(), "to": last.isoformat()})

    async def entries(self, request: web.BaseRequest) -> web.StreamResponse:
        """A page of what came and went, the latest first."""
        account_id = request[CALLER].account_id
        query = query_of(request, "before", "limit")
        before, limit = number(query, "before", ENTRY_MAX, most=ENTRY_MAX), rows_of(query)
        found = await self._ask(
            request, lambda books: books.reports.entries(account_id, before=before, rows_max=limit + 1)
        )
        listed = page(found, limit, shown)
        return json_reply({**listed, "next": found[limit - 1].entry_id if listed["has_more"] else None})

    async def keys(self, request: web.BaseRequest) -> web.StreamResponse:
        """A page of the account's keys."""
        account_id = request[CALLER].account_id
        query = query_of(request, "limit", "after")
        limit = rows_of(query)
        found = await self._ask(request, lambda books: list_keys(books, account_id, query.get("after"), limit))
        return json_reply(page(found, limit, self._shown))

    async def create(self, request: web.BaseRequest) -> web.StreamResponse:
        """A new key of the account. It is shown once, can do no more than the one that makes it, and draws from it."""
        caller = request[CALLER]
        asked = decoded(await small_body(request, self._bodies), OwnKeyRequest)

        def make(books: Books) -> tuple[Key, str]:
            own = books.keys.find(caller.key_id)
            limits = asked.limits.over(books.new_keys.read().limits.within(own.limits), self._catalogue)
            expires_ms = own.expires_ms if asked.expires_ms is UNSET else asked.expires_ms
            return books.keys.create_below(
                own.key_id, asked.scopes, name=asked.name, expires_ms=expires_ms, limits=limits
            )

        return json_reply(self._shown(*await self._ask(request, make)))

    async def revoke(self, request: web.BaseRequest) -> web.StreamResponse:
        """Make a key of the account useless at once; harmless where it was revoked before."""
        caller, key_id = request[CALLER], rest_of(request)

        def end(books: Books) -> Key:
            scopes = books.keys.find(key_id, account_id=caller.account_id).scopes
            if ADMIN_SCOPE in scopes and ADMIN_SCOPE not in caller.scopes:
                raise InsufficientScope("A key with the scope `admin` is revoked by the operator, or by such a key.")
            return revoke(books, key_id, caller.account_id)

        return json_reply(self._shown(await self._ask(request, end)))

    async def _ask(self, request: web.BaseRequest, do: Callable[[Books], T]) -> T:
        return await self._books.ask(do, account_of(request))

    def _shown(self, key: Key, token: str | None = None) -> dict[str, Any]:
        return shown_key(key, self._clock.unix_ms(), token)


def _shown_usage(row: Usage) -> dict[str, Any]:
    rest = shown(row)
    return {"date": (EPOCH + timedelta(rest.pop("day"))).isoformat(), **rest}
