"""`/v1/admin/keys`: the keys of all accounts. Every route needs a key with the scope `admin`."""

from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.key_bodies import KeyChange, KeyRequest, RotateRequest
from embedmesh.gateway.api.queries import page, query_of, rest_of, rows_of
from embedmesh.gateway.api.serializers import shown_key
from embedmesh.http.bodies import decoded, json_reply, small_body
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import Routes
from embedmesh.rules.errors import NotFound
from embedmesh.rules.ports import Catalogue, Clock
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import Key


class KeysApi:
    """Handlers for operators."""

    def __init__(self, books: BooksThread, bodies: BodyBudget, clock: Clock, catalogue: Catalogue) -> None:
        self._books = books
        self._bodies = bodies
        self._clock = clock
        self._catalogue = catalogue

    def routes(self) -> Routes:
        """The paths for operators."""
        return {
            "/v1/admin/keys": {"GET": self.keys, "POST": self.create},
            "/v1/admin/keys/*": {"GET": self.key, "POST": self.act, "DELETE": self.revoke},
        }

    async def keys(self, request: web.BaseRequest) -> web.StreamResponse:
        """A page of the keys, of one account or of all."""
        query = query_of(request, "account", "limit", "after")
        limit = rows_of(query)
        found = await self._books.ask(lambda books: list_keys(books, query.get("account"), query.get("after"), limit))
        return json_reply(page(found, limit, self._shown))

    async def create(self, request: web.BaseRequest) -> web.StreamResponse:
        """A new key. It is shown once."""
        asked = decoded(await small_body(request, self._bodies), KeyRequest)

        def make(books: Books) -> tuple[Key, str]:
            limits = asked.limits.over(books.new_keys.read().limits, self._catalogue)
            expires_ms = None if asked.expires_ms is UNSET else asked.expires_ms
            return books.keys.create(asked.account, asked.scopes, name=asked.name, expires_ms=expires_ms, limits=limits)

        return json_reply(self._shown(*await self._books.ask(make)))

    async def key(self, request: web.BaseRequest) -> web.StreamResponse:
        """One key."""
        key_id = rest_of(request)
        return json_reply(self._shown(await self._books.ask(lambda books: books.keys.find(key_id))))

    async def act(self, request: web.BaseRequest) -> web.StreamResponse:
        """Change a key, or let another take its place."""
        key_id, _, action = rest_of(request).partition("/")
        body = await small_body(request, self._bodies)
        if action == "rotate":
            asked = decoded(body, RotateRequest) if body else RotateRequest()
            new = await self._books.ask(lambda books: books.keys.rotate(key_id, overlap_s=asked.overlap_s))
            return json_reply(self._shown(*new))
        if action:
            raise NotFound("One can change a key, or rotate it.")
        change = decoded(body, KeyChange)
        return json_reply(self._shown(await self._books.ask(lambda books: self._change(books, key_id, change))))

    async def revoke(self, request: web.BaseRequest) -> web.StreamResponse:
        """Make a key useless at once; harmless where it was revoked before."""
        key_id = rest_of(request)
        return json_reply(self._shown(await self._books.ask(lambda books: revoke(books, key_id))))

    def _change(self, books: Books, key_id: str, asked: KeyChange) -> Key:
        changes: dict[str, Any] = {
            name: value for name, value in msgspec.structs.asdict(asked).items() if value is not UNSET
        }
        if asked.limits is not UNSET:
            changes["limits"] = asked.limits.over(books.keys.find(key_id).limits, self._catalogue)
        return books.keys.change(key_id, **changes)

    def _shown(self, key: Key, token: str | None = None) -> dict[str, Any]:
        return shown_key(key, self._clock.unix_ms(), token)


def list_keys(books: Books, account_id: str | None, after: str | None, limit: int) -> list[Key]:
    """Keys of an account, or of all, oldest first; one more than `limit` where there are more. Raises NotFound."""
    if account_id is not None:
        books.accounts.find(account_id)
    last = None if after is None else books.keys.find(after, account_id=account_id)
    return list(books.keys.list(account_id, after=last, rows_max=limit + 1))


def revoke(books: Books, key_id: str, account_id: str | None = None) -> Key:
    """The key, of that account where one is named, revoked now or before. Raises NotFound."""
    books.keys.find(key_id, account_id=account_id)
    books.keys.revoke(key_id)
    return books.keys.find(key_id)
