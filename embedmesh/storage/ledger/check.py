"""Every promise of the ledger, checked row by row in one consistent view of the store."""

import logging
import time
from collections.abc import Iterator
from itertools import islice
from typing import cast

import msgspec

from embedmesh.rules.holds import NOT_TOKENS, Metered
from embedmesh.rules.money import bill_nanousd
from embedmesh.storage.db import Db
from embedmesh.storage.ledger import chain
from embedmesh.storage.ledger.acts import AuditHead, follow_acts
from embedmesh.storage.ledger.lost_holds import charge_of_note
from embedmesh.storage.ledger.settle_tab import REQUEST, Record, digest_of
from embedmesh.storage.sql import REPORTS_SQL, load
from embedmesh.storage.sqlite.database import SqliteDb
from embedmesh.storage.sqlite.driver import driver

BROKEN_ROWS_MAX = 20  # listed for each promise: enough to see what is wrong
RECOVERED_ROWS_MAX = 100  # listed, the latest; `tallies` has their number
PROMISES = load("check.sql")
QUICK_CHECK = load("check_sqlite.sql")["quick_check"]
PROMISES_OF_KIND = {  # of one kind of store only
    "sqlite": {name: statement for name, statement in load("check_sqlite.sql").items() if name != "quick_check"},
    "postgres": load("check_postgres.sql"),
}
CHAIN_HOLDS = "chain_holds"
AUDIT_HOLDS = "audit_holds"
METERS_ADD_UP = "meters_add_up"
NOTES_CAN_BE_CHARGED = "notes_can_be_charged"
DIGESTS_MATCH = "settlements_match_their_digests"
METERED_ROWS_AT_ONCE = 1_000  # some 200 kB
NOTES_AT_ONCE = 1_000  # some 400 kB
SETTLEMENTS_AT_ONCE = 200  # some 2 MB of usage records

# What a write that the disk lost would break, cheapest first: 0.03 s for 100,000 holds; the file's check takes 0.2 s.
SUMS = (
    "available_is_not_negative",
    "held_is_sum_of_holds_and_tabs",
    "everything_sums_to_zero",
    "balance_is_sum_of_entries",
)
VERIFY_S_MAX = 0.75  # of a start after a crash, which is to take less than 3 s however large the store is
VERIFY_STEPS = 10_000  # of SQLite's machine between two looks at the clock: less than a millisecond

logger = logging.getLogger(__name__)


class Broken(msgspec.Struct, frozen=True):
    """One row that breaks one promise."""

    promise: str
    subject: str
    detail: str


class Recovered(msgspec.Struct, frozen=True):
    """A hold that was open when its gateway died: its reply may have been delivered, and was not charged."""

    hold_id: str
    account_id: str
    amount_nanousd: int
    ended_ms: int


class CheckReport(msgspec.Struct, frozen=True):
    """The ledger is right when none of its `promises` is `broken`. `head` and `audit` say where chain and audit end."""

    promises: list[str]
    broken: list[Broken]
    tallies: dict[str, int]
    recovered: list[Recovered]
    head: chain.ChainHead
    audit: AuditHead

    @property
    def ok(self) -> bool:
        """Whether the ledger keeps every promise."""
        return not self.broken


def check(db: Db) -> CheckReport:
    """Check everything. Reads the whole store; writers are not disturbed. Raises the driver's errors."""
    db.begin_reading()
    try:
        return check_within(db)
    finally:
        db.rollback()


def check_within(db: Db) -> CheckReport:
    """The same inside a transaction that is open."""
    promises = PROMISES | PROMISES_OF_KIND[db.dialect]
    broken = [
        Broken(promise, subject, detail)
        for promise, statement in promises.items()
        for subject, detail in db.execute(statement).fetchmany(BROKEN_ROWS_MAX)
    ]
    broken += islice(_wrong_meters(db), BROKEN_ROWS_MAX)
    broken += islice(_wrong_notes(db), BROKEN_ROWS_MAX)
    broken += islice(_wrong_digests(db), BROKEN_ROWS_MAX)
    head, torn = chain.follow(db)
    if torn is not None:
        broken.append(Broken(CHAIN_HOLDS, "chain", torn))
    audit, torn = follow_acts(db)
    if torn is not None:
        broken.append(Broken(AUDIT_HOLDS, "audit", torn))
    counted = db.execute(REPORTS_SQL["count_tallies"])
    names = [column[0] for column in counted.description]
    tallies = dict(zip(names, counted.fetchall()[0], strict=True))
    recovered = [Recovered(*row) for row in db.execute(REPORTS_SQL["list_recovered"], {"rows_max": RECOVERED_ROWS_MAX})]
    computed = METERS_ADD_UP, NOTES_CAN_BE_CHARGED, DIGESTS_MATCH, CHAIN_HOLDS, AUDIT_HOLDS
    return CheckReport([*promises, *computed], broken, tallies, recovered, head, audit)


