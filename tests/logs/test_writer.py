"""Whoever logs never waits for whoever reads; what cannot be written is counted, and said."""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from embedmesh.logs.lines import LOG_LINE_BYTES_MAX, LineFormat
from embedmesh.logs.writer import (
    FILE_BYTES_AT_ONCE,
    LINES_OF_TEMPLATE_MAX,
    QUEUED_LINES_MAX,
    QUEUED_REQUESTS_MAX,
    TEMPLATE_WINDOW_S,
    LogHandler,
    LogWriter,
)
from embedmesh.rules.request_record import RequestRecord

Pipe = tuple[int, LogWriter]
SMALL_PIPE = 4_096
MORE_LINES = 2_000  # than fit; the thread takes some hundred of nine bytes each
WAIT_S = 30.0


@pytest.fixture(params=[True])
def pipe(request: pytest.FixtureRequest) -> Iterator[Pipe]:
    """The reading end of a small pipe, which does not block, and a writer to the other, which does."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
    os.set_blocking(reading, False)
    os.set_blocking(writing, request.param)
    writer = LogWriter(LineFormat("text", "t"), writing)
    yield reading, writer
    with suppress(OSError):  # the test has closed it
        os.close(reading)
    writer.stop()
    os.close(writing)


def read_until(reading: int, whole: Callable[[bytes], bool]) -> bytes:
    said, until = b"", time.monotonic() + WAIT_S
    while not whole(said):
        assert time.monotonic() < until, said[-500:]
        try:
            said += os.read(reading, 65_536)
        except BlockingIOError:
            time.sleep(0.005)
    return said


def request(number: int) -> RequestRecord:
    return RequestRecord(f"req_{number}", method="POST", route="/v1/embeddings", status=200, outcome="ok")


def test_lines_and_requests_are_written_whole_and_in_order(pipe: Pipe) -> None:
    """Also those that are put in a moment in which the thread has just looked."""
    reading, writer = pipe
    for number in range(3_000):
        writer.put_request(request(number))
        if number % 300 == 0:
            writer.put_line(b"line %d\n" % number)
            time.sleep(0.001)
    said = read_until(reading, lambda said: b"req_2999]" in said and b"line 2700\n" in said)
    lines = said.splitlines()
    assert len(lines) == 3_010 and writer.dropped == 0
    assert [each for each in lines if each.startswith(b"line")] == [b"line %d" % n for n in range(0, 3_000, 300)]
    found = [each.partition(b"request_id=")[2] for each in lines if b"request_id" in each]
    assert found == [b"req_%d]" % number for number in range(3_000)]


def test_who_does_not_read_stops_nobody(pipe: Pipe) -> None:
    """Queues are bounded; a flood of requests does not push lines out; once somebody reads, the loss is said."""
    reading, writer = pipe
    for number in range(2 * QUEUED_REQUESTS_MAX):
        writer.put_request(request(number))
    lost = writer.dropped
    assert lost >= QUEUED_REQUESTS_MAX - 2 * SMALL_PIPE // 60, "a few were written to the pipe"
    writer.put_line(b"it matters\n")
    assert writer.dropped == lost
    for _ in range(QUEUED_LINES_MAX + MORE_LINES):
        writer.put_line(b"too many\n")
    assert writer.dropped >= lost + 10, "all but what the thread has taken meanwhile, a chunk and a pipe full"
    writer.flush(0.05)  # waits no longer than that
    said = read_until(reading, lambda said: b" log lines were dropped" in said)
    assert b"it matters\n" in said
    told = int(said.partition(b" log lines were dropped")[0].rpartition(b" ")[2])
    assert told == writer.dropped
    assert (
        said.count(b"req_") + said.count(b"too many") + told == 2 * QUEUED_REQUESTS_MAX + QUEUED_LINES_MAX + MORE_LINES
    )


def test_who_has_gone_stops_nobody(pipe: Pipe) -> None:
    reading, writer = pipe
    os.close(reading)
    for number in range(100):
        writer.put_request(request(number))
        writer.put_line(b"line\n")
    writer.flush(WAIT_S)
    assert writer.dropped >= 200


@pytest.mark.parametrize("pipe", [False], indirect=True)
def test_a_descriptor_that_does_not_block_gets_all_lines(pipe: Pipe) -> None:
    """As where a program that shares the terminal has set it so."""
    reading, writer = pipe
    for number in range(500):
        writer.put_request(request(number))
    said = read_until(reading, lambda said: b"req_499]" in said)
    assert said.count(b"\n") == 500 and writer.dropped == 0


@pytest.mark.parametrize(("to_file", "most"), [(False, LOG_LINE_BYTES_MAX), (True, FILE_BYTES_AT_ONCE)])
def test_writes_are_whole_lines_and_no_larger_than_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_file: bool, most: int
) -> None:
    """To a pipe what nobody else's write can break; to a file more; a line that is longer alone."""
    written: list[bytes] = []
    write = os.write

    def noted(fd: int, data: bytes) -> int:
        written.append(bytes(data))
        return write(fd, data)

    monkeypatch.setattr(os, "write", noted)
    reading, writing = os.pipe()
    if to_file:
        os.close(writing)
        writing = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = LogWriter(LineFormat("json", "t"), writing)
    long = b"x" * 5_000 + b"\n"
    writer.put_line(b"first\n")
    writer.put_line(long)
    for number in range(40):
        writer.put_request(request(number))
    writer.flush(WAIT_S)
    writer.stop()
    os.close(reading)
    os.close(writing)
    assert b"".join(written).count(b"\n") == 42 and writer.dropped == 0
    assert all(each.endswith(b"\n") and (len(each) <= most or each == long) for each in written)
    assert len(written) <= (3 if to_file else 8)


def test_of_one_template_only_so_many_a_while(pipe: Pipe) -> None:
    """Whatever provokes it; other lines are not affected, and the number of the others is said."""
    reading, writer = pipe
    now = 0.0
    handler = LogHandler(writer, lambda: now)

    def log(words: str, *args: object) -> None:
        handler.handle(logging.LogRecord("embedmesh.x", logging.INFO, "", 0, words, args, None))

    for number in range(LINES_OF_TEMPLATE_MAX + 5):
        log("again %d", number)
    log("another %d", 1)
    now = TEMPLATE_WINDOW_S
    log("again %d", 1_000)
    said = read_until(reading, lambda said: b"again 1000" in said)
    assert said.count(b"again") == LINES_OF_TEMPLATE_MAX + 1
    assert b"another 1" in said and b": 5 more lines like earlier ones were left out" in said


def test_the_thread_survives_whatever_is_raised(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writer = pipe
    write, broken = writer._write, iter([True])

    def once(chunk: bytes) -> None:
        if next(broken, False):
            raise ValueError("a bug")
        write(chunk)

    monkeypatch.setattr(writer, "_write", once)
    writer.put_line(b"lost\n")
    writer.flush(WAIT_S)
    writer.put_request(request(2))
    read_until(reading, lambda said: b"req_2" in said and b"1 log lines were dropped" in said)
