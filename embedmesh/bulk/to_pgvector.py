"""The sink `pgvector:postgresql://user@host/db?table=docs`: rows of a table, found by their id, with a vector each.

A unit is one transaction: its rows come into a temporary table by binary COPY, and from there into the table. So a unit
is there whole or not at all, and writing it once more changes nothing.
"""

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

import numpy as np
import psycopg
from psycopg import conninfo, sql

from embedmesh.bulk.databases import SinkNotReached, as_json, as_text, persist, rows_by_key
from embedmesh.bulk.sinks import UnitTable
from embedmesh.bulk.stops import NothingListens, Stopped
from embedmesh.bulk.units import JobUnit
from embedmesh.bulk.usage import WrongUsage

FORM = "pgvector:postgresql://user@host/database?table=docs"
OWN_PARAMETERS = ("table", "id", "embedding", "text")  # of the address; the others are for PostgreSQL's client
IDENTIFIER_BYTES_MAX = 63  # PostgreSQL cuts longer ones, silently
COMPONENTS_MAX = 16_000  # components that pgvector can keep
JSON_TYPES = ("json", "jsonb")
CONNECTION: dict[str, Any] = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "tcp_user_timeout": "60000",  # a server that has vanished ends an attempt, and not the night's run
    "application_name": "embedmesh",
}
WAITS = "SELECT set_config('lock_timeout', '60s', true), set_config('statement_timeout', '600s', true)"
EXTENSION = """
SELECT n.nspname, EXISTS (SELECT FROM pg_available_extensions WHERE name = 'vector'), to_regclass(%s)::oid
FROM (SELECT) AS one LEFT JOIN pg_extension e ON e.extname = 'vector' LEFT JOIN pg_namespace n ON n.oid = e.extnamespace
"""
COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), t.typname, a.atttypmod, a.attnotnull,
  a.attgenerated = '' AND a.attidentity <> 'a',
  EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indisvalid AND i.indimmediate
    AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum)
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
"""
# One INSERT … ON CONFLICT would do, were it not for tables with columns that must not be null and that the input lacks.
UPDATE = "UPDATE {table} AS t SET {pairs} FROM {staged} AS s WHERE t.{id} = s.k::{kind}"
INSERT = (
    "INSERT INTO {table} ({id}, {names}) SELECT s.k::{kind}, {values} FROM {staged} AS s WHERE NOT EXISTS"
    " (SELECT FROM {table} AS t WHERE t.{id} = s.k::{kind}) ORDER BY s.k ON CONFLICT ({id}) DO UPDATE SET {again}"
)
STAGED = sql.SQL("pg_temp.embedmesh_staged")
# Else PostgreSQL guesses ten times the rows from the pages of vectors, and reads the whole table for each unit.
ANALYZE = "ANALYZE pg_temp.embedmesh_staged (k)"
COPY_HEAD, COPY_END, NULL = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff", b"\xff\xff\xff\xff"


class TableColumn(NamedTuple):
    """`type` is SQL for its type, `kind` the type's name, `size` that of a vector's type or -1; `key`: it is unique."""

    name: str
    type: str
    kind: str
    size: int
    required: bool
    writable: bool
    key: bool


class PgvectorSink:
    """Connects for each unit and keeps nothing in between: any number of threads and processes may write."""

    def __init__(self, output: str) -> None:
        """Raises WrongUsage; connects to nothing."""
        server, _, query = output.removeprefix("pgvector:").partition("?")
        if not server.startswith(("postgresql://", "postgres://")):
            raise WrongUsage(f"The output must look like {FORM}.")
        given = parse_qsl(query, keep_blank_values=True)
        own = {name: value for name, value in given if name in OWN_PARAMETERS}
        rest = urlencode([(name, value) for name, value in given if name not in own], quote_via=quote)
        try:
            self._server = CONNECTION | conninfo.conninfo_to_dict(f"{server}?{rest}")
        except psycopg.ProgrammingError:
            raise WrongUsage(
                f"PostgreSQL's client cannot read the output's address. It must look like {FORM}."
            ) from None
        if self._server.get("password"):
            raise WrongUsage(
                "Others would see a password in the output's address. Put it into PGPASSWORD or ~/.pgpass."
            )
        schema, _, table = own.get("table", "").rpartition(".")
        self._id, self._vector, self._text = own.get("id", "id"), own.get("embedding", "embedding"), own.get("text")
        for name in (table, self._id, self._vector, schema or "-"):
            if not name or "\0" in name or len(name.encode()) > IDENTIFIER_BYTES_MAX:
                raise WrongUsage(f"The output must name a table, in at most {IDENTIFIER_BYTES_MAX} bytes: {FORM}.")
        self._table = sql.Identifier(schema, table) if schema else sql.Identifier(table)
        self._name = self._table.as_string(None)

    def begin(self, *, resumed: bool, overwrite: bool, width: int | None) -> None:
        """Raises WrongUsage where the database or its table cannot take vectors, NothingListens where none is there."""
        try:
            with self._connected() as connection:
                self._columns(connection, width or 0, make=False)
        except SinkNotReached as error:
            hint = " Passwords come from PGPASSWORD or ~/.pgpass." if "password" in str(error) else ""
            raise NothingListens(f"{error}{hint}") from None

    def write(self, unit: JobUnit, table: UnitTable) -> str:
        """All rows, in one transaction; gives the table's number in its database."""
        return persist(lambda: self._write(table))

    def finish(self, parts: Iterable[str]) -> None:
        """Raises Stopped where the table is not the one that all units went into."""
        with self._connected() as connection:
            _, oid = self._extension(connection)
        if not {str(oid), ""}.issuperset(parts):
            raise Stopped(
                f"The table {self._name} was dropped during the job: units are missing. --overwrite begins anew"
            )

    def _write(self, table: UnitTable) -> str:
        rows = rows_by_key(table.ids)
        with self._connected() as connection:
            columns, oid = self._columns(connection, table.vectors.shape[1])
            if not columns:
                return ""  # nothing was embedded so far, and the table would have no width
            if columns[self._vector].required:
                rows = {key: row for key, row in rows.items() if table.errors[row] is None}
            values = dict(self._values(columns, table))
            staged = [
                "k text",
                "v " + self._vector_type.as_string(connection),
                *(f"c{at} text" for at in range(len(values))),
            ]
            connection.execute(f"CREATE TEMP TABLE embedmesh_staged ({', '.join(staged)}) ON COMMIT DROP".encode())
            with connection.cursor().copy(sql.SQL("COPY {} FROM STDIN (FORMAT BINARY)").format(STAGED)) as copy:
                for data in _copied(rows, table, list(values.values())):
                    copy.write(data)
            connection.execute(ANALYZE)
            for statement in (UPDATE, INSERT):
                connection.execute(self._statement(statement, columns, list(values)))
        return str(oid)

    @contextmanager
    def _connected(self) -> Iterator[psycopg.Connection[Any]]:
        """One transaction. Errors come out in our words: none holds a value of the input."""
        try:
            with psycopg.connect(**self._server, prepare_threshold=None) as connection:  # poolers know no prepared ones
                connection.execute(WAITS)
                yield connection
        except psycopg.OperationalError as error:
            raise SinkNotReached(f"PostgreSQL could not do it now: {_words(error)}") from None
        except psycopg.Error as error:
            raise WrongUsage(f"PostgreSQL refused to write into {self._name}: {_words(error)}.") from None

    def _extension(self, connection: psycopg.Connection[Any]) -> tuple[str, int | None]:
        """The schema of pgvector, and the table's number if it is there."""
        schema, known, oid = connection.execute(EXTENSION, [self._name]).fetchone() or (None, False, None)
        if schema is None:
            install = (
                "" if known else " Its server lacks pgvector: install that first (package postgresql-NN-pgvector)."
            )
            raise WrongUsage(f"The database lacks pgvector. As its owner, run there: CREATE EXTENSION vector;{install}")
        return schema, oid

    def _columns(
        self, connection: psycopg.Connection[Any], width: int, *, make: bool = True
    ) -> tuple[dict[str, TableColumn], int | None]:
        """The table's columns by name, and its number. A missing one is made; it has none where no width is known."""
        schema, oid = self._extension(connection)
        self._vector_type = sql.Identifier(schema, "vector")
        if oid is None and width and make:
            self._make(connection, width)
            _, oid = self._extension(connection)
        columns = {row[0]: TableColumn(*row) for row in connection.execute(COLUMNS, [oid])}
        if oid is not None:
            self._check(columns, width)
        return columns, oid

    def _make(self, connection: psycopg.Connection[Any], width: int) -> None:
        if width > COMPONENTS_MAX:
            raise WrongUsage(f"pgvector keeps {COMPONENTS_MAX:,} components at most, not {width:,}. Use --dimensions.")
        make = sql.SQL("CREATE TABLE {} ({} text PRIMARY KEY, {} {}({}), error text, metadata jsonb)")
        names = (self._table, sql.Identifier(self._id), sql.Identifier(self._vector), self._vector_type, width)
        # Another worker may have made it just now.
        with suppress(psycopg.errors.DuplicateTable, psycopg.errors.UniqueViolation), connection.transaction():
            connection.execute(make.format(*names))

    def _check(self, columns: dict[str, TableColumn], width: int) -> None:
        key, vector = columns.get(self._id), columns.get(self._vector)
        if key is None or vector is None:
            raise WrongUsage(
                f"The table {self._name} lacks a column {self._id!r} or {self._vector!r}. Name its own in the output's"
                " address (…?table=docs&id=doc_id&embedding=vec), or choose another table."
            )
        if not key.key:
            raise WrongUsage(
                f"Rows are found by their id, and in the table {self._name} two may have the same. Run: ALTER TABLE"
                f" {self._name} ADD PRIMARY KEY ({sql.Identifier(self._id).as_string(None)}); or choose another table."
            )
        if vector.kind not in ("vector", "halfvec"):
            raise WrongUsage(f"The column {self._vector!r} of {self._name} is {vector.type}; it must be a vector.")
        if width and vector.size not in (-1, width):
            raise WrongUsage(
                f"The table {self._name} has vectors of {vector.size:,} components, and these have {width:,}."
                " Choose another table, another model or --dimensions."
            )

    def _values(self, columns: dict[str, TableColumn], table: UnitTable) -> Iterator[tuple[str, list[str | None]]]:
        """What goes into which column beside id and vector, as text. What has no column goes into `metadata`."""
        given = table.columns if self._text is None else table.columns | {self._text: table.texts}
        own = {self._id, self._vector, "error"}
        fit = [name for name in given if name not in own and name in columns and columns[name].writable]
        for name in fit:
            as_sql = as_json if columns[name].kind in JSON_TYPES else as_text
            yield name, [None if value is None else as_sql(value) for value in given[name]]
        if "error" in columns and columns["error"].writable:
            yield "error", [as_text(error) for error in table.errors]
        rest = {name: values for name, values in given.items() if name not in fit and values != table.ids}
        if "metadata" not in fit and "metadata" in columns and columns["metadata"].kind in JSON_TYPES:
            rows = range(len(table.ids))
            yield "metadata", [as_json({name: values[row] for name, values in rest.items()}) for row in rows]

    def _statement(self, statement: str, columns: dict[str, TableColumn], names: list[str]) -> sql.Composed:
        kinds = {name: sql.SQL(columns[name].type) for name in (self._id, self._vector, *names)}  # from the catalogue
        values = [sql.SQL("s.v::{}").format(kinds[self._vector])]
        values += [sql.SQL("s.c{}::{}").format(at, kinds[name]) for at, name in enumerate(names)]
        targets = [sql.Identifier(name) for name in (self._vector, *names)]
        pairs = zip(targets, values, strict=True)
        comma = sql.SQL(", ")
        return sql.SQL(statement).format(
            table=self._table,
            staged=STAGED,
            id=sql.Identifier(self._id),
            kind=kinds[self._id],
            names=comma.join(targets),
            values=comma.join(values),
            pairs=comma.join(sql.SQL("{} = {}").format(*pair) for pair in pairs),
            again=comma.join(sql.SQL("{0} = excluded.{0}").format(name) for name in targets),
        )


def _copied(rows: dict[str, int], table: UnitTable, values: list[list[str | None]]) -> Iterator[bytes]:
    """The rows in PostgreSQL's binary form: fields are text, but for the vector, which pgvector reads big-endian."""
    width = table.vectors.shape[1]
    count, head = struct.pack(">h", 2 + len(values)), struct.pack(">ihh", 4 + 4 * width, width, 0)
    vectors = np.ascontiguousarray(table.vectors, ">f4")
    yield COPY_HEAD
    for key, row in rows.items():
        vector = NULL if table.errors[row] is not None else head + vectors[row].tobytes()
        yield b"".join((count, _field(key), vector, *(_field(column[row]) for column in values)))
    yield COPY_END


def _field(text: str | None) -> bytes:
    if text is None:
        return NULL
    data = text.encode()
    return struct.pack(">i", len(data)) + data


def _words(error: psycopg.Error) -> str:
    """What the server says, without what it says of values."""
    state = error.sqlstate or ""
    if state.startswith("22"):
        return f"an id or a value does not fit the type of its column (SQLSTATE {state})"
    return (error.diag.message_primary or str(error).partition("\n")[0] or type(error).__name__).rstrip(".")
