"""A gateway's check of a node's log: that it is whole, signed, and agrees with the answers that the gateway got.

The gateway remembers each answer until the node's log brings its receipt. A receipt that differs from the answer is
false. Receipts of unknown answers prove nothing (the reply may have been lost, or gone to another gateway); they are
counted.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from embedmesh.rules.membership import NONCE_S, Receipt, SignedHead
from embedmesh.signing.identity import verify
from embedmesh.signing.messages import digest_value
from embedmesh.signing.receipts import RECEIPTS_PURPOSE, Chain, head_message

REMEMBERED_ANSWERS_MAX = 20_000  # answers of one node, ten seconds of the busiest; each has some 300 bytes


class Checked(NamedTuple):
    """How many receipts agree with an answer, have no known answer, and differ from theirs."""

    matched: int
    unmatched: int
    false: int


class Audit:
    """One node's log, as one gateway follows it from `count` and `head` on."""

    def __init__(self, node_id: str, public_key: bytes, gateway: str, *, count: int, head: bytes) -> None:
        """`gateway` is the fingerprint of the gateway's public key."""
        self._node_id = node_id
        self._public_key = public_key
        self._gateway = gateway
        self._chain = Chain(head, count)
        self._answers: OrderedDict[tuple[str, str], tuple[str, int]] = OrderedDict()

    @property
    def count(self) -> int:
        """The number of receipts checked so far."""
        return self._chain.count

    @property
    def head(self) -> bytes:
        """The head of the log after them."""
        return self._chain.head

    def move_to(self, count: int, head: bytes) -> None:
        """Follow the log from there on: another gateway has checked the receipts before."""
        self._chain = Chain(head, count)

    def answered(self, request_id: str, request_digest: str, reply_digest: str, tokens: int) -> None:
        """Remember an answer. Digests as in `Content-Digest`."""
        if len(self._answers) >= REMEMBERED_ANSWERS_MAX:
            self._answers.popitem(last=False)
        self._answers[request_id, reply_digest] = request_digest, tokens

    def check(self, receipts: Sequence[Receipt], signed: SignedHead, now_ms: int) -> Checked:
        """Follow the log. Raises ValueError, and does not move, where it is not whole or not signed.

        A log that begins anew, because the node lost it, is followed from its beginning.
        """
        if not receipts and not signed.count:
            return Checked(0, 0, 0)  # the node lost its log, and the new one is empty
        first = receipts[0].number if receipts else self.count + 1
        chain = Chain(self.head, self.count) if first == self.count + 1 else Chain()
        for receipt in receipts:
            chain.add(receipt)
        if (chain.count, chain.head) != (signed.count, signed.head):
            raise ValueError("the receipts do not lead to the head")
        message = head_message(self._node_id, self._gateway, signed.count, signed.head, signed.time_ms)
        if not verify(self._public_key, RECEIPTS_PURPOSE, message, signed.signature):
            raise ValueError("the head is not signed by the node")
        if abs(now_ms - signed.time_ms) > NONCE_S * 1000:
            raise ValueError("the head was not signed now")
        self._chain = chain
        return self._compare(receipts)

    def _compare(self, receipts: Sequence[Receipt]) -> Checked:
        matched = unmatched = false = 0
        for receipt in receipts:
            answer = self._answers.pop((receipt.request_id, digest_value(receipt.reply_digest)), None)
            if answer is None:
                unmatched += 1
            elif answer == (digest_value(receipt.request_digest), receipt.tokens):
                matched += 1
            else:
                false += 1
        return Checked(matched, unmatched, false)
