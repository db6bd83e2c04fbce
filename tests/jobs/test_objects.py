"""Files in object storage: what holds on a disk holds there, and storage that is away, slow or refuses hurts nobody."""

import asyncio
import logging
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from bench.rig.object_storage import S3Server
from embedmesh.bulk.remote import file_system
from embedmesh.jobs import objects
from embedmesh.jobs.chunks import ContentsLost
from embedmesh.jobs.files import FileStore
from embedmesh.jobs.objects import HEAD, MARK, ObjectStorage
from embedmesh.rules.errors import SetupError
from embedmesh.rules.file_failures import StorageFull
from tests.data import quick_or
from tests.jobs.faulty import faults
from tests.jobs.test_files import (
    create,
    kept,
    on_disk,
    read,
    test_a_caller_that_leaves_at_the_last_moment_leaves_nothing,
    test_a_file_is_kept_and_read_by_its_account_only,
    test_contents_without_a_row_are_swept_when_they_are_old,
    test_files_are_deleted_and_expire,
    test_no_path_comes_from_elsewhere,
    test_nothing_is_swept_where_another_store_keeps_files,
    test_segments_keep_output_and_errors_apart,
    test_two_gateways_share_a_folder,
    test_uploads_at_one_time_do_not_pass_the_bound_together,
    test_what_was_not_ended_leaves_nothing,
)
from tests.storage.shop import Shop

__all__ = [  # the same tests as for a disk
    "test_a_caller_that_leaves_at_the_last_moment_leaves_nothing",
    "test_a_file_is_kept_and_read_by_its_account_only",
    "test_contents_without_a_row_are_swept_when_they_are_old",
    "test_files_are_deleted_and_expire",
    "test_no_path_comes_from_elsewhere",
    "test_nothing_is_swept_where_another_store_keeps_files",
    "test_segments_keep_output_and_errors_apart",
    "test_two_gateways_share_a_folder",
    "test_uploads_at_one_time_do_not_pass_the_bound_together",
    "test_what_was_not_ended_leaves_nothing",
]

