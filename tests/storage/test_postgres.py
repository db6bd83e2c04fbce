"""PostgreSQL's own troubles: a server that dies, hangs, is not there, or is not for us. Nothing unheld goes on."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bench.rig.postgres import PostgresServer, serving
from embedmesh.rules.errors import InvalidValue, SetupError, StoreAway, StoreUnavailable
from embedmesh.storage.engines import engine_of
from embedmesh.storage.postgres.database import PostgresEngine, translated
from embedmesh.storage.store import Store
from tests.storage.shop import SECRET, Shop, charge

TOLD_S, BACK_S = 2.0, 5.0


@pytest.fixture(scope="module")
def mortal() -> Iterator[PostgresServer]:
    """A server of this module's own, which may be killed."""
    with serving() as server:
        yield server


@pytest.fixture
def shop(mortal: PostgresServer, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path, mortal.new())
    shop.credit(1_000)
    yield shop
    shop.books.close()


async def until_healthy(store: Store) -> None:
    async with asyncio.timeout(BACK_S):
        while not store.healthy():
            await asyncio.sleep(0.01)


async def refused_in_time(shop: Shop, store: Store) -> None:
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.hold(shop.new_hold(10))
    assert time.monotonic() - began < TOLD_S


def children(pid: int) -> list[int]:
    """All processes of a server, itself first."""
    found = [pid]
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(folder.name))
    return found


@pytest.mark.story
async def test_a_server_that_is_killed(shop: Shop, mortal: PostgresServer) -> None:
    """Holds are refused, captures kept; all is well again by itself, and nothing stays held."""
    store = await shop.open()
    _, token = shop.books.keys.create("a", ["embeddings"])
    assert await store.keys.find(token) is not None
    paid, under_way = shop.new_hold(100), shop.new_hold(50)
    await store.hold(paid)
    await store.hold(under_way)
    for pid in children(mortal.pid):  # all at once, as when its machine goes
        os.kill(pid, signal.SIGKILL)
    store.capture(paid, charge(60))
    await refused_in_time(shop, store)
    assert not store.healthy()
    await refused_in_time(shop, store)
    assert await store.keys.find(token) is not None  # reads of what is known go on
    mortal.start_again()
    await until_healthy(store)
    store.capture(under_way, charge(40))
    assert await store.drain() == 0
    await store.hold(shop.new_hold(10))
    shop.books.close()
    again = Shop(shop.folder.parent, str(shop.place), new=False)
    assert again.money() == (900, 10)
    again.assert_right()
    again.books.close()
    await store.close()


@pytest.mark.story
async def test_a_server_that_hangs(shop: Shop, mortal: PostgresServer) -> None:
    """The same; what it did of a hold that was refused is given back."""
    store = await shop.open()
    await store.hold(shop.new_hold(5))
    processes = children(mortal.pid)
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        await refused_in_time(shop, store)
        await asyncio.sleep(0.1)
        assert not store.healthy()
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
    await until_healthy(store)
    assert await store.drain() == 0
    assert shop.money() == (1_000, 5)
    await store.close()
    shop.assert_right()


async def test_sessions_that_are_ended_are_opened_anew(shop: Shop, mortal: PostgresServer) -> None:
    """By the server's operator, in the middle of anything: the writer's, the readers', the listener's."""
    store = await shop.open()
    watching = asyncio.ensure_future(store.changes.watch())
    key, token = shop.books.keys.create("a", ["embeddings"])
    assert await store.keys.find(token) is not None
    with psycopg.connect(str(shop.place), autocommit=True) as db:
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND datname = current_database()"
        )
    shop.books.close()
    for _ in range(2):
        try:
            await store.hold(shop.new_hold(10))
        except StoreUnavailable:
            await until_healthy(store)
    await store.hold(shop.new_hold(10))
    again = Shop(shop.folder.parent, str(shop.place), new=False)
    again.books.keys.revoke(key.key_id)
    ends = time.monotonic() + 2
    while await store.keys.find(token) is not None:
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)
    watching.cancel()
    await store.close()
    again.assert_right()
    again.books.close()


