"""A node's log of what it answered: each receipt is chained to all before it, so that none can be changed or dropped.

The head stands for the whole log. Head 0 is 32 zero bytes; head i is SHA-256 of head i-1 and the encoding of receipt i.
The encoding is MessagePack, in its shortest forms, of an array of the six fields in order: three are integers, the
request id is a string, the digests are binary.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated

import msgspec

DIGEST_BYTES = 32
NO_RECEIPTS = bytes(DIGEST_BYTES)
PURPOSE = b"receipts"  # that a node's identity signs a head for
REQUEST_ID_CHARS_MAX = 64
NUMBER_MAX = 10**15 - 1  # what an integer in a header may be (RFC 9651), and exact wherever JSON is read

Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]


class Receipt(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One reply. Both digests are SHA-256 of a body. Limits hold where it is decoded."""

    number: Annotated[int, msgspec.Meta(ge=1, le=NUMBER_MAX)]  # from 1, without gaps
    request_id: Annotated[str, msgspec.Meta(max_length=REQUEST_ID_CHARS_MAX)]
    request_digest: Digest
    reply_digest: Digest
    tokens: Whole
    time_ms: Whole


class Chain:
    """The head of a log, moving with it. Starts empty, or where an earlier head is handed in."""

    def __init__(self, head: bytes = NO_RECEIPTS, count: int = 0) -> None:
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
    """What a node's identity signs, for PURPOSE, to stand by its log towards one gateway: MessagePack of the five."""
    return msgspec.msgpack.encode((node_id, gateway_fingerprint, count, head, time_ms))