SECRET_WORDS = "AKIAEXAMPLEKEY wJalrXUtnFEMI"  # as an error of a driver may have them


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """In a file: stores of either kind see nothing of where files are."""
    shop = Shop(tmp_path)
    yield shop
    shop.books.close()


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own: in memory, and at a real server that speaks S3."""
    if request.param == "memory":
        return f"faulty://{uuid4()}"
    server: S3Server = request.getfixturevalue("s3")
    return server.new_address(monkeypatch.setenv)


only_memory = pytest.mark.parametrize("place", ["memory"], indirect=True)


def parts_of(files: FileStore) -> list[str]:
    """The paths of all objects, within the prefix."""
    backend = files.folder.backend
    assert isinstance(backend, ObjectStorage)
    system, root = file_system(backend._address, use_listings_cache=False)
    return sorted(path.partition(root)[2] for path in system.find(root) if "/stores/" not in path)


@pytest.mark.parametrize("over", [-1, 0, 1, 70_000])
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_any_part_is_read_whatever_the_length(monkeypatch: pytest.MonkeyPatch, parts: int, over: int) -> None:
    """What was written in pieces is read from any byte to any other, ahead of what was asked for or not."""
    monkeypatch.setattr(objects, "PART_BYTES", 200_000)
    monkeypatch.setattr(objects, "FIRST_BYTES", 50_000)
    storage = ObjectStorage(f"faulty://{uuid4()}", "s")
    storage.make()
    storage.mark()  # or nothing counts as lost
    content = os.urandom(max(0, 200_000 * parts + over))
    draft = storage.begin("contents/ab/file-ab")
    for at in range(0, len(content), 65_552):
        draft.write(content[at : at + 65_552])
    with pytest.raises(ContentsLost):
        storage.open("contents/ab/file-ab")  # it is not there before its end
    draft.end()
    stored = storage.open("contents/ab/file-ab")
    assert stored.size == len(content)
    for start in (0, 1, 199_999, 200_000, 200_001, len(content) - 1, len(content), len(content) + 5):
        for size, ahead in ((1, 0), (65_552, 0), (65_552, 262_144), (10**6, 0)):
            if start >= 0:
                assert stored.read(start, size, start + size + ahead) == content[start : start + size]
    draft.abort()
    with pytest.raises(ContentsLost):
        storage.open("contents/ab/file-ab")


@only_memory
async def test_what_was_changed_or_is_missing_is_noticed(files: FileStore) -> None:
    """Nothing of it is taken for the file: not with a part gone, swapped or cut, nor with another end."""
    plain = os.urandom(5_000_000)
    row = await kept(files, plain)
    backend = files.folder.backend
    assert isinstance(backend, ObjectStorage)
    system, root = file_system(backend._address)
    assert [path.rpartition("/")[2] for path in parts_of(files)] == ["000000", "000001", "end"]
    paths = [root + path for path in parts_of(files)]
    whole = {path: system.cat_file(path) for path in paths}
    assert not any(plain[:64] in content for content in whole.values())
    first, second, end = paths
    mark, size, total = HEAD.unpack_from(whole[end])
    tail = whole[end][HEAD.size :]
    for changed in (
        {first: None},
        {second: None},
        {end: None},
        {first: whole[second], second: whole[first]},
        {second: whole[second][:-1]},
        {second: whole[second][:1_000_000]},
        {end: whole[end][:-1]},
        {end: HEAD.pack(mark, size, total - len(tail)) + tail},
        {end: HEAD.pack(mark, 0, total) + tail},
        {end: HEAD.pack(mark, size, 2**63) + tail},
        {end: b"XXXX" + whole[end][4:]},
        {end: MARK},
    ):
        for path, content in changed.items():
            system.rm_file(path) if content is None else system.pipe_file(path, content)
        with pytest.raises(ContentsLost):
            await read(files, row.file_id)
        for path in changed:
            system.pipe_file(path, whole[path])
    assert await read(files, row.file_id) == plain


@only_memory
async def test_storage_that_refuses_is_told_without_its_words(
    files: FileStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A caller hears to come again; the log names the operation and the type of the error, once; no secret is shown."""

    def refuse(operation: str) -> None:
        raise OSError(f"SignatureDoesNotMatch {SECRET_WORDS}")

    row = await kept(files, b"x" * 100_000)
    with faults(refuse), caplog.at_level(logging.INFO):
        for _ in range(3):
            async with await create(files) as writer:
                with pytest.raises(StorageFull, match="Try again later"):
                    await writer.write(bytes(3_000_000))
            with pytest.raises(StorageFull):
                await read(files, row.file_id)
            with pytest.raises(StorageFull):
                await files.write_segment("batch_1", [b"x"], [])
        assert await files.delete("a", row.file_id)
    lines = [record.getMessage() for record in caplog.records]
    assert any("pipe_file OSError" in line for line in lines)
    assert len(lines) < 12
    assert not any(word in line for line in lines for word in SECRET_WORDS.split())
    assert files._uploads.taken == 0
    assert on_disk(files) == [row.file_id], "a stray, which is swept"


@only_memory
async def test_not_found_is_not_lost_while_nothing_is_found(files: FileStore) -> None:
    """A driver says of storage that restarts what it says of a lost object: its own mark is not there either."""
    row = await kept(files, b"x" * 100_000)
    told: list[str] = []

    def nothing(operation: str) -> None:
        told.append(operation)
        raise FileNotFoundError

    def back(operation: str) -> None:
        told.append(operation)
        if len(told) == 1:
            raise FileNotFoundError

    with faults(nothing), pytest.raises(StorageFull):
        await read(files, row.file_id)
    told.clear()
    with faults(back):
        assert await read(files, row.file_id) == b"x" * 100_000


