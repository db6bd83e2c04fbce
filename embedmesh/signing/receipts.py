"""A node's log of its answers: each receipt is chained to all before it, so that none can be changed or dropped.

The head stands for the whole log. Head 0 is 32 zero bytes; head i is SHA-256 of head i-1 and the encoding of receipt i.
The encoding is MessagePack, in its shortest forms, of an array of the six fields in order: three are integers, the
request id is a string, the digests are binary.
"""

import hashlib
from collections.abc import Iterable

import msgspec

from embedmesh.rules.membership import DIGEST_BYTES, Receipt

EMPTY_LOG_HEAD = bytes(DIGEST_BYTES)
RECEIPTS_PURPOSE = b"receipts"  # of a node's signature over the head of its log


class Chain:
    """The head of a log, moving with it. Starts empty, or at an earlier head."""

    def __init__(self, head: bytes = EMPTY_LOG_HEAD, count: int = 0) -> None:
        self.head = head
        self.count = count

    def add(self, receipt: Receipt) -> None:
        """Chain the next receipt. Raises ValueError where its number is not the next."""
        if receipt.number != self.count + 1:
            raise ValueError("a receipt is missing, or comes twice")
        self.head = replay(self.head, (receipt,))
        self.count += 1


def replay(head: bytes, receipts: Iterable[Receipt]) -> bytes:
    """The head after these receipts, which follow on the one at `head`."""
    for receipt in receipts:
        head = hashlib.sha256(head + msgspec.msgpack.encode(receipt)).digest()
    return head


def head_message(node_id: str, gateway_fingerprint: str, count: int, head: bytes, time_ms: int) -> bytes:
    """The message that a node's identity signs, for RECEIPTS_PURPOSE: the state of its log towards one gateway."""
    return msgspec.msgpack.encode((node_id, gateway_fingerprint, count, head, time_ms))
