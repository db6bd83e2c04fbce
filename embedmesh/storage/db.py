"""One connection to a store, of either kind: what the rest of this package needs of it, and what can go wrong.

Statements are written once, with named values (`:amount`); see `sql` for the little that a kind of store writes in its
own way. Nothing here awaits: a connection blocks whoever uses it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pysqlite3.dbapi2 as sqlite

Row = tuple[Any, ...]

_errors: list[type[Exception]] = [sqlite.Error]
_refusals: list[type[Exception]] = [
    sqlite.IntegrityError,
    sqlite.ProgrammingError,
    sqlite.InterfaceError,
    sqlite.DataError,
    OverflowError,
]


def errors() -> tuple[type[Exception], ...]:
    """Whatever a driver may raise: of those that are loaded."""
    return tuple(_errors)


def refusals() -> tuple[type[Exception], ...]:
    """Errors of one statement, whenever it is tried; the transaction before it is sound. All others fail a batch."""
    return tuple(_refusals)


def may_raise(error: type[Exception], refused: Sequence[type[Exception]]) -> None:
    """One more driver is loaded: whoever has a file does without that of PostgreSQL, which takes ten megabytes."""
    _errors.append(error)
    _refusals.extend(refused)


class Cursor(Protocol):
    """What a statement found or changed."""

    @property
    def rowcount(self) -> int: ...
    @property
    def description(self) -> Any: ...
    def fetchone(self) -> Row | None: ...
    def fetchall(self) -> Sequence[Row]: ...
    def fetchmany(self, size: int) -> Sequence[Row]: ...
    def __iter__(self) -> Iterator[Row]: ...


class Db(Protocol):
    """One connection, in autocommit mode outside of `begin` and `commit`. Its methods raise `errors()`."""

    dialect: str

    @property
    def in_transaction(self) -> bool: ...

    def begin(self) -> None:
        """Begin to write."""
        ...

    def begin_reading(self) -> None:
        """Begin a view of one moment."""
        ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...

    def execute(self, statement: str, values: Mapping[str, Any] | None = None) -> Cursor:
        """Run one statement."""
        ...

    def later(self, statement: str, values: Mapping[str, Any]) -> Callable[[], Sequence[Row]]:
        """Run one statement; what it found may be asked for after the transaction: nobody waits for it before."""
        ...

    def lock_accounts(self, account_ids: set[str]) -> None:
        """Keep others from moving money of these accounts until this transaction ends.

        Always before anything is moved, and in one order: so nobody waits for one who waits for him.
        """
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    """One store at one place: how it is opened, and what differs between kinds of stores.

    `shown` names it for people, without a password. Methods raise SetupError, in one line that says what to do.
    """

    dialect: str
    shown: str

    def connect(self, *, busy_s: float, read_only: bool = False, planning: bool = False) -> Db:
        """A connection; the place is made where it is missing and can be. One for `planning` may read whole tables."""
        ...

    def is_new(self) -> bool:
        """Whether there is no store at that place yet."""
        ...

    def version(self, db: Db) -> int:
        """Of the store's schema; 0 where there is none yet."""
        ...

    def run_script(self, db: Db, script: str, version: int) -> None:
        """Bring the store to `version`, all of it or nothing; nothing where another process was faster."""
        ...

    def backup(self, db: Db, target: Path, *, overwrite: bool) -> None:
        """A copy of the whole store in one file. See `embedmesh.storage.sqlite.backup`."""
        ...


def name_of(error: Exception) -> str:
    """The driver's own name of an error: no values, no statement."""
    return getattr(error, "sqlite_errorname", None) or getattr(error, "sqlstate", None) or type(error).__name__


OnFatal = Callable[[str], None]
"""Called once, with a reason, when the disk can no longer be trusted: the process should end without another word."""