@pytest.mark.parametrize(
    ("body", "means"),
    [
        (b"<html>not found</html>", StorageFull),
        (b"", StorageFull),
        (b"<Error><Code>NoSuchBucket</Code></Error>", StorageFull),
        (b"<Error><Code>NoSuchKey</Code></Error>", ContentsLost),
    ],
)
async def test_of_an_s3_only_its_own_word_means_that_an_object_is_lost(
    body: bytes, means: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy before it answers 404, too, while it restarts."""
    pytest.importorskip("s3fs")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage = ObjectStorage(f"s3://bucket/{uuid4()}", "s")
    await asyncio.to_thread(storage.make)
    with pytest.raises(means):
        await asyncio.wait_for(asyncio.to_thread(storage.get, "contents/ab/file-ab/end", 0, 10), 60)
    server.close()


@only_memory
async def test_storage_that_answers_nothing_holds_nobody(files: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation has its time; others that wait hear of it at once; the loop runs on; then all is as before."""
    monkeypatch.setattr(objects, "OPERATION_S", 0.5)
    monkeypatch.setattr(objects, "DROP_S", 0.1)
    row = await kept(files, b"x" * 100_000)
    back = threading.Event()
    ticks = 0

    def silent(operation: str) -> None:
        back.wait(30)

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    with faults(silent):
        reads = await asyncio.gather(*(read(files, row.file_id) for _ in range(40)), return_exceptions=True)
        assert all(isinstance(each, StorageFull) for each in reads)
        async with await create(files) as writer:
            with pytest.raises(StorageFull):
                await writer.write(bytes(3_000_000))
        back.set()
    ticking.cancel()
    assert ticks > 5
    monkeypatch.setattr(objects, "OPERATION_S", 20.0)
    await asyncio.sleep(objects.AWAY_S)
    assert await read(files, row.file_id) == b"x" * 100_000


@only_memory
async def test_storage_that_is_away_is_seen_without_any_request(files: FileStore) -> None:
    def refuse(operation: str) -> None:
        raise OSError

    for away in (False, True, False):
        with faults(refuse if away else lambda operation: None):
            await files.look()
        assert files.unavailable is away
    assert files.free_bytes is None


@only_memory
async def test_a_gateway_that_ends_does_not_wait_for_storage(files: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits gives up, and so does what waits for a thread."""
    monkeypatch.setattr("embedmesh.jobs.files.CLOSE_S", 0.1)
    row = await kept(files, b"x")
    back = threading.Event()

    def silent(operation: str) -> None:
        back.wait(30)

    with faults(silent):
        reads = [asyncio.create_task(read(files, row.file_id)) for _ in range(40)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await files.close()
        assert time.monotonic() - began < objects.OPERATION_S
        done = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(each, StorageFull) for each in done)
        back.set()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nosuch://bucket/x", "Protocol not known"),
        ("file:///tmp/x", "as a path"),
        ("memory://", "names no bucket"),
        ("memory://bucket/x?key=secret", "SCHEME://BUCKET/PREFIX"),
        ("sftp://user:secret@host/x", "SCHEME://BUCKET/PREFIX"),
        ("simplecache::memory://x", "SCHEME://BUCKET/PREFIX"),
        ("abfs://container/x", "adlfs"),
    ],
)
def test_an_address_that_cannot_be_is_refused_at_the_start(address: str, says: str) -> None:
    """In one line, which names what to install, and no secret."""
    with pytest.raises(SetupError, match=says) as refused:
        ObjectStorage(address, "s").make()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("place", ["s3"], indirect=True)
async def test_an_upload_takes_little_memory(files: FileStore) -> None:
    """However long the file is, a part of it is there, and some times that while it is sent."""
    async with await create(files) as writer:
        await writer.write(bytes(3_000_000))
        tracemalloc.start()
        try:
            for _ in range(quick_or(400, quick=100)):
                await writer.write(bytes(256 * 1024))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 64_000_000


@pytest.mark.parametrize("how", ["refuses", "is silent", "is away"])
async def test_an_s3_that_does_not_work_holds_nobody(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real driver, whatever it tries meanwhile: it has its time, and neither key nor secret is shown."""
    pytest.importorskip("s3fs")
    monkeypatch.setattr(objects, "OPERATION_S", 2.0)
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while head := await reader.readuntil(b"\r\n\r\n"):
            asked += 1
            if how == "refuses":
                length = next(
                    (int(row[15:]) for row in head.split(b"\r\n") if row[:15].lower() == b"content-length:"), 0
                )
                await reader.readexactly(length)
                body = b"<Error><Code>SlowDown</Code><Message>%s</Message></Error>" % SECRET_WORDS.encode()
                writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    if how == "is away":
        server.close()
    key, secret = SECRET_WORDS.split()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage = ObjectStorage(f"s3://bucket/{uuid4()}", "s")
    with caplog.at_level(logging.INFO):
        await asyncio.to_thread(storage.make)
        for _ in range(2):
            with pytest.raises(StorageFull):
                await asyncio.wait_for(asyncio.to_thread(storage.put, "contents/ab/file-ab/end", b"x"), 60)
            await asyncio.sleep(objects.AWAY_S)
    assert bool(asked) == (how != "is away")
    assert "pipe_file" in caplog.text
    assert key not in caplog.text and secret not in caplog.text
    server.close()
