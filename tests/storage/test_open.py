"""Opening the store: whatever is wrong is one line that says what to do."""

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest

from embedmesh.files import write_draft
from embedmesh.provision.bootstrap import bootstrap, open_books
from embedmesh.rules.errors import SetupError
from embedmesh.storage.books import Books
from embedmesh.storage.migrate import newest
from embedmesh.storage.secrets.secret import SECRET_BYTES, hash_user, load_secret
from embedmesh.storage.sql import STORAGE_FILES, load
from embedmesh.storage.sqlite.database import SqliteEngine
from embedmesh.storage.sqlite.driver import check_version
from embedmesh.storage.store import Store
from tests.storage.shop import SECRET, HandClock, Shop, secret


@pytest.fixture
def shop(file_shop: Shop) -> Shop:
    """All of this is about files."""
    return file_shop


HOLDS_SQL, KEYS_SQL = load("holds.sql"), load("keys.sql")


@pytest.mark.parametrize("version", [(3, 7, 0), (3, 40, 1), (3, 51, 2)])
def test_an_sqlite_that_can_corrupt_a_wal_is_refused(version: tuple[int, ...]) -> None:
    """Versions before 3.51.3 are refused by name."""
    with pytest.raises(SetupError, match=r"3\.51\.3 or newer"):
        check_version(version)
    check_version((3, 51, 3))
    check_version()


def test_what_is_written_is_synced(shop: Shop) -> None:
    """Every connection uses the WAL with synchronous FULL, and minds references."""
    db = SqliteEngine(shop.path).connect(busy_s=1)
    found = [db.execute(f"PRAGMA {name}").fetchall()[0][0] for name in ("journal_mode", "synchronous", "foreign_keys")]
    db.close()
    assert found == ["wal", 2, 1]


async def test_a_store_that_is_served_beside_its_copy_is_told_once(
    shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not where it was moved, nor where it is the same file by another name; nor again at the next start."""

    async def warned(path: Path) -> bool:
        caplog.clear()
        await (await shop.open(path)).close()
        return "is a copy" in caplog.text

    assert not await warned(shop.path) and not await warned(shop.path)
    copy = tmp_path / "copy" / "store.db"
    copy.parent.mkdir()
    shop.books.backup(copy)
    assert await warned(copy)
    assert str(copy) in caplog.text and str(shop.path) in caplog.text
    assert not await warned(copy) and not await warned(shop.path)
    moved = tmp_path / "moved.db"
    copy.rename(moved)
    assert not await warned(moved)
    link = tmp_path / "link.db"
    link.symlink_to(moved)
    assert not await warned(link)


def test_another_secret_is_refused(shop: Shop) -> None:
    """With another secret no key would be found: better not to start."""
    with pytest.raises(SetupError, match="key secret"):
        Books.open(shop.place, clock=shop.clock, secret=lambda engine: bytes(32))


async def test_a_gateway_with_another_secret_is_refused(shop: Shop) -> None:
    """The same for a gateway; the lock is free again afterwards."""
    with pytest.raises(SetupError, match="key secret"):
        await Store.open(shop.place, folder=shop.folder, clock=shop.clock, secret=lambda engine: bytes(32))
    await (await shop.open()).close()


def test_a_store_from_the_future_is_refused(shop: Shop) -> None:
    """An older program leaves a newer store alone."""
    db = SqliteEngine(shop.path).connect(busy_s=1)
    db.execute(f"PRAGMA user_version = {newest(SqliteEngine(shop.path)) + 1}")
    db.close()
    with pytest.raises(SetupError, match="newer embedmesh"):
        Books.open(shop.path, clock=shop.clock, secret=secret)


def test_files_are_private(tmp_path: Path) -> None:
    """Whatever the umask, nobody else can read the folder or any file in it."""
    before = os.umask(0)
    try:
        shop = Shop(tmp_path)
        load_secret(shop.path.parent / "key.secret", SqliteEngine(tmp_path / "none"))
        shop.credit(1)
        assert shop.path.parent.stat().st_mode & 0o777 == 0o700
        files = sorted(shop.path.parent.iterdir())
        assert [file.name for file in files] == ["key.secret", "store.db", "store.db-shm", "store.db-wal"]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        shop.books.close()
    finally:
        os.umask(before)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """A file of something else is left as it is."""
    path = tmp_path / "store.db"
    path.write_bytes(b"not a database, by far" * 100)
    with pytest.raises(SetupError, match="Cannot open the store"):
        Books.open(path, clock=HandClock(), secret=secret)
    path.unlink()
    path.mkdir()
    with pytest.raises(SetupError):
        Books.open(path, clock=HandClock(), secret=secret)
    with pytest.raises(SetupError, match="data-dir"):
        Books.open(Path("/proc/nowhere/store.db"), clock=HandClock(), secret=secret)


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    """The first start makes it; every later one reads the same."""
    path = tmp_path / "data" / "key.secret"
    store = SqliteEngine(path.parent / "store.db")
    made = load_secret(path, store)
    assert len(made) == SECRET_BYTES
    assert load_secret(path, store) == made
    assert [file.name for file in path.parent.iterdir()] == ["key.secret"]


def test_a_lost_secret_is_not_made_anew(shop: Shop) -> None:
    """With a new one no key of the store would be found; and who only reads makes none."""
    path = shop.path.with_name("key.secret")
    with pytest.raises(SetupError, match=r"key.secret is missing.*copy it"):
        load_secret(path, SqliteEngine(shop.path))
    assert not path.exists()


def test_the_first_start_is_no_later_one(tmp_path: Path) -> None:
    """It makes secret, store and credentials; a later start, or the command line, makes no second secret."""
    assert bootstrap(tmp_path, "http://here/v1") == bootstrap(tmp_path, "http://here/v1")
    open_books(tmp_path, tmp_path / "embedmesh.db").close()
    (tmp_path / "key.secret").unlink()
    with pytest.raises(SetupError, match=r"key.secret is missing"):
        open_books(tmp_path, tmp_path / "embedmesh.db")
    (tmp_path / "bootstrap.json").unlink()
    with pytest.raises(SetupError, match=r"key.secret is missing"):
        bootstrap(tmp_path, "http://here/v1")
    assert not (tmp_path / "key.secret").exists()


def test_a_secret_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that we may not enter is one line, not a traceback (root may enter all: so the system is scripted)."""

    def refuse(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(SetupError, match="Permission denied"):
        load_secret(tmp_path / "key.secret", SqliteEngine(tmp_path / "store.db"))
    with pytest.raises(SetupError, match="Permission denied"):
        bootstrap(tmp_path, "http://here/v1")


def test_drafts_of_the_dead_are_removed(tmp_path: Path) -> None:
    """One of a living process, or a file that only looks like one, stays; a link in a draft's place is not followed."""
    path = tmp_path / "secret"
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"secret.{dead.pid}.part", f"secret.{os.getppid()}.part", "secret.mine.part", "other"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / f"secret.{os.getpid()}.part").symlink_to(tmp_path / "other")
    write_draft(path, b"new").replace(path)
    assert path.read_bytes() == b"new"
    assert (tmp_path / "other").read_bytes() == b"old"
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"secret", f"secret.{os.getppid()}.part", "secret.mine.part", "other"}


