"""Files: written whole or not at all, seen by their account only, bounded, and deleted when they are of no use."""

import asyncio
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from embedmesh.bulk.remote import file_system
from embedmesh.jobs import folder
from embedmesh.jobs.chunks import ContentsLost
from embedmesh.jobs.disk import Disk
from embedmesh.jobs.files import FileBounds, FileStore, FileWriter
from embedmesh.jobs.objects import ObjectStorage
from embedmesh.rules.batches import (
    FREE_BYTES_KEPT,
    OUTPUT_TIMES,
    BatchState,
    FilePurpose,
    FileRow,
    bytes_paid_for,
    output_bytes_paid_for,
)
from embedmesh.rules.errors import BodyTooLarge, InvalidValue, Overloaded, StoreUnavailable
from embedmesh.rules.file_failures import StorageFull, TooMuchKept
from embedmesh.rules.limits import BATCH_FILE_BYTES_MAX, UPLOADS_MAX
from embedmesh.storage.store import Store
from tests.storage.batching import asks, begun, completed, new_key, work_off
from tests.storage.shop import SECRET, Shop

HOUR_S = 3_600
DAY_MS = 86_400_000


async def create(
    files: FileStore, account_id: str = "a", *, file_max: int = BATCH_FILE_BYTES_MAX, kept_max: int = 10**12
) -> FileWriter:
    return await files.create(
        account_id,
        filename="in.jsonl",
        purpose=FilePurpose.BATCH,
        expires_s=HOUR_S,
        file_bytes_max=file_max,
        kept_bytes_max=kept_max,
    )


async def kept(files: FileStore, data: bytes, account_id: str = "a") -> FileRow:
    async with await create(files, account_id) as writer:
        await writer.write(data)
        return await writer.commit()


