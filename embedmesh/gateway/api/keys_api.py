"""`/v1/admin/keys`: the keys of all accounts."""

from typing import Annotated

import msgspec
from msgspec import UNSET

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.key_bodies import KeyChange, KeyRequest, RotateRequest, given
from embedmesh.gateway.api.queries import PAGE_ROWS, Limit, NonEmpty
from embedmesh.gateway.api.replies import KeyReply, NewKey, ReplyPage, doc, key_reply, new_key, page_of
from embedmesh.gateway.api.routes import ADMIN_KEY, READ_KEY, Api, ApiCall, Route
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import ModelNotFound, NotFound
from embedmesh.rules.limits import ACCOUNT_KEYS_MAX
from embedmesh.rules.ports import Catalogue, Clock
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import Key


class KeyQuery(msgspec.Struct, frozen=True):
    limit: Limit = PAGE_ROWS
    after: Annotated[NonEmpty | None, doc("The id of the last key of the page before.")] = None


class AnyKeyQuery(KeyQuery, frozen=True):
    account: Annotated[str | None, doc("Whose keys; by default those of all accounts.")] = None


class KeysApi(Api):
    TAG = "Administration"

    def __init__(self, books: BooksThread, bodies: BodyBudget, clock: Clock, catalogue: Catalogue) -> None:
        self._books = books
        self.bodies = bodies
        self._clock = clock
        self._catalogue = catalogue

    async def list_all_keys(self, call: ApiCall[None, AnyKeyQuery]) -> ReplyPage[KeyReply]:
        """List keys. Of one account or of all, the oldest first, revoked and expired keys included."""
        query = call.query
        found = await self._books.ask(
            lambda books: keys_after(books, query.account, query.after, query.limit), viewer=call.viewer
        )
        return page_of(found, query.limit, self._reply)

    async def create_any_key(self, call: ApiCall[KeyRequest, None]) -> NewKey:
        """Create a key.

        For any account, with any scopes. Its secret is shown only once. Limits that are not given are those of the
        gateway's `--key-defaults`.
        """
        new = call.body

        def make(books: Books) -> tuple[Key, str]:
            limits = new.limits.over(books.new_keys.read().limits, self._catalogue)
            expires_ms = None if new.expires_ms is UNSET else new.expires_ms
            return books.keys.create(new.account, new.scopes, name=new.name, expires_ms=expires_ms, limits=limits)

        return new_key(*await self._books.ask(make, by=call.by), self._clock.unix_ms())

    async def get_key(self, call: ApiCall[None, None]) -> KeyReply:
        """Get a key."""
        return self._reply(await self._books.ask(lambda books: books.keys.find(call.parameter), viewer=call.viewer))

    async def change_key(self, call: ApiCall[KeyChange, None]) -> KeyReply:
        """Change a key. Its name, its expiry or its limits. Fields that are not given stay as they are."""
        changes = given(call.body)

        def write(books: Books) -> Key:
            if call.body.limits is not UNSET:
                changes["limits"] = call.body.limits.over(books.keys.find(call.parameter).limits, self._catalogue)
            return books.keys.change(call.parameter, **changes)

        return self._reply(await self._books.ask(write, by=call.by))

    async def rotate_key(self, call: ApiCall[RotateRequest, None]) -> NewKey:
        """Replace a key.

        The new key may do the same and has spent what the old one has. The old one ends later, so that nobody is locked
        out; until then it shares the new key's limits.
        """
        new = await self._books.ask(
            lambda books: books.keys.rotate(call.parameter, overlap_s=call.body.overlap_s), by=call.by
        )
        return new_key(*new, self._clock.unix_ms())

    async def revoke_any_key(self, call: ApiCall[None, None]) -> KeyReply:
        """Revoke a key.

        The key and all keys that it made end at once, on every gateway. Revoking it again changes nothing.
        """
        return self._reply(await self._books.ask(lambda books: revoked(books, call.parameter), by=call.by))

    def _reply(self, key: Key) -> KeyReply:
        return key_reply(key, self._clock.unix_ms())

    ROUTES = (
        Route("GET", "/v1/admin/keys", READ_KEY, list_all_keys, failures=(NotFound,)),
        Route(
            "POST",
            "/v1/admin/keys",
            ADMIN_KEY,
            create_any_key,
            failures=(ModelNotFound, NotFound),
            details=f"An account has at most {ACCOUNT_KEYS_MAX:,} active keys.",
        ),
        Route("GET", "/v1/admin/keys/{key_id}", READ_KEY, get_key),
        Route("POST", "/v1/admin/keys/{key_id}", ADMIN_KEY, change_key, failures=(ModelNotFound,)),
        Route("DELETE", "/v1/admin/keys/{key_id}", ADMIN_KEY, revoke_any_key),
        Route("POST", "/v1/admin/keys/{key_id}/rotate", ADMIN_KEY, rotate_key, body_optional=True),
    )


def keys_after(books: Books, account_id: str | None, after: str | None, limit: int) -> list[Key]:
    """Keys of an account, or of all, oldest first; `limit` and one more if there are more. Raises NotFound."""
    if account_id is not None:
        books.accounts.find(account_id)
    last = None if after is None else books.keys.find(after, account_id=account_id)
    return list(books.keys.list(account_id, after=last, rows_max=limit + 1))


def revoked(books: Books, key_id: str, account_id: str | None = None) -> Key:
    """The key, of that account if one is given, revoked now or before. Raises NotFound."""
    books.keys.find(key_id, account_id=account_id)
    books.keys.revoke(key_id)
    return books.keys.find(key_id)
