"""What an encrypted file promises: any part can be read; nothing is changed, swapped or cut unnoticed."""

import io
import os
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.jobs.chunks import CHUNK_BYTES, HEADER_BYTES, STORED_BYTES, ContentsLost, SealedReader, SealedWriter
from embedmesh.jobs.disk import DiskFile
from tests.data import quick_or

SECRET = bytes(range(32))
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7]


def written(path: Path, plain: bytes, name: str = "file-1", step: int = 10_000) -> Path:
    with path.open("wb") as file:
        chunks = SealedWriter(file, SECRET, name)
        for at in range(0, len(plain), step):
            chunks.write(plain[at : at + step])
        chunks.end()
        assert chunks.bytes == len(plain)
    return path


def read(path: Path, start: int = 0, stop: int | None = None, *, name: str = "file-1", secret: bytes = SECRET) -> bytes:
    with closing(DiskFile(path)) as file:
        return b"".join(SealedReader(file, secret, name).parts(start, stop))


@pytest.mark.parametrize("size", SIZES)
def test_what_was_written_is_read(tmp_path: Path, size: int) -> None:
    """Whatever the pieces it came in; and the file says how long it is."""
    plain = os.urandom(size)
    for step in (7_919, CHUNK_BYTES, 10**6):
        path = written(tmp_path / "x", plain, step=step)
        assert read(path) == plain
        with closing(DiskFile(path)) as file:
            assert SealedReader(file, SECRET, "file-1").bytes == size


@given(size=st.integers(0, 3 * CHUNK_BYTES), spans=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3))
@settings(max_examples=quick_or(200, quick=10), deadline=None)
def test_any_part_is_read(size: int, spans: list[tuple[float, float]]) -> None:
    """From any byte to any other."""
    plain = os.urandom(size)
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "x", plain)
        for one, other in spans:
            start, stop = sorted((int(one * size), int(other * size)))
            assert read(path, start, stop) == plain[start:stop]


def test_no_plain_text_is_on_the_disk(tmp_path: Path) -> None:
    """And the same text is never the same file."""
    plain = b"the quick brown fox " * 10_000
    path = written(tmp_path / "x", plain)
    stored = path.read_bytes()
    assert b"quick" not in stored
    assert written(tmp_path / "y", plain).read_bytes()[HEADER_BYTES:] != stored[HEADER_BYTES:]


def test_another_secret_or_name_opens_nothing(tmp_path: Path) -> None:
    """A file that somebody has put in another's place is not read."""
    path = written(tmp_path / "x", b"mine")
    with pytest.raises(ContentsLost):
        read(path, name="file-2")
    with pytest.raises(ContentsLost):
        read(path, secret=bytes(32))


CHUNK = slice(HEADER_BYTES, HEADER_BYTES + STORED_BYTES)
SECOND = slice(CHUNK.stop, CHUNK.stop + STORED_BYTES)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a bit of a chunk", lambda s: s[:100] + bytes([s[100] ^ 1]) + s[101:]),
        ("a bit of the salt", lambda s: s[:20] + bytes([s[20] ^ 1]) + s[21:]),
        ("the mark", lambda s: b"X" + s[1:]),
        ("two chunks swapped", lambda s: s[: CHUNK.start] + s[SECOND] + s[CHUNK] + s[SECOND.stop :]),
        ("a chunk left out", lambda s: s[: CHUNK.start] + s[SECOND] + s[SECOND.stop :]),
        ("the last chunk cut off", lambda s: s[: SECOND.stop]),
        ("all but the first chunk cut off", lambda s: s[: CHUNK.stop]),
        ("a byte cut off", lambda s: s[:-1]),
        ("cut within a tag", lambda s: s[: CHUNK.start + 5]),
        ("all chunks cut off", lambda s: s[: CHUNK.start]),
        ("cut within the header", lambda s: s[:10]),
        ("nothing left", lambda s: b""),
        ("a byte more", lambda s: s + b"x"),
    ],
)
def test_what_was_changed_is_noticed(tmp_path: Path, what: str, change: object) -> None:
    """Whatever is changed, reading to the end says so."""
    plain = os.urandom(2 * CHUNK_BYTES + 500)
    path = written(tmp_path / "x", plain)
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ContentsLost):
        assert read(path, 0, len(plain)) == plain, what


def test_a_file_that_is_shorter_than_was_said_is_noticed(tmp_path: Path) -> None:
    """Also where the part that is asked for lies behind its end."""
    path = written(tmp_path / "x", b"short")
    with pytest.raises(ContentsLost):
        read(path, 10, 20)
    assert read(path, 10) == b""


def test_a_writer_keeps_no_more_than_two_chunks(tmp_path: Path) -> None:
    """What is whole goes to the disk."""
    out = io.BytesIO()
    chunks = SealedWriter(out, SECRET, "file-1")
    for _ in range(100):
        chunks.write(bytes(50_000))
        assert chunks.bytes - len(out.getvalue()) <= 2 * CHUNK_BYTES
