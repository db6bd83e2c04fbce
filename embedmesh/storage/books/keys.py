"""Bearer keys: what a key may do, how often, for how much money, until when. Only a keyed hash of a key is kept.

A key may be made by another, its parent. What it uses counts against the limits and budgets of all keys above it, too,
so that making keys multiplies nothing; and it ends with them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from embedmesh.rules.acts import Verb, changed
from embedmesh.rules.errors import InsufficientScope, InvalidApiKey, InvalidValue, NotFound
from embedmesh.rules.ids import new_id
from embedmesh.rules.limits import (
    KEY_LIMIT_MAX,
    KEY_MODELS_MAX,
    KEY_NAME_CHARS_MAX,
    MODEL_ID_CHARS_MAX,
    PAGE_ROWS_MAX,
)
from embedmesh.rules.money import AMOUNT_MAX_NANOUSD
from embedmesh.storage.books.accounts import AccountBooks
from embedmesh.storage.books.key_family import check_depth, check_room, hand_over
from embedmesh.storage.books.session import BooksSession
from embedmesh.storage.db import Row
from embedmesh.storage.secrets.tokens import hash_token, make_token
from embedmesh.storage.sql import KEYS_SQL

OPERATOR_SCOPES = ("admin", "admin:read", "audit")  # which only operators give
SCOPES = frozenset({"embeddings", "generate", "keys", "metrics", *OPERATOR_SCOPES})
CALLER_SCOPES = ("embeddings", "generate")  # of a key for which none are named


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a key may do, besides its scopes. None is: no limit; no models: all. Budgets are nano-USD, days are UTC."""

    models: tuple[str, ...] = ()
    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None
    concurrency: int | None = None
    budget_day: int | None = None
    budget_month: int | None = None

    def within(self, outer: "Limits") -> "Limits":
        """The limits of `outer`, and these where it has none: for a new key that a key with `outer` makes."""
        theirs = {name: value for name, value in msgspec.structs.asdict(outer).items() if value not in (None, ())}
        return msgspec.structs.replace(self, **theirs)


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A bearer key as we know it: never the key itself. Times are Unix milliseconds."""

    key_id: str
    account_id: str
    name: str
    scopes: tuple[str, ...]
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None
    limits: Limits = Limits()
    rotated_to: str | None = None
    last_used_ms: int | None = None
    parent_id: str | None = None


class KeyBooks:
    """Keys of one store. Every method raises StoreUnavailable, too."""

    def __init__(self, session: BooksSession, accounts: AccountBooks, key_secret: bytes) -> None:
        self._session = session
        self._accounts = accounts
        self._key_secret = key_secret

    def create(
        self,
        account_id: str,
        scopes: Iterable[str],
        *,
        name: str = "",
        expires_ms: int | None = None,
        limits: Limits | None = None,
        parent_id: str | None = None,
    ) -> tuple[Key, str]:
        """A new key and its token, which nobody can show again. Raises NotFound, InvalidValue.

        A key that has a parent can do no more than that. Raises InsufficientScope, InvalidApiKey (the parent is no
        longer good), RateLimited, too.
        """
        key = Key(
            key_id=new_id("key", self._session.clock),
            account_id=account_id,
            name=name,
            scopes=tuple(sorted(set(scopes))),
            created_ms=self._session.clock.unix_ms(),
            expires_ms=expires_ms,
            limits=limits or Limits(),
            parent_id=parent_id,
        )
        with self._session.transaction(account_id):
            if parent_id is None:
                self._accounts.customer(account_id)
            else:
                parent = self.find(parent_id)
                if parent.revoked_ms is not None or (parent.expires_ms or key.created_ms + 1) <= key.created_ms:
                    raise InvalidApiKey("The API key was revoked, or is expired.")
                _check_narrower(parent, key)
                check_depth(self._session, parent_id)
            check_room(self._session, account_id, made_by_a_key=parent_id is not None)
            token = self._insert(key)
            self._session.note(Verb.KEY_CREATE, key.key_id, changed({}, _shown(key)))
            return key, token

    def create_below(
        self,
        parent_id: str,
        scopes: Iterable[str],
        *,
        name: str = "",
        expires_ms: int | None = None,
        limits: Limits | None = None,
    ) -> tuple[Key, str]:
        """A new key of the same account."""
        account_id = self.find(parent_id).account_id
        return self.create(account_id, scopes, name=name, expires_ms=expires_ms, limits=limits, parent_id=parent_id)

    def find(self, key_id: str, *, account_id: str | None = None) -> Key:
        """One key, of one account where it is named. Raises NotFound."""
        row = self._session.row(KEYS_SQL["one_key"], {"key_id": key_id})
        if row is None or account_id not in (None, row[1]):
            raise NotFound(f"There is no key {key_id[:64]}.")
        return _key(row)

    def list(
        self, account_id: str | None = None, *, after: Key | None = None, rows_max: int = PAGE_ROWS_MAX
    ) -> Sequence[Key]:
        """The keys of one account, or all; revoked and expired ones too. Oldest first, from `after` on."""
        page: dict[str, Any] = {"after_ms": -1, "after_id": "", "rows_max": rows_max}
        if after is not None:
            page |= {"after_ms": after.created_ms, "after_id": after.key_id}
        if account_id is None:
            rows = self._session.rows(KEYS_SQL["list_keys"], page)
        else:
            rows = self._session.rows(KEYS_SQL["keys_of_account"], page | {"account_id": account_id})
        return [_key(row) for row in rows]

    def change(self, key_id: str, **changes: Any) -> Key:
        """Another `name`, `expires_ms` or `limits` for a key. Raises NotFound, InvalidValue (such as: it was revoked).

        Keys below it end with it at the latest, and it with its parent.
        """
        account_id = self.find(key_id).account_id
        with self._session.transaction(account_id):
            before = self.find(key_id)
            key = msgspec.structs.replace(before, **changes)
            _check(key)
            ends_ms = None if key.parent_id is None else self.find(key.parent_id).expires_ms
            if ends_ms is not None and (key.expires_ms is None or key.expires_ms > ends_ms):
                raise InvalidValue(f"It ends with the key that it draws from, {key.parent_id}, at the latest.")
            if self._session.run(KEYS_SQL["change_key"], _columns(key)) == 0:
                raise InvalidValue(f"Key {key_id} is revoked.")
            if key.expires_ms is not None:
                row = {"account_id": account_id, "key_id": key_id, "expires_ms": key.expires_ms}
                self._session.run(KEYS_SQL["end_below"], row)
            renamed = {"name": "changed"} if key.name != before.name else {}
            self._session.note(Verb.KEY_CHANGE, key_id, changed(_shown(before), _shown(key)) | renamed)
            return key

    def revoke(self, key_id: str) -> bool:
        """Make a key useless at once, and all below it; False if there is no such key or it was revoked before.

        The key itself does not wait for a transaction that has locked the account.
        """
        row = {"key_id": key_id, "now_ms": self._session.clock.unix_ms()}
        with self._session.transaction():
            now = self._session.run(KEYS_SQL["revoke_key"], row) == 1
            if now:
                self._session.note(Verb.KEY_REVOKE, key_id, {})
        try:
            account_id = self.find(key_id).account_id
        except NotFound:
            return False
        with self._session.transaction(account_id):
            below = self._session.run(KEYS_SQL["revoke_below"], row | {"account_id": account_id})
            if below:
                self._session.note(Verb.KEY_REVOKE, key_id, {"keys_below": below})
        return now

    def rotate(self, key_id: str, *, overlap_s: int) -> tuple[Key, str]:
        """A new key in the place of this one, which ends later. Raises NotFound, InvalidValue.

        The new key may do the same, and has spent what this one has. All keys below this one, and this one for as long
        as it is good, are below the new one then.
        """
        now_ms = self._session.clock.unix_ms()
        with self._session.transaction(self.find(key_id).account_id):
            old = self.find(key_id)
            new = msgspec.structs.replace(
                old, key_id=new_id("key", self._session.clock), created_ms=now_ms, last_used_ms=None, rotated_to=None
            )
            ends = {"rotated_to": new.key_id, "now_ms": now_ms, "expires_ms": now_ms + overlap_s * 1000}
            if self._session.run(KEYS_SQL["rotate_key"], ends | {"key_id": key_id}) == 0:
                raise InvalidValue(f"Key {key_id} is revoked, expired, or was rotated before.")
            token = self._insert(new)
            hand_over(self._session, key_id, new.key_id)
            ended = {"rotated_to": new.key_id, "expires_ms": [old.expires_ms, self.find(key_id).expires_ms]}
            self._session.note(Verb.KEY_ROTATE, key_id, ended)
            return new, token

    def _insert(self, key: Key) -> str:
        _check(key)
        token = make_token("em_admin" if "admin" in key.scopes else "em", self._key_secret)
        row = {
            "account_id": key.account_id,
            "token_hash": hash_token(token, self._key_secret),
            "scopes": " ".join(key.scopes),
            "now_ms": key.created_ms,
            "parent_id": key.parent_id,
        }
        self._session.run(KEYS_SQL["insert_key"], _columns(key) | row)
        return token


def _check_narrower(own: Key, key: Key) -> None:
    """Raise InsufficientScope, which says what it is, where a new key could do what the key that makes it cannot."""
    if operators := [scope for scope in OPERATOR_SCOPES if scope in key.scopes]:
        words = f"No key gets the scope `{operators[0]}` here. The operator makes such keys."
        raise InsufficientScope(words, param="scopes")
    for scope in sorted(SCOPES.intersection(key.scopes).difference(own.scopes)):
        raise InsufficientScope(f"This API key cannot give the scope `{scope}`: it lacks it itself.", param="scopes")
    if own.limits.models and not (key.limits.models and set(key.limits.models) <= set(own.limits.models)):
        raise InsufficientScope(
            f"A key that this one makes is for models of its own: {', '.join(own.limits.models)}.",
            param="limits.models",
        )
    for name in Limits.__struct_fields__[1:]:
        _check_number(f"limits.{name}", getattr(own.limits, name), getattr(key.limits, name))
    _check_number("expires_ms", own.expires_ms, key.expires_ms)


def _check_number(name: str, own: int | None, wanted: int | None) -> None:
    """None is: no limit."""
    if own is not None and (wanted is None or wanted > own):
        raise InsufficientScope(f"`{name}` of a key that this one makes is at most its own: {own}.", param=name)


def _check(key: Key) -> None:
    """Raise InvalidValue for a key that cannot be."""
    if not key.scopes or not SCOPES.issuperset(key.scopes):
        raise InvalidValue(f"A key has at least one of the scopes {', '.join(sorted(SCOPES))}.", param="scopes")
    if len(key.name) > KEY_NAME_CHARS_MAX or "\0" in key.name:
        raise InvalidValue(f"A key's name has at most {KEY_NAME_CHARS_MAX} characters.", param="name")
    limits = key.limits
    if len(limits.models) > KEY_MODELS_MAX or any(
        not 0 < len(model) <= MODEL_ID_CHARS_MAX or not model.isprintable() for model in limits.models
    ):
        raise InvalidValue(f"A key may be for at most {KEY_MODELS_MAX} models, each named by its id.", param="models")
    for name in ("requests_a_minute", "tokens_a_minute", "concurrency"):
        value = getattr(limits, name)
        if value is not None and not 0 < value <= KEY_LIMIT_MAX:
            raise InvalidValue(f"`{name}` is at least 1 and at most {KEY_LIMIT_MAX:,}.", param=name)
    for name in ("budget_day", "budget_month"):
        value = getattr(limits, name)
        if value is not None and not 0 <= value <= AMOUNT_MAX_NANOUSD:
            raise InvalidValue(f"`{name}` is at least 0 and at most {AMOUNT_MAX_NANOUSD:,} nano-USD.", param=name)


def _shown(key: Key) -> dict[str, Any]:
    """What the audit has of a key: all but its name, which is a free text."""
    said = {"account": key.account_id, "scopes": key.scopes, "expires_ms": key.expires_ms, "parent": key.parent_id}
    return said | msgspec.structs.asdict(key.limits) | {"models": key.limits.models or None}


def _columns(key: Key) -> dict[str, Any]:
    row = {"key_id": key.key_id, "name": key.name, "expires_ms": key.expires_ms}
    return row | msgspec.structs.asdict(key.limits) | {"models": "\n".join(key.limits.models)}


def _key(row: Row) -> Key:
    """The columns stand in the order of the fields of Key, with those of Limits among them."""
    models = tuple(row[7].split("\n")) if row[7] else ()
    limits = Limits(**dict(zip(Limits.__struct_fields__, (models, *row[8:13]), strict=True)))
    fields = (*row[:3], tuple(row[3].split()), *row[4:7], limits, *row[13:])
    return Key(**dict(zip(Key.__struct_fields__, fields, strict=True)))
