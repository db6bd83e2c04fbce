"""One connection to a store, of either kind: what the rest of this package needs of it, and what can go wrong.

Statements are written once, with named values (`:amount`); see `sql` for what each kind of store writes in its own way.
Nothing here awaits: a connection blocks its caller.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from embedmesh.storage.sqlite.driver import driver

Row = tuple[Any, ...]

_errors: list[type[Exception]] = [driver.Error]
_refusals: list[type[Exception]] = [
    driver.IntegrityError,
    driver.ProgrammingError,
    driver.InterfaceError,
    driver.DataError,
    OverflowError,
]


def errors() -> tuple[type[Exception], ...]:
    """What the loaded drivers may raise."""
    return tuple(_errors)


def refusals() -> tuple[type[Exception], ...]:
    """Errors of one statement, whenever it is tried; the transaction before it is sound. All others fail a batch."""
    return tuple(_refusals)


def may_raise(error: type[Exception], refused: Sequence[type[Exception]]) -> None:
    """Another driver is loaded. PostgreSQL's takes ten megabytes: a gateway on a file does without it."""
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

    def begin_reading(self) -> None:
        """Begin a view of one moment."""

    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def execute(self, statement: str, values: Mapping[str, Any] | None = None) -> Cursor: ...

    def later(self, statement: str, values: Mapping[str, Any]) -> Callable[[], Sequence[Row]]:
        """Run one statement, and ask for what it found after the transaction."""

    def lock_accounts(self, account_ids: set[str]) -> None:
        """Keep others from moving money of these accounts until this transaction ends.

        Always before anything is moved, and in one order, so that two transactions never wait for each other.
        """

    def lock_names(self, names: set[str]) -> None:
        """The same for rows that gateways change, and for those that they may be making: nodes and invites, by id."""

    def close(self) -> None: ...


class Engine(Protocol):
    """One store: how it is opened, and what differs between kinds of stores. Methods raise SetupError.

    `shown` names it in messages, without a password.
    """

    dialect: str
    shown: str

    def connect(self, *, busy_s: float, read_only: bool = False, planning: bool = False) -> Db:
        """A connection; a missing file is made. A connection for `planning` may read whole tables."""

    def is_new(self) -> bool:
        """Whether there is no store yet."""

    def version(self, db: Db) -> int:
        """The version of the store's schema; 0 where there is none yet."""

    def run_script(self, db: Db, script: str, version: int) -> None:
        """Bring the store to `version`: all of the script or nothing, and nothing if another process did it."""

    def backup(self, db: Db, target: Path, *, overwrite: bool) -> None:
        """A copy of the whole store in one file. See `embedmesh.storage.sqlite.backup`."""


def name_of(error: Exception) -> str:
    """The driver's own name of an error: no values, no statement."""
    return getattr(error, "sqlite_errorname", None) or getattr(error, "sqlstate", None) or type(error).__name__


OnFatal = Callable[[str], None]
"""Called once, with a reason, when the disk can no longer be trusted: the process should end without another word."""
