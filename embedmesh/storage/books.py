"""The operator's side of the store: accounts, credits, keys, checks and backups. Plain calls that block.

It has a connection of its own and works while a gateway runs; then each write waits for the gateway's batch.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import pysqlite3.dbapi2 as driver

from embedmesh.rules.errors import InsufficientQuota, InvalidValue, NotFound, StoreUnavailable
from embedmesh.rules.ids import new_id
from embedmesh.rules.money import AMOUNT_MAX_NANOUSD, format_usd
from embedmesh.rules.ports import Clock
from embedmesh.storage.backup import backup
from embedmesh.storage.check import CheckReport, check
from embedmesh.storage.connect import (
    OPEN_BUSY_S,
    Db,
    check_version,
    connect,
    is_empty,
    make_file,
    migrate,
    refuse_another_version,
)
from embedmesh.storage.secret import check_secret
from embedmesh.storage.sql import load
from embedmesh.storage.tokens import hash_token, make_token

ACCOUNTS = load("accounts.sql")
KEYS = load("keys.sql")
SCOPES = frozenset({"embeddings", "keys", "metrics", "admin"})
ACCOUNT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a colon would name one of our own accounts
REFERENCE_CHARS_MAX = 255
NAME_CHARS_MAX = 128


class Account(msgspec.Struct, frozen=True):
    """Where money is. Amounts are nano-USD."""

    account_id: str
    kind: str
    balance_nanousd: int
    held_nanousd: int
    created_ms: int

    @property
    def available_nanousd(self) -> int:
        """What may be held for further requests."""
        return self.balance_nanousd - self.held_nanousd


class Key(msgspec.Struct, frozen=True):
    """A bearer key as we know it: never the key itself. Times are Unix milliseconds."""

    key_id: str
    account_id: str
    name: str
    scopes: tuple[str, ...]
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None


class Books:
    """The books of one store. A context manager; `close` lets go of the file."""

    def __init__(self, db: Db, clock: Clock, key_secret: bytes) -> None:
        self._db = db
        self._clock = clock
        self._key_secret = key_secret

    @classmethod
    def open(cls, path: Path, *, clock: Clock, key_secret: bytes, migrating: bool = False) -> "Books":
        """Open or make the store. Raises SetupError, or StoreUnavailable if it cannot be written now.

        A store of another version is refused unless `migrating`: a gateway of that version may be using it.
        """
        check_version()
        make_file(path)
        db = connect(path, busy_s=OPEN_BUSY_S)
        try:
            if migrating or is_empty(db):
                migrate(db, path)
            else:
                refuse_another_version(db, path)
            books = cls(db, clock, key_secret)
            with books._transaction():
                check_secret(db, key_secret)
        except BaseException:
            db.close()
            raise
        return books

    def __enter__(self) -> "Books":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def create_account(self, account_id: str) -> Account:
        """Make a customer's account. Raises InvalidValue if the id is taken or is not one."""
        if not ACCOUNT_ID.fullmatch(account_id):
            raise InvalidValue("An account id has 1 to 64 letters, digits, dots, dashes or underscores.")
        with self._transaction():
            row = {"account_id": account_id, "kind": "customer", "now_ms": self._clock.unix_ms()}
            if self._run(ACCOUNTS["insert_account"], row).rowcount == 0:
                raise InvalidValue(f"There is an account {account_id} already.")
            return self.account(account_id)

    def account(self, account_id: str) -> Account:
        """One account. Raises NotFound."""
        row = self._run(ACCOUNTS["find_account"], {"account_id": account_id}).fetchone()
        if row is None:
            raise NotFound(f"There is no account {account_id}.")
        return Account(*row)

    def accounts(self) -> list[Account]:
        """All accounts, our own and the nodes' among them."""
        return [Account(*row) for row in self._run(ACCOUNTS["list_accounts"])]

    def credit(self, account_id: str, amount_nanousd: int, reference: str) -> bool:
        """Give (or, when negative, take back) money, once for each reference: False if that was applied before.

        Raises NotFound, InsufficientQuota (more is to be taken back than is available) and InvalidValue (a reference
        that was used for something else; no customer; an amount of nothing or too much).
        """
        if not 0 < abs(amount_nanousd) <= AMOUNT_MAX_NANOUSD:
            raise InvalidValue(f"A credit is an amount other than zero, at most {format_usd(AMOUNT_MAX_NANOUSD)}.")
        if not 0 < len(reference) <= REFERENCE_CHARS_MAX:
            raise InvalidValue(f"A reference has 1 to {REFERENCE_CHARS_MAX} characters.")
        source, target = "credit_source", account_id
        if amount_nanousd < 0:
            source, target = target, source
        credit = {"source_id": source, "target_id": target, "amount": abs(amount_nanousd)}
        with self._transaction():
            account = self.account(account_id)
            if account.kind != "customer":
                raise InvalidValue(f"{account_id} is no customer's account.")
            applied = self._run(ACCOUNTS["find_credit"], {"reference": reference}).fetchone()
            if applied is not None:
                if applied != tuple(credit.values()):
                    raise InvalidValue("That reference was used for another credit.")
                return False
            if account.available_nanousd + amount_nanousd < 0:
                has = format_usd(account.available_nanousd)
                raise InsufficientQuota(
                    f"{account_id} has {has} available; {format_usd(-amount_nanousd)} cannot be taken back."
                )
            if account.balance_nanousd + amount_nanousd > AMOUNT_MAX_NANOUSD:
                raise InvalidValue(
                    f"{account_id} would have more than an account can: {format_usd(AMOUNT_MAX_NANOUSD)}."
                )
            self._run(ACCOUNTS["insert_credit"], credit | {"reference": reference, "now_ms": self._clock.unix_ms()})
            return True

    def create_key(
        self, account_id: str, scopes: Iterable[str], *, name: str = "", expires_ms: int | None = None
    ) -> tuple[Key, str]:
        """A new key and its token, which nobody can show again. Raises NotFound, InvalidValue."""
        wanted = sorted(set(scopes))
        if not wanted or not SCOPES.issuperset(wanted):
            raise InvalidValue(f"A key has at least one of the scopes {', '.join(sorted(SCOPES))}.")
        if len(name) > NAME_CHARS_MAX:
            raise InvalidValue(f"A key's name has at most {NAME_CHARS_MAX} characters.")
        token = make_token("em_admin" if "admin" in wanted else "em")
        key = Key(
            key_id=new_id("key", self._clock),
            account_id=account_id,
            name=name,
            scopes=tuple(wanted),
            created_ms=self._clock.unix_ms(),
            expires_ms=expires_ms,
        )
        row = {
            "key_id": key.key_id,
            "account_id": account_id,
            "name": name,
            "token_hash": hash_token(token, self._key_secret),
            "scopes": " ".join(wanted),
            "now_ms": key.created_ms,
            "expires_ms": expires_ms,
        }
        with self._transaction():
            self.account(account_id)
            self._run(KEYS["insert_key"], row)
        return key, token

    def list_keys(self, account_id: str | None = None) -> list[Key]:
        """The keys of one account, or all; revoked and expired ones too."""
        rows = self._run(KEYS["list_keys"], {"account_id": account_id})
        return [
            Key(key_id, account, name, tuple(scopes.split()), created, expires, revoked)
            for key_id, account, name, scopes, created, expires, revoked in rows
        ]

    def revoke_key(self, key_id: str) -> bool:
        """Make a key useless at once; False if there is no such key or it was revoked before."""
        with self._transaction():
            revoked = self._run(KEYS["revoke_key"], {"key_id": key_id, "now_ms": self._clock.unix_ms()})
            return int(revoked.rowcount) == 1

    def check(self) -> CheckReport:
        """Look at every promise of the ledger. Raises StoreUnavailable if the file cannot be read."""
        with _translated():
            return check(self._db)

    def backup(self, target: Path, *, overwrite: bool = False) -> None:
        """Write a consistent copy to a file of mode 0600. Raises StoreUnavailable; then there is no new file.

        Raises InvalidValue for a target that is the store itself, or that is there already and not to `overwrite`.
        """
        with _translated():
            backup(self._db, target, overwrite=overwrite)

    def _run(self, statement: str, values: dict[str, Any] | None = None) -> Any:
        with _translated():
            return self._db.execute(statement, values or {})

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it, or nothing."""
        self._run("BEGIN IMMEDIATE")
        try:
            yield
            self._run("COMMIT")
        finally:
            if self._db.in_transaction:
                self._run("ROLLBACK")


@contextmanager
def _translated() -> Iterator[None]:
    """The driver's and the system's errors, in our words."""
    try:
        yield
    except driver.Error as error:
        raise StoreUnavailable(f"The store did not do it ({error}); nothing was changed.") from None
    except OSError as error:
        raise StoreUnavailable(f"The store did not do it ({error.strerror}); nothing was changed.") from None
