"""Server-sent events as they come: bytes in, in any pieces, and the data of each whole event out.

The form is the WHATWG's event stream, byte for byte: what is fed in one piece or in a thousand gives the same events.
Only `data` is kept. The names, ids and waits of events say nothing here, and comments only keep connections open.
"""

EVENT_BYTES_MAX = 1024 * 1024  # of an event's data, or of any line: an event of a stream has some hundred bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SseParser:
    """One stream of events.

    `too_large`: an event has more than EVENT_BYTES_MAX. Those before it have been handed out; nothing more will be.
    """

    def __init__(self) -> None:
        self.too_large = False
        self._line = bytearray()  # the beginning of a line whose end has not come
        self._data = bytearray()  # of the event that has begun: its lines, each with a line end
        self._after_cr = False  # a line feed that comes next ends no other line
        self._first = True  # a byte order mark may come

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that these bytes complete, in order; lines of one event are joined by line feeds."""
        if self.too_large or not data:
            return []
        if self._first and not self._line and data[0] != BYTE_ORDER_MARK[0]:
            self._first = False
        events: list[bytes] = []
        at = 0
        if not (self._line or self._data or self._after_cr or self._first) and b"\r" not in data:
            at = self._ordinary(data, events)
        if at < len(data):
            self._lines(data[at:] if at else data, events)
        return events

    def rest(self) -> bytes | None:
        """The data of a last event whose blank line is missing, or whose last line has no end; None without one.

        By the standard, such an event is dropped, since it may have been cut. Ask only of a stream that is known to be
        whole.
        """
        ended = self.feed(b"\n\n")
        return ended[0] if ended else None

    def _ordinary(self, data: bytes, events: list[bytes]) -> int:
        """Read events of one line that ends in line feeds, as long as there are only such; where the others begin."""
        at, find = 0, data.find
        while data.startswith(b"data:", at):
            end = find(b"\n", at)
            if end < 0 or end - at > EVENT_BYTES_MAX or not data.startswith(b"\n", end + 1):
                break
            begin = at + 6 if data.startswith(b" ", at + 5) else at + 5
            events.append(data[begin:end])
            at = end + 2
        return at

    def _lines(self, data: bytes, events: list[bytes]) -> None:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        for line in data.splitlines(keepends=True):
            ended = line.rstrip(b"\r\n")
            if self._line or len(ended) == len(line):
                self._line += ended
                if len(ended) < len(line):
                    ended = bytes(self._line)
                    self._line.clear()
            if len(ended) > EVENT_BYTES_MAX or len(self._line) > EVENT_BYTES_MAX:
                self.too_large = True
            elif not self._line:
                self._end_line(ended, events)
            if self.too_large:
                return

    def _end_line(self, line: bytes, events: list[bytes]) -> None:
        if self._first:
            self._first = False
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line:
            if self._data:
                events.append(bytes(self._data[:-1]))
                self._data.clear()
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data += value.removeprefix(b" ")
            self._data += b"\n"
            self.too_large = len(self._data) - 1 > EVENT_BYTES_MAX
