"""One connection for all books: statements and transactions, with the drivers' errors in our words.

What a transaction changes is somebody's act: without its row in the audit, or without an actor, nothing is committed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from embedmesh.rules.acts import Act, Actor, Verb
from embedmesh.rules.errors import InvalidValue, StoreUnavailable
from embedmesh.rules.ports import Clock
from embedmesh.storage.db import Cursor, Db, Row, errors
from embedmesh.storage.ledger.acts import record

READS = ("SELECT", "WITH")  # how a statement begins that changes nothing


class BooksSession:
    """Not for several threads at one time. Methods raise StoreUnavailable; InvalidValue for a text that has a NUL."""

    def __init__(self, db: Db, clock: Clock, actor: Actor | None = None) -> None:
        """`actor` is who acts where no other is named."""
        self.clock = clock
        self._db = db
        self._actor = actor
        self._acts: list[tuple[Act, Actor | None]] = []  # of the transaction
        self._changed = False  # whether it has changed anything

    def run(self, statement: str, values: Mapping[str, Any] | None = None) -> int:
        """Run one statement that changes something, in a transaction; how many rows it changed."""
        with translated():
            changed = self._write(statement, values).rowcount
        self._changed = self._changed or changed > 0
        return changed

    def made(self, statement: str, values: Mapping[str, Any]) -> Sequence[Row]:
        """The same for a statement that says what it made."""
        with translated():
            rows = self._write(statement, values).fetchall()
        self._changed = self._changed or bool(rows)
        return rows

    def rows(self, statement: str, values: Mapping[str, Any] | None = None) -> Sequence[Row]:
        """What a statement finds."""
        with translated():
            return self._read(statement, values).fetchall()

    def row(self, statement: str, values: Mapping[str, Any] | None = None) -> Row | None:
        """The only row that a statement can find, or None."""
        with translated():
            return self._read(statement, values).fetchone()

    @contextmanager
    def acting(self, actor: Actor) -> Iterator[None]:
        """Who acts meanwhile."""
        before, self._actor = self._actor, actor
        try:
            yield
        finally:
            self._actor = before

    def note(self, verb: Verb, object_id: str, changes: Mapping[str, Any], by: Actor | None = None) -> None:
        """What is done in this transaction, by the actor of the session unless it says another.

        Its row is written at the end.
        """
        self._acts.append((Act(verb, object_id, changes), by or self._actor))

    @contextmanager
    def transaction(self, *accounts: str) -> Iterator[None]:
        """All of it, or nothing. `accounts` are those whose money it moves, or that it locks."""
        _plain({account: account for account in accounts})
        self._acts, self._changed = [], False
        with translated():
            self._db.begin()
        try:
            if accounts:
                with translated():
                    self._db.lock_accounts(set(accounts))
            yield
            with translated():
                self._record()
                self._db.commit()
        finally:
            if self._db.in_transaction:
                with translated():
                    self._db.rollback()

    def _record(self) -> None:
        if self._changed and not self._acts:
            raise AssertionError("what changes the books is an act: note it")
        for act, actor in self._acts:
            if actor is None:
                raise AssertionError("an act has an actor: say by whom the books are asked")
            record(self._db, actor, [act], self.clock.unix_ms())

    def _write(self, statement: str, values: Mapping[str, Any] | None) -> Cursor:
        if not self._db.in_transaction:
            raise AssertionError("the books change within transactions only")
        return self._db.execute(statement, _plain(values))

    def _read(self, statement: str, values: Mapping[str, Any] | None) -> Cursor:
        if not statement.startswith(READS):
            raise AssertionError("this statement changes the books: run it")
        return self._db.execute(statement, _plain(values))


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