def _wrong_meters(db: Db) -> Iterator[Broken]:
    """Usage records whose cost or tokens are not what their meters add up to. Computed here, by the rule itself."""
    page: dict[str, str | int] = {"after": "", "rows_max": METERED_ROWS_AT_ONCE}
    while rows := db.execute(REPORTS_SQL["metered_usage"], page).fetchall():
        for hold_id, tokens, cost, text in rows:
            try:
                meters = msgspec.json.decode(text, type=tuple[Metered, ...])
            except msgspec.MsgspecError:
                yield Broken(METERS_ADD_UP, f"hold {hold_id}", "its meters cannot be read")
                continue
            billed = bill_nanousd(meters)
            counted = sum(each.quantity for each in meters if each.meter not in NOT_TOKENS)
            if (cost, tokens) != (billed, counted):
                detail = f"cost {cost}, meters {billed}; tokens {tokens}, meters {counted}"
                yield Broken(METERS_ADD_UP, f"hold {hold_id}", detail)
        page["after"] = rows[-1][0]


def _wrong_notes(db: Db) -> Iterator[Broken]:
    """Notes that their holds could not be captured at."""
    page: dict[str, str | int] = {"after": "", "rows_max": NOTES_AT_ONCE}
    while rows := db.execute(REPORTS_SQL["notes"], page).fetchall():
        for hold_id, amount, cost, text in rows:
            if charge_of_note(text, cost, amount) is None:
                yield Broken(NOTES_CAN_BE_CHARGED, f"note of {hold_id}", f"cannot be read, or not be charged as {cost}")
        page["after"] = rows[-1][0]


def _wrong_digests(db: Db) -> Iterator[Broken]:
    """Settlements whose usage records, as long as they are kept, are not those that were digested when it was made."""
    page: dict[str, str | int] = {"after": 0, "rows_max": SETTLEMENTS_AT_ONCE}
    while settlements := db.execute(REPORTS_SQL["settlements"], page).fetchall():
        page["after"] = settlements[-1][0]
        of_settlement: dict[tuple[str, int], list[Record]] = {}
        reading = {"first": settlements[0][0], "last": settlements[-1][0]}
        for settlement, *record in db.execute(REPORTS_SQL["records_of_settlements"], reading).fetchall():
            of_settlement.setdefault((record[0], settlement), []).append(cast(Record, tuple(record)))
        for _, tab_id, settlement, digest in settlements:
            if digest_of(sorted(of_settlement.get((tab_id, settlement), ()), key=REQUEST)) != digest:
                yield Broken(
                    DIGESTS_MATCH, f"tab {tab_id}", f"the usage records of settlement {settlement} were changed"
                )


def verify(db: Db, seconds_max: float = VERIFY_S_MAX) -> list[Broken]:
    """Check what a crash or a lost write may have broken in an SQLite store: sums, then the file. Raises `errors()`.

    Stops after `seconds_max`, and logs that.
    """
    assert isinstance(db, SqliteDb)
    ends_s = time.monotonic() + seconds_max
    db.connection.set_progress_handler(lambda: time.monotonic() > ends_s, VERIFY_STEPS)
    try:
        for promise in SUMS:
            if rows := db.execute(PROMISES[promise]).fetchmany(BROKEN_ROWS_MAX):
                return [Broken(promise, subject, detail) for subject, detail in rows]
        found = [text for (text,) in db.execute(QUICK_CHECK).fetchmany(BROKEN_ROWS_MAX)]
        return [Broken("file_is_whole", "file", text) for text in found if text != "ok"]
    except driver.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith("SQLITE_CORRUPT"):
            return [Broken("file_is_whole", "file", str(error))]
        if name != "SQLITE_INTERRUPT":
            raise
        logger.warning("the store is large: run `embedmesh ledger check --offline` for all that was not looked at now")
        return []
    finally:
        db.connection.set_progress_handler(None, 0)
