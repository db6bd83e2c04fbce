"""The operator's side of the store: plain calls that block, for the command line and, in a thread, the admin API.

They have a connection of their own and work while gateways run; each write then waits for the gateways' batches.

acts        the audit
accounts    who has money; credits, refunds, payouts
keys        bearer keys and what they may do
key_family  how many keys an account may have, how deep; what a rotated key hands over
new_keys    default limits of new keys
prices      what tokens cost, from when on, for whom
reports     usage, entries, statements, one request explained
session     the connection that they share
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from embedmesh.rules.acts import Actor, Verb
from embedmesh.rules.ports import Clock
from embedmesh.storage.books.accounts import AccountBooks
from embedmesh.storage.books.acts import ActBooks
from embedmesh.storage.books.keys import KeyBooks
from embedmesh.storage.books.new_keys import NewKeyBooks
from embedmesh.storage.books.prices import PriceBooks
from embedmesh.storage.books.reports import Reports
from embedmesh.storage.books.session import BooksSession, translated
from embedmesh.storage.db import Db, Engine
from embedmesh.storage.engines import engine_of
from embedmesh.storage.ledger.acts import had_audit_head
from embedmesh.storage.ledger.chain import had_head
from embedmesh.storage.ledger.check import CheckReport, check
from embedmesh.storage.migrate import is_empty, migrate, refuse_another_version
from embedmesh.storage.secrets.secret import SecretOf, check_secret
from embedmesh.storage.sql import FACTS_SQL
from embedmesh.storage.sqlite.database import OPEN_BUSY_S
from embedmesh.system import this_user

T = TypeVar("T")


class Books:
    """The books of one store. A context manager that closes them."""

    def __init__(self, engine: Engine, db: Db, clock: Clock, key_secret: bytes, actor: Actor | None = None) -> None:
        """`actor` is who acts where no other is named."""
        self._engine = engine
        self._db = db
        self._session = BooksSession(db, clock, actor)
        self.close = db.close
        self.accounts = AccountBooks(self._session)
        self.keys = KeyBooks(self._session, self.accounts, key_secret)
        self.new_keys = NewKeyBooks(self._session)
        self.prices = PriceBooks(self._session, self.accounts)
        self.reports = Reports(self._session, self.accounts)
        self.acts = ActBooks(self._session)

    @classmethod
    def open(
        cls, dsn: str | Path, *, clock: Clock, secret: SecretOf, migrating: bool = False, for_others: bool = False
    ) -> "Books":
        """Open or make the store. Raises SetupError, or StoreUnavailable if it cannot be written now.

        A store of another version is refused unless `migrating`: a gateway of that version may be using it. Who acts is
        the user of this process; or, with `for_others`, whom each call names.
        """
        engine = engine_of(dsn)
        key_secret = secret(engine)
        db = engine.connect(busy_s=OPEN_BUSY_S, planning=True)
        try:
            if migrating or is_empty(engine, db):
                migrate(engine, db)
            else:
                refuse_another_version(engine, db)
            books = cls(engine, db, clock, key_secret, None if for_others else this_user())
            with books._session.transaction():
                check_secret(db, key_secret)
        except BaseException:
            db.close()
            raise
        return books

    def __enter__(self) -> "Books":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def tell_settings(self, names: Mapping[str, Sequence[str]], by: Sequence[Actor]) -> None:
        """Have all gateways of the store read their settings again, as one is about to. Raises StoreUnavailable.

        `names`: of what changes there. They become texts: a list in a row is [old, new]. `by`: all who asked for it.
        """
        said = {what: ", ".join(each) for what, each in names.items() if each}
        with self._session.transaction():
            for actor in by:
                self._session.note(Verb.SETTINGS_RELOAD, "settings", said, by=actor)
            self._session.run(FACTS_SQL["tell_change"], {"kind": "settings"})

    def by(self, actor: Actor, do: "Callable[[Books], T]") -> T:
        """What `do` returns, which does everything as `actor`."""
        with self._session.acting(actor):
            return do(self)

    def check(self) -> CheckReport:
        """Check every promise of the ledger. Raises StoreUnavailable if the store cannot be read."""
        with translated():
            return check(self._db)

    def knew_head(self, head: str) -> bool:
        """Whether the chain, or the audit, ever had this head (64 hex digits). Raises StoreUnavailable."""
        hash_ = bytes.fromhex(head)
        with translated():
            return had_head(self._db, hash_) or had_audit_head(self._db, hash_)

    def backup(self, target: Path, *, overwrite: bool = False) -> None:
        """Write a consistent copy to a file of mode 0600. Raises StoreUnavailable; then there is no new file.

        Raises InvalidValue for a target that is the store itself, or exists and is not to be overwritten; and for a
        store that its server backs up.
        """
        with translated():
            self._engine.backup(self._db, target, overwrite=overwrite)
