"""One connection for all books: statements and transactions, with the drivers' errors in our words."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from embedmesh.rules.errors import InvalidValue, StoreUnavailable
from embedmesh.rules.ports import Clock
from embedmesh.storage.db import Cursor, Db, Row, errors


class BooksSession:
    """Not for several threads at one time. Methods raise StoreUnavailable; InvalidValue for a text that has a NUL."""

    def __init__(self, db: Db, clock: Clock) -> None:
        self.clock = clock
        self._db = db

    def run(self, statement: str, values: Mapping[str, Any] | None = None) -> Cursor:
        """Run one statement."""
        with translated():
            return self._db.execute(statement, _plain(values))

    def rows(self, statement: str, values: Mapping[str, Any] | None = None) -> Sequence[Row]:
        """What a statement finds."""
        with translated():
            return self._db.execute(statement, _plain(values)).fetchall()

    def row(self, statement: str, values: Mapping[str, Any] | None = None) -> Row | None:
        """The only row that a statement can find, or None."""
        with translated():
            return self._db.execute(statement, _plain(values)).fetchone()

    @contextmanager
    def transaction(self, *accounts: str) -> Iterator[None]:
        """All of it, or nothing. `accounts` are those whose money it moves, or that it locks."""
        _plain({account: account for account in accounts})
        with translated():
            self._db.begin()
        try:
            if accounts:
                with translated():
                    self._db.lock_accounts(set(accounts))
            yield
            with translated():
                self._db.commit()
        finally:
            if self._db.in_transaction:
                with translated():
                    self._db.rollback()


def _plain(values: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The values. Raises InvalidValue where a text has a NUL, which PostgreSQL cannot keep."""
    if values and any(isinstance(value, str) and "\0" in value for value in values.values()):
        raise InvalidValue("A text here has a NUL character.")
    return values or {}


@contextmanager
def translated() -> Iterator[None]:
    """The drivers' and the system's errors, in our words."""
    try:
        yield
    except UnicodeEncodeError:
        raise InvalidValue("A text here has a character that is none (half of a surrogate pair).") from None
    except errors() as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StoreUnavailable(f"The store did not do it ({reason}); nothing was changed.") from None
    except OSError as error:
        raise StoreUnavailable(f"The store did not do it ({error.strerror}); nothing was changed.") from None