def test_a_new_name_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the secret has its name, its folder is synced: or a power cut takes the name, and with it every key."""
    synced: list[Path] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    load_secret(tmp_path / "key.secret", SqliteEngine(tmp_path / "store.db"))
    assert synced[0].parent == synced[-1] == tmp_path
    synced.clear()
    bootstrap(tmp_path, "http://here/v1")
    assert synced[-1] == tmp_path
    assert synced[-2].name.startswith("bootstrap.json.")


@pytest.mark.parametrize(("content", "mode", "says"), [(b"short", 0o600, "32 bytes"), (bytes(32), 0o640, "chmod 600")])
def test_a_secret_that_is_none_is_refused(tmp_path: Path, content: bytes, mode: int, says: str) -> None:
    """A damaged secret, or one that others can read, is refused with what to do."""
    path = tmp_path / "key.secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(SetupError, match=says):
        load_secret(path, SqliteEngine(tmp_path / "store.db"))


def test_a_user_is_kept_as_a_keyed_hash() -> None:
    """The same user gives the same hash under one secret only; any text that JSON can carry is taken."""
    assert hash_user(SECRET, "ann") == hash_user(SECRET, "ann") != hash_user(bytes(32), "ann")
    assert len(hash_user(SECRET, "\ud800")) == 32


FILES = sorted(entry.name for entry in (STORAGE_FILES / "statements").iterdir())


@pytest.mark.parametrize("file", FILES)
def test_every_statement_has_a_name_and_a_sentence(file: str) -> None:
    """Each statement is introduced by a sentence."""
    text = (STORAGE_FILES / "statements" / file).read_text(encoding="utf-8")
    for piece in text.split("-- name: ")[1:]:
        _, sentence, *_ = piece.splitlines()
        assert sentence.startswith("-- ")
        assert piece.strip().endswith(";")


REQUEST_PATH = {
    **load("holds.sql"),
    **load("claims.sql"),
    **load("locks.sql"),
    **{name: load("keys.sql")[name] for name in ("find_key", "note_use", "list_keys", "keys_of_account")},
    **{name: load("leases.sql")[name] for name in ("open_minute", "read_minute", "lease")},
    **{name: load("chain.sql")[name] for name in ("last_block", "unchained", "insert_block")},
    **{name: load("reports.sql")[name] for name in ("usage_of_account", "entries_of_account")},
}
del REQUEST_PATH["insert_nodes"]  # it scans who refers to an account, where references are broken
OF_JSON = "VIRTUAL TABLE"  # the rows of the statement itself


@pytest.mark.parametrize("name", REQUEST_PATH)
def test_no_request_reads_a_whole_table(name: str, shop: Shop) -> None:
    """However many rows there are, a statement on a request's path finds its own through an index."""
    db = SqliteEngine(shop.path).connect(busy_s=1)
    plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {REQUEST_PATH[name]}", _Anything())]
    db.close()
    known = "SCAN blocks$|SCAN page$|SCAN all_counted$"  # by its row ids; a few rows that were found by an index
    by_index = re.compile(f"USING (COVERING )?INDEX|USING PRIMARY KEY|CONSTANT ROW|{known}")
    scans = [step for step in plan if step.startswith("SCAN") and not by_index.search(step) and OF_JSON not in step]
    assert scans == []


class _Anything(dict[str, object]):
    """A value for every parameter."""

    def __missing__(self, name: str) -> object:
        return "[]" if name == "rows" else 0
