"""Writes log lines to a file descriptor in a thread of its own: no program waits for what reads its log.

A pipe that is full blocks the thread, and nothing else. What finds its queue full meanwhile is dropped, counted, and
said once there is room again.
"""

import atexit
import logging
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable

from embedmesh.logs.lines import LOG_LINE_BYTES_MAX, LineFormat
from embedmesh.rules.request_record import RequestRecord

QUEUED_LINES_MAX = 2_048  # of a kilobyte each at most: what happens in a bad minute
QUEUED_REQUESTS_MAX = 8_192  # four seconds of a gateway's process under full load; half a kilobyte each
LOG_GATHER_S = (
    0.2  # lines of requests are written that much later, and together: to wake a thread costs more than a line
)
LINES_AT_ONCE = 64  # are made and written; a fifth of a millisecond, for which the event loop may have to wait
FILE_BYTES_AT_ONCE = 64 * 1024  # in one write to a file, which nobody writes into meanwhile
LOG_FLUSH_S = 1.0  # at the end of the program
DESCRIPTOR_AGAIN_S = 1.0  # between looks at a descriptor that does not block and takes nothing
LINES_OF_TEMPLATE_MAX = 200  # in a window: more of one kind tell nothing new
TEMPLATES_MAX = 512  # the package has some eighty
TEMPLATE_WINDOW_S = 10.0


class LogWriter:
    """The queues, and the thread that empties them. Once `fd` is closed at its other end, lines are only counted."""

    def __init__(self, form: LineFormat, fd: int) -> None:
        self.form = form
        self.dropped = 0  # lines since the start
        self._fd = fd
        self._bytes_at_once = FILE_BYTES_AT_ONCE if _is_file(fd) else LOG_LINE_BYTES_MAX
        self._lines: deque[bytes] = deque()
        self._requests: deque[RequestRecord] = deque()
        self._wake = threading.Event()
        self._awake = False  # it will look at the queues again
        self._stopping = False
        self._said = 0  # of those dropped
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.flush)

    def put_line(self, line: bytes) -> None:
        """Have a whole line written soon. From any thread."""
        if len(self._lines) >= QUEUED_LINES_MAX:
            self.dropped += 1
            return
        self._lines.append(line)
        self._awake = True
        self._wake.set()

    def put_request(self, record: RequestRecord) -> None:
        """Have the line of a request made and written. From one thread."""
        if len(self._requests) >= QUEUED_REQUESTS_MAX:
            self.dropped += 1
            return
        self._requests.append(record)
        if not self._awake:
            self._awake = True
            self._wake.set()

    def flush(self, within_s: float = LOG_FLUSH_S) -> None:
        """Wait until all is written, if it is read in time."""
        self._stopping = True
        self._wake.set()
        until = time.monotonic() + within_s
        while (self._lines or self._requests or self._awake) and time.monotonic() < until:
            time.sleep(0.002)  # noqa: TID251 - at the end, when no loop runs
        self._stopping = False

    def stop(self) -> None:
        """Write nothing any more. Waits for a write that blocks: close the other end first."""
        atexit.unregister(self.flush)
        self._stopped = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait()
            self._wake.clear()
            try:
                self._empty()
            except Exception:  # noqa: BLE001 - a bug of ours must not end the thread
                self.dropped += 1
            self._awake = False
            if self._lines or self._requests:  # they came after the last look, and nobody has woken us for them
                self._wake.set()

    def _empty(self) -> None:
        if not self._lines and not self._stopping:
            time.sleep(LOG_GATHER_S)  # noqa: TID251 - in its own thread
        while (self._lines or self._requests) and not self._stopped:
            self._write(self._some())
        if self.dropped != self._said and not self._stopped:
            lost, self._said = self.dropped - self._said, self.dropped
            words = "%d log lines were dropped: what reads standard error is too slow, or has gone"
            record = logging.LogRecord("embedmesh.logs", logging.WARNING, __file__, 0, words, (lost,), None)
            self._write(self.form.of_record(record))

    def _some(self) -> bytes:
        """Some whole lines; lines before requests."""
        if self._lines:
            return b"".join([self._lines.popleft() for _ in range(min(len(self._lines), LINES_AT_ONCE))])
        return self._made([self._requests.popleft() for _ in range(min(len(self._requests), LINES_AT_ONCE))])

    def _made(self, records: list[RequestRecord]) -> bytes:
        try:
            return self.form.of_requests(records)
        except Exception as error:  # noqa: BLE001 - a bug of ours must not end the thread
            if len(records) > 1:
                return b"".join(self._made([record]) for record in records)
            return f"embedmesh.logs: a line cannot be made ({type(error).__name__})\n".encode()

    def _write(self, lines: bytes) -> None:
        """In pieces of whole lines."""
        begins, left = 0, memoryview(lines)
        while begins < len(lines):
            ends = begins + self._bytes_at_once
            if ends < len(lines):  # a line that is longer is a piece of its own
                ends = lines.rfind(b"\n", begins, ends) + 1 or lines.find(b"\n", ends) + 1 or len(lines)
            try:
                while left_here := left[begins:ends]:
                    begins += os.write(self._fd, left_here)
            except BlockingIOError:
                select.select([], [self._fd], [], DESCRIPTOR_AGAIN_S)
            except OSError:  # closed, or the disk is full
                self.dropped += lines.count(b"\n", begins)
                return


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:  # it is closed
        return False


class LogHandler(logging.Handler):
    """Gives each record to a writer, as a line. Lines of one template are bounded: more are counted.

    What callers or nodes can provoke has a template; so nobody fills a disk with it.
    """

    def __init__(self, writer: LogWriter, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._writer = writer
        self._now = now
        self._until = 0.0
        self._counts: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Under the handler's lock."""
        try:
            if self._may(record):
                self._writer.put_line(self._writer.form.of_record(record))
        except Exception:  # noqa: BLE001 - logging must not fail its caller
            self._writer.dropped += 1

    def _may(self, record: logging.LogRecord) -> bool:
        now = self._now()
        if now >= self._until:
            over = sum(max(0, count - LINES_OF_TEMPLATE_MAX) for count in self._counts.values())
            self._counts.clear()
            self._until = now + TEMPLATE_WINDOW_S
            if over:
                words = "%d more lines like earlier ones were left out"
                more = logging.LogRecord("embedmesh.logs", logging.WARNING, __file__, 0, words, (over,), None)
                self._writer.put_line(self._writer.form.of_record(more))
        name = f"{record.name} {record.msg}" if record.args else record.name
        if name not in self._counts and len(self._counts) >= TEMPLATES_MAX:
            name = ""
        self._counts[name] = count = self._counts.get(name, 0) + 1
        return count <= LINES_OF_TEMPLATE_MAX