async def test_a_gateway_that_was_stopped_keeps_nobodys_locks(shop: Shop) -> None:
    """A session that idles inside a transaction is ended by the server, after seconds."""
    engine = PostgresEngine(str(shop.place))
    db = engine.connect()
    (limit,) = db.execute("SHOW idle_in_transaction_session_timeout").fetchall()[0]
    assert limit == "3s"
    assert db.execute("SHOW synchronous_commit").fetchall() == [("on",)]
    db.close()


async def test_a_commit_whose_fate_is_unknown_leaves_nothing_held(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is lost after the server has committed: the caller is refused, and the hold is given back."""
    store = await shop.open()
    database: Any = type(vars(store._writer._medium)["_db"])
    commit, lost = database.commit, list[Any]()

    def commit_and_lose(self: Any) -> None:
        commit(self)
        if not lost:
            with self.connection.pipeline():  # waits until the server has committed
                pass
            lost.append(self)
            self.connection.close()
            raise psycopg.OperationalError("the session is lost")

    monkeypatch.setattr(database, "commit", commit_and_lose)
    with pytest.raises(StoreUnavailable):
        await store.hold(shop.new_hold(100))
    assert lost
    await until_healthy(store)
    assert await store.drain() == 0
    assert shop.money() == (1_000, 0)
    assert store.stats.released == 1
    await store.close()
    shop.assert_right()


def test_a_server_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    """Without the password; and as something that may be there soon."""
    url = f"postgresql://me:hidden@/db?host={tmp_path}"
    with pytest.raises(StoreAway, match="EMBEDMESH_STORE") as failure:
        engine_of(url).connect(busy_s=1)
    assert "hidden" not in str(failure.value) and "\n" not in str(failure.value)
    assert "hidden" not in engine_of(url).shown


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(SetupError, match="postgresql://"):
        engine_of("mysql://here/db")
    assert engine_of("here.db").shown == "here.db"


def test_a_backup_is_the_servers_own(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="pg_dump"):
        shop.books.backup(tmp_path / "x")


async def test_the_secret_of_a_store_must_be_there(shop: Shop, tmp_path: Path) -> None:
    """A gateway on another machine is told to bring it."""
    from functools import partial

    from embedmesh.storage.secrets.secret import load_secret

    with pytest.raises(SetupError, match="copy it from another gateway"):
        await Store.open(
            shop.place, folder=tmp_path, clock=shop.clock, secret=partial(load_secret, tmp_path / "key.secret")
        )
    (tmp_path / "key.secret").write_bytes(SECRET)
    (tmp_path / "key.secret").chmod(0o600)
    store = await Store.open(
        shop.place, folder=tmp_path, clock=shop.clock, secret=partial(load_secret, tmp_path / "key.secret")
    )
    await store.close()


async def test_two_machines_with_the_same_name_are_two_gateways(shop: Shop, tmp_path: Path) -> None:
    """A cloned disk: the second takes a name of its own, and leaves the first's holds alone."""
    first = await shop.open()
    await first.hold(shop.new_hold(10))
    clone = tmp_path / "clone"
    clone.mkdir()
    from embedmesh.storage.instance import take_instance

    instance = take_instance(clone, shop.clock)
    instance.rename(first._opened.instance.name)
    instance.close()
    second = await Store.open(shop.place, folder=clone, clock=shop.clock, secret=lambda engine: SECRET)
    assert second.stats.recovered == 0
    assert second._opened.instance.name != first._opened.instance.name
    assert shop.money() == (1_000, 10)
    await second.close()
    await first.close()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("SELECT :a, b :: int", "SELECT %(a)s, b :: int"),
        ("x LIKE 'a%' AND y = :y_1", "x LIKE 'a%%' AND y = %(y_1)s"),
        ("FROM jsonb_each(:rows)", "FROM jsonb_array_elements(CAST(%(rows)s AS jsonb)) AS each (value)"),
    ],
)
def test_statements_are_translated(statement: str, said: str) -> None:
    assert translated(statement) == said
