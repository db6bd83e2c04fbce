"""The file in which a node keeps the receipts of its answers, until its gateway has checked them.

Frames of two bytes of length and MessagePack. The first is the base, `[count, head]`: the receipts that were checked
before this file begins. Each further one is a receipt. The file is written through to the system with each heartbeat,
not to the disk: a crash may cut its end off and a power cut spoil it. From the first damaged receipt on everything is
dropped; where that leaves less than the gateway has checked, the log begins anew.
"""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from embedmesh.files import write_draft
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import HEARTBEAT_RECEIPTS_MAX
from embedmesh.rules.membership import Receipt
from embedmesh.signing.receipts import EMPTY_LOG_HEAD, Chain

RECEIPTS_FILE_BYTES_MAX = 4 * 1024 * 1024  # thirty thousand receipts; then checked ones are dropped
RECEIPT_LENGTH_BYTES = 2


class ReceiptPage(msgspec.Struct, frozen=True):
    """Some receipts, one after another, and the log's count and head after the last of them."""

    receipts: tuple[Receipt, ...]
    count: int
    head: bytes


class ReceiptLog:
    """One node's log towards its gateway."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file (mode 0600). Raises SetupError."""
        self._path = path
        try:
            data = path.read_bytes() if path.exists() else b""
            self._base, self._kept, whole = _read(data)
            if not whole:
                write_draft(path, _frame((0, EMPTY_LOG_HEAD))).replace(path)
            elif whole < len(data):
                os.truncate(path, whole)
            self._chain = Chain(
                self._kept[-1][1] if self._kept else self._base.head, self._base.count + len(self._kept)
            )
            self._file = path.open("ab")
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise SetupError(f"The receipts {path} cannot be used ({error}). Move the file away.") from None

    @property
    def count(self) -> int:
        """Receipts so far."""
        return self._chain.count

    def add(self, request_id: str, request_digest: bytes, reply_digest: bytes, tokens: int, time_ms: int) -> int:
        """Log an answer; its receipt's number."""
        receipt = Receipt(self.count + 1, request_id, request_digest, reply_digest, tokens, time_ms)
        self._chain.add(receipt)
        self._kept.append((receipt, self._chain.head))
        self._file.write(_frame(receipt))
        return receipt.number

    def page(self, first: int) -> ReceiptPage:
        """At most HEARTBEAT_RECEIPTS_MAX receipts from number `first` on."""
        self._file.flush()
        start = first - self._base.count - 1
        some = [self._kept[at] for at in range(start, min(start + HEARTBEAT_RECEIPTS_MAX, len(self._kept)))]
        if not some:
            return ReceiptPage((), self.count, self._chain.head)
        return ReceiptPage(tuple(receipt for receipt, _ in some), some[-1][0].number, some[-1][1])

    def wanted_from(self, first: int) -> int:
        """The gateway has checked all before number `first`. Returns the number to send next.

        That is 1 where this log has fewer receipts than that, or dropped them: then it begins anew.
        """
        if not self._base.count < first <= self.count + 1:
            self._begin_anew()
            return 1
        head = self._base.head
        while self._kept and self._kept[0][0].number < first:
            _, head = self._kept.popleft()
        self._base = Chain(head, first - 1)
        if self._file.tell() > RECEIPTS_FILE_BYTES_MAX:
            self._rewrite()
        return first

    def close(self) -> None:
        """Write it through."""
        self._file.close()

    def _begin_anew(self) -> None:
        self._base, self._chain = Chain(), Chain()
        self._kept.clear()
        self._rewrite()

    def _rewrite(self) -> None:
        frames = b"".join(_frame(receipt) for receipt, _ in self._kept)
        self._file.close()
        write_draft(self._path, _frame((self._base.count, self._base.head)) + frames).replace(self._path)
        self._file = self._path.open("ab")


def _read(data: bytes) -> tuple[Chain, deque[tuple[Receipt, bytes]], int]:
    """Base and receipts, and how many bytes of the data they fill. Raises where the base is damaged."""
    kept = deque[tuple[Receipt, bytes]]()
    frames = _frames(data)
    first = next(frames, None)
    if first is None:
        return Chain(), kept, 0
    count, head = msgspec.msgpack.decode(first, type=tuple[int, bytes])
    chain, whole = Chain(head, count), RECEIPT_LENGTH_BYTES + len(first)
    for frame in frames:
        try:
            receipt = msgspec.msgpack.decode(frame, type=Receipt)
            chain.add(receipt)
        except (msgspec.DecodeError, ValueError):
            break
        kept.append((receipt, chain.head))
        whole += RECEIPT_LENGTH_BYTES + len(frame)
    return Chain(head, count), kept, whole


def _frames(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + RECEIPT_LENGTH_BYTES <= len(data):
        end = at + RECEIPT_LENGTH_BYTES + int.from_bytes(data[at : at + RECEIPT_LENGTH_BYTES], "big")
        if end > len(data):
            return
        yield data[at + RECEIPT_LENGTH_BYTES : end]
        at = end


def _frame(value: object) -> bytes:
    body = msgspec.msgpack.encode(value)
    return len(body).to_bytes(RECEIPT_LENGTH_BYTES, "big") + body