async def read(files: FileStore, file_id: str, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join([part async for part in files.read(file_id, start, stop)])


def on_disk(files: FileStore) -> list[str]:
    """The names of all files and segments, drafts too, wherever they are kept."""
    backend = files.folder.backend
    if isinstance(backend, Disk):
        paths = [path for path in backend._folder.rglob("*") if path.parent.name != "stores"]
        return sorted(path.name for path in paths if path.is_file())
    assert isinstance(backend, ObjectStorage)
    system, root = file_system(backend._address, use_listings_cache=False)
    return sorted({path.split("/")[-2] for path in system.find(root) if path != root and "/stores/" not in path})


def grow_old(files: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is kept was written long ago."""
    backend = files.folder.backend
    if not isinstance(backend, Disk):
        monkeypatch.setattr(folder, "STRAY_S", -60.0)  # nobody can date an object
        return
    old = time.time() - 2 * HOUR_S
    for path in backend._folder.rglob("*"):
        os.utime(path, (old, old))


async def test_a_file_is_kept_and_read_by_its_account_only(files: FileStore, shop: Shop) -> None:
    """Another account finds nothing, deletes nothing, and sees nothing in its list."""
    shop.books.accounts.create("b")
    data = os.urandom(1_000_000)
    row = await kept(files, data)
    assert (row.bytes, row.expires_ms - row.created_ms) == (len(data), HOUR_S * 1000)
    async with await create(files) as writer:
        later = await writer.commit(expires_s=7)
    assert (later.bytes, later.expires_ms - later.created_ms) == (0, 7_000)
    assert await read(files, row.file_id) == data
    assert await read(files, row.file_id, 70_000, 200_000) == data[70_000:200_000]
    assert await files.rows.find("a", row.file_id) == row
    assert await files.rows.find("b", row.file_id) is None
    assert not await files.delete("b", row.file_id)
    assert (await files.rows.page("b", limit=10)).files == []
    assert await read(files, row.file_id) == data


async def test_what_is_on_the_disk_is_ours_alone(files: FileStore, shop: Shop) -> None:
    """No plain text, no caller's name, nothing that others can read."""
    row = await kept(files, b"the quick brown fox" * 100)
    for path in (shop.folder / "files").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
        assert "jsonl" not in path.name
        assert path.is_dir() or b"quick" not in path.read_bytes()
    assert on_disk(files) == [row.file_id]


@pytest.mark.parametrize("size", [0, 10, 1_000_000])
async def test_what_was_not_ended_leaves_nothing(files: FileStore, shop: Shop, size: int) -> None:
    """However it was left: by an error, by hand, or because its task was cancelled while it waited for the disk."""
    with pytest.raises(ValueError, match="of the caller"):
        async with await create(files) as writer:
            await writer.write(bytes(size))
            raise ValueError("of the caller")
    writer = await create(files)
    await writer.write(bytes(size))
    await writer.abort()
    await writer.abort()

    async def upload() -> None:
        async with await create(files) as writer:
            while True:
                await writer.write(bytes(300_000))

    task = asyncio.create_task(upload())
    while not on_disk(files):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert on_disk(files) == []
    assert files._uploads.taken == 0


async def test_a_file_is_bounded(files: FileStore, shop: Shop) -> None:
    """By its own bound, by its name, and by what its account may keep: the last before it is read, and while it is."""
    writer = await create(files, file_max=1_000)
    with pytest.raises(BodyTooLarge, match="1,000 bytes"):
        await writer.write(bytes(1_001))
    writer = await create(files, kept_max=500)
    with pytest.raises(TooMuchKept, match="500"):
        await writer.write(bytes(501))
    async with await create(files, kept_max=500) as writer:
        await writer.write(bytes(500))
        await writer.commit()
    with pytest.raises(TooMuchKept, match="delete files, or add credit"):
        await create(files, kept_max=500)
    with pytest.raises(InvalidValue, match="255 characters"):
        await files.create(
            "a", filename="x" * 256, purpose=FilePurpose.BATCH, expires_s=1, file_bytes_max=1, kept_bytes_max=1
        )
    assert len(on_disk(files)) == 1


async def test_uploads_at_one_time_do_not_pass_the_bound_together(
    files: FileStore, store: Store, shop: Shop, place: Path | str
) -> None:
    """Each alone would fit, and each gateway counts its own only: the last to come is refused, and leaves nothing."""
    other = FileStore(place, store.files, store.batches, SECRET, shop.clock, FileBounds(disk_free_min=0))
    await other.open()
    writers = [await create(gateway, kept_max=1_000) for gateway in (files, other, files)]
    for writer in writers:
        await writer.write(bytes(400))
    done = await asyncio.gather(*(writer.commit() for writer in writers), return_exceptions=True)
    assert sorted(type(each).__name__ for each in done) == ["FileRow", "FileRow", "TooMuchKept"]
    assert len(on_disk(files)) == 2
    assert (await files.rows.kept("a")).bytes == 800
    await other.close()


async def test_no_account_takes_all_uploads(files: FileStore, shop: Shop) -> None:
    """Others find room, and what has ended gives its room back."""
    shop.books.accounts.create("b")
    writers: list[FileWriter] = []
    with pytest.raises(Overloaded, match="each account up to a share"):
        while True:
            writers.append(await create(files))
    assert len(writers) < UPLOADS_MAX
    await kept(files, b"x", "b")
    for writer in writers:
        await writer.abort()
    await kept(files, b"x")


async def test_an_account_fills_a_share_of_the_disk_only(files: FileStore) -> None:
    """Four fifths of what is free, as of everything that is shared; less where its money says so."""
    await kept(files, bytes(1_000_000))
    free = files.folder.backend.free_bytes()
    allowed = await files.bytes_allowed("a")
    assert abs(allowed - min(FileBounds().of_account, (1_000_000 + free) * 4 // 5)) < 50_000_000
    assert await files.bytes_allowed("a", 123) == 123


async def test_a_disk_that_can_never_hold_files_shows_no_room_that_could_be_too_little(files: FileStore) -> None:
    """A gateway of the chart without a claim has a few MiB: that is no alert."""
    await files.look()
    assert (files.free_bytes or 0) > 0 and not files.unavailable
    small = FileStore(
        Path(files.place), files.rows, files._batches, SECRET, files._clock, FileBounds(disk_free_min=2**60)
    )
    await small.open()
    await small.look()
    assert small.free_bytes is None and not small.unavailable
    await small.close()


async def test_what_an_account_may_send_follows_from_its_money(files: FileStore, store: Store, shop: Shop) -> None:
    """One without money may try; what was spent lately counts, and the output of paid work does not."""
    price = 20_000_000  # $0.02 a million tokens
    for credit, bytes_max in ((0, FREE_BYTES_KEPT), (2_000, FREE_BYTES_KEPT + 100 * 128)):
        if credit:
            shop.credit(credit)
        assert bytes_paid_for(await files.rows.means_nanousd("a"), price) == bytes_max
    assert bytes_paid_for(0, 0) is None
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [100])
    assert await files.rows.means_nanousd("a") == 2_000
    await work_off(store, lease, units, key_id)
    await completed(store, shop, lease)
    assert (await files.rows.means_nanousd("a"), shop.money()) == (2_000, (1_000, 0))
    assert await files.bytes_allowed("a", 500) == 500 + 10  # the output file has ten bytes
    shop.clock.now_ms += 31 * DAY_MS
    assert await files.rows.means_nanousd("a") == 1_000
    assert await files.rows.means_nanousd("nobody") == 0


async def test_a_full_disk_is_told_and_nothing_is_left(files: FileStore, shop: Shop) -> None:
    """By our own bound, and by the disk itself: here the largest size that the system allows for a file."""
    disk = files.folder.backend
    assert isinstance(disk, Disk)
    disk._free_min = 2**62
    async with await create(files) as writer:
        with pytest.raises(StorageFull, match="no room"):
            await writer.write(bytes(1_000_000))
    with pytest.raises(StorageFull):
        await files.write_segment("batch_1", [b"x"], [])
    disk._free_min = 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = await create(files)
    await writer.write(bytes(300_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(StorageFull, match="full"):
            await writer.write(bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert on_disk(files) == []


async def test_a_row_that_may_not_have_been_kept_is_not(files: FileStore, store: Store, shop: Shop) -> None:
    """The store does not answer: the caller hears so, and later neither row nor contents are there."""
    writer = await create(files)
    await writer.write(b"x")
    real = store.files._write

    async def unheard(*given: object) -> object:
        await real(*given)  # type: ignore[arg-type]
        raise StoreUnavailable("it was written, and nobody heard of it")

    store.files._write = unheard  # type: ignore[assignment]
    with pytest.raises(StoreUnavailable):
        await writer.commit()
    store.files._write = real
    await store.drain()
    assert await files.rows.find("a", writer.file_id) is None
    assert on_disk(files) == []


async def test_files_are_deleted_and_expire(files: FileStore, shop: Shop) -> None:
    """A deleted one at once; an expired one is seen by nobody, and is swept."""
    one, two = await kept(files, b"1"), await kept(files, b"2")
    assert await files.delete("a", one.file_id)
    assert not await files.delete("a", one.file_id)
    assert on_disk(files) == [two.file_id]
    with pytest.raises(ContentsLost):
        await read(files, one.file_id)
    shop.clock.now_ms += HOUR_S * 1000
    assert await files.rows.find("a", two.file_id) is None
    assert (await files.rows.page("a", limit=10)).files == []
    shop.clock.now_ms += 60_001
    assert await files.sweep() == 1
    assert on_disk(files) == []
    assert (await files.rows.kept("a")).files == 0


async def test_contents_without_a_row_are_swept_when_they_are_old(
    files: FileStore, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process left that died between two steps: a sealed file, a draft, segments. Nothing that is young."""
    row = await kept(files, b"kept")
    sealed = await create(files)
    await sealed.write(b"x")
    await sealed.seal()
    draft = await create(files)
    await draft.write(bytes(3_000_000))
    await files.write_segment("batch_unknown", [b"x"], [b"y"])
    assert len(on_disk(files)) == 4
    await files.sweep()
    assert len(on_disk(files)) == 4
    grow_old(files, monkeypatch)
    await files.sweep()  # the next search for strays is an hour later
    assert len(on_disk(files)) == 4
    shop.clock.skipped_s += HOUR_S
    assert await files.sweep() == 3
    assert on_disk(files) == [row.file_id]
    await draft.abort()


async def test_nothing_is_swept_where_another_store_keeps_files(
    files: FileStore,
    store: Store,
    shop: Shop,
    place: Path | str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a store does not know may be of the other one, whichever came first; the log says what to do."""
    other = FileStore(place, store.files, store.batches, bytes(32), shop.clock, FileBounds(disk_free_min=0))
    await other.open()
    await other.sweep()
    await files.write_segment("batch_unknown", [b"x"], [b"y"])
    grow_old(files, monkeypatch)
    assert await files.sweep() == 0
    shop.clock.skipped_s += HOUR_S
    assert await other.sweep() == 0
    assert len(on_disk(files)) == 1
    assert caplog.text.count("delete what is under stores/") == 2
    await other.close()


async def test_a_batch_reads_its_file_though_it_was_deleted(files: FileStore, store: Store, shop: Shop) -> None:
    """Nobody sees it any more; the contents stay until the batch is over, and go then."""
    key_id = new_key(shop)
    row = await kept(files, b"lines")
    batch = await store.batches.create(asks(key_id, file_id=row.file_id))
    assert await files.delete("a", row.file_id)
    assert await files.rows.find("a", row.file_id) is None
    found = await files.rows.find_input("a", row.file_id)
    assert found is not None
    shop.clock.now_ms += 2 * HOUR_S * 1000
    await files.sweep()
    assert await read(files, row.file_id) == b"lines"
    await store.batches.cancel("a", batch.batch_id)
    taken = await store.batches.lease()
    assert taken is not None
    ended = await store.batches.finish(taken[0], None, None, failed=0)
    assert ended.state is BatchState.CANCELLED
    await files.sweep()
    assert on_disk(files) == []


async def test_segments_keep_output_and_errors_apart(files: FileStore, shop: Shop) -> None:
    """Each try has a name of its own; all go with their batch."""
    big = [os.urandom(100_000) for _ in range(5)]
    one = await files.write_segment("batch_1", big, [b"error 1\n", b"error 2\n"])
    two = await files.write_segment("batch_1", [], [b"error\n"])
    assert b"".join([part async for part in files.read_segment("batch_1", one, errors=False)]) == b"".join(big)
    assert b"".join([part async for part in files.read_segment("batch_1", one, errors=True)]) == b"error 1\nerror 2\n"
    assert [part async for part in files.read_segment("batch_1", two, errors=False)] == []
    with pytest.raises(ContentsLost):
        [part async for part in files.read_segment("batch_2", one, errors=True)]
    assert len(on_disk(files)) == 2
    await files.drop_segments("batch_1")
    assert on_disk(files) == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "file-/x", "a" * 100])
async def test_no_path_comes_from_elsewhere(files: FileStore, name: str) -> None:
    """Ids are ours: anything else is not looked for."""
    with pytest.raises(ContentsLost):
        await read(files, name)


async def test_two_gateways_share_a_folder(files: FileStore, store: Store, shop: Shop, place: Path | str) -> None:
    """What one has kept, the other reads."""
    row = await kept(files, b"x" * 100_000)
    other = FileStore(place, store.files, store.batches, SECRET, shop.clock)
    await other.open()
    assert await read(other, row.file_id) == b"x" * 100_000
    await other.close()


async def test_a_caller_that_leaves_at_the_last_moment_leaves_nothing(files: FileStore, shop: Shop) -> None:
    """While its file becomes durable: it has no row yet, and would lie there uncounted."""
    writer = await create(files)
    await writer.write(bytes(1_000))
    await writer._flush()
    assert writer._written is not None
    end, ended, may_end = writer._written.end, threading.Event(), threading.Event()

    def slow() -> None:
        end()
        ended.set()
        may_end.wait(20)

    writer._written.end = slow  # type: ignore[method-assign]
    task = asyncio.create_task(writer.commit())
    while not ended.is_set():
        await asyncio.sleep(0.001)
    assert len(on_disk(files)) == 1
    task.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert on_disk(files) == []


async def test_uploads_at_one_time_count_together_while_they_come(files: FileStore, shop: Shop) -> None:
    """Or fifty of one account would fill the disk before the first is refused."""
    shop.books.accounts.create("b")
    first, second = await create(files, kept_max=1_000), await create(files, kept_max=1_000)
    await first.write(bytes(600))
    with pytest.raises(TooMuchKept):
        await second.write(bytes(600))
    other = await create(files, "b", kept_max=1_000)
    await other.write(bytes(600))
    await first.commit()
    await other.commit()
    assert not files.sending


async def test_what_an_account_without_money_may_keep_of_outputs(files: FileStore, store: Store, shop: Shop) -> None:
    """Lines that are refused or cancelled are free, and their errors are kept: not without bound."""
    shop.books.accounts.create("poor")
    poor = await files.bytes_for_output("poor", 5_000)
    assert poor == output_bytes_paid_for(0, 5_000) == OUTPUT_TIMES * FREE_BYTES_KEPT
    assert await files.bytes_for_output("poor", 0) > poor, "where nothing costs, money bounds nothing"
    shop.books.accounts.credit("poor", 10**9, "poor")
    assert await files.bytes_for_output("poor", 5_000) > poor
