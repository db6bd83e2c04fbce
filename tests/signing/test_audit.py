"""A gateway follows a node's log only where it is whole and signed, and tells what it saw itself from the rest."""

import hashlib
from typing import Any

import msgspec
import pytest

from embedmesh.rules.membership import NONCE_S, Receipt, SignedHead
from embedmesh.signing.audit import REMEMBERED_ANSWERS_MAX, Audit, Checked
from embedmesh.signing.identity import Identity, fingerprint, node_id
from embedmesh.signing.messages import content_digest
from embedmesh.signing.receipts import EMPTY_LOG_HEAD, RECEIPTS_PURPOSE, Chain, head_message, replay

NODE = Identity(bytes(range(32)))
STRANGER = Identity(bytes(32))
NODE_ID = node_id(NODE.public_key)
GATEWAY = fingerprint(b"gateway".ljust(32))
NOW_MS = 1_700_000_000_000


def body(number: int) -> bytes:
    return f"request {number}".encode()


def answer(number: int) -> bytes:
    return f"reply {number}".encode()


def receipt(number: int, /, **changes: Any) -> Receipt:
    """The receipt of the answer of that number, unless changed."""
    one = Receipt(
        number,
        f"req_{number}",
        hashlib.sha256(body(number)).digest(),
        hashlib.sha256(answer(number)).digest(),
        7,
        NOW_MS,
    )
    return msgspec.structs.replace(one, **changes)


def log(first: int, last: int) -> tuple[Receipt, ...]:
    return tuple(receipt(number) for number in range(first, last + 1))


def signed(
    receipts: tuple[Receipt, ...],
    *,
    after: bytes = EMPTY_LOG_HEAD,
    by: Identity = NODE,
    of: str = NODE_ID,
    to: str = GATEWAY,
    when_ms: int = NOW_MS,
) -> SignedHead:
    """The head after these receipts, signed; `after` is the head before them."""
    count = receipts[-1].number if receipts else 0
    head = replay(after, receipts)
    return SignedHead(count, head, when_ms, by.sign(RECEIPTS_PURPOSE, head_message(of, to, count, head, when_ms)))


def audit(*, seen: int = 0, count: int = 0, head: bytes = EMPTY_LOG_HEAD) -> Audit:
    """A gateway that has seen the answers 1 to `seen`."""
    made = Audit(NODE_ID, NODE.public_key, GATEWAY, count=count, head=head)
    for number in range(1, seen + 1):
        made.answered(f"req_{number}", content_digest(body(number)), content_digest(answer(number)), 7)
    return made


PAGE = log(1, 3)
REFUSED: dict[str, tuple[tuple[Receipt, ...], SignedHead, str]] = {
    "another head": (PAGE, msgspec.structs.replace(signed(PAGE), head=bytes(32)), "do not lead"),
    "another count": (PAGE, msgspec.structs.replace(signed(PAGE), count=4), "do not lead"),
    "one more than signed": (log(1, 4), signed(PAGE), "do not lead"),
    "one less than signed": (log(1, 2), signed(PAGE), "do not lead"),
    "a changed receipt": ((*log(1, 2), receipt(3, tokens=8)), signed(PAGE), "do not lead"),
    "a gap": ((receipt(1), receipt(3)), signed((receipt(1), receipt(3))), "missing, or comes twice"),
    "one twice": ((receipt(1), receipt(1)), signed((receipt(1), receipt(1))), "missing, or comes twice"),
    "the wrong order": ((receipt(2), receipt(1)), signed((receipt(2), receipt(1))), "missing, or comes twice"),
    "not from the beginning": (log(2, 3), signed(log(2, 3)), "missing, or comes twice"),
    "nothing, and a head": ((), msgspec.structs.replace(signed(PAGE)), "do not lead"),
    "signed by another": (PAGE, signed(PAGE, by=STRANGER), "not signed by the node"),
    "signed for another node": (PAGE, signed(PAGE, of=node_id(STRANGER.public_key)), "not signed by the node"),
    "signed to another gateway": (PAGE, signed(PAGE, to=fingerprint(bytes(32))), "not signed by the node"),
    "another time": (PAGE, msgspec.structs.replace(signed(PAGE), time_ms=NOW_MS + 1), "not signed by the node"),
    "for another purpose": (
        PAGE,
        msgspec.structs.replace(
            signed(PAGE),
            signature=NODE.sign(b"statement", head_message(NODE_ID, GATEWAY, 3, signed(PAGE).head, NOW_MS)),
        ),
        "not signed by the node",
    ),
    "too long ago": (PAGE, signed(PAGE, when_ms=NOW_MS - NONCE_S * 1000 - 1), "not signed now"),
    "in the future": (PAGE, signed(PAGE, when_ms=NOW_MS + NONCE_S * 1000 + 1), "not signed now"),
}


@pytest.mark.parametrize(("receipts", "head", "says"), REFUSED.values(), ids=REFUSED)
def test_a_log_that_is_not_whole_or_not_signed_is_refused(
    receipts: tuple[Receipt, ...], head: SignedHead, says: str
) -> None:
    """Nothing has moved then: the right page is still taken, and still matches what was seen."""
    gateway = audit(seen=3)
    with pytest.raises(ValueError, match=says):
        gateway.check(receipts, head, NOW_MS)
    assert (gateway.count, gateway.head) == (0, EMPTY_LOG_HEAD)
    assert gateway.check(PAGE, signed(PAGE), NOW_MS) == Checked(3, 0, 0)


@pytest.mark.parametrize(
    ("changes", "checked"),
    [
        ({"tokens": 8}, Checked(0, 0, 1)),  # it wants to be paid for more
        ({"tokens": 6}, Checked(0, 0, 1)),
        ({"request_digest": bytes(32)}, Checked(0, 0, 1)),
        ({"reply_digest": bytes(32)}, Checked(0, 1, 0)),  # of another reply, which somebody else may have got
        ({"request_id": "req_9"}, Checked(0, 1, 0)),
        ({"time_ms": 0}, Checked(1, 0, 0)),  # its clock is its own
        ({}, Checked(1, 0, 0)),
    ],
)
def test_a_receipt_is_held_against_what_was_seen(changes: dict[str, Any], checked: Checked) -> None:
    """False only where the same answer to the same request was otherwise; unknown ones prove nothing."""
    receipts = (receipt(1, **changes),)
    assert audit(seen=1).check(receipts, signed(receipts), NOW_MS) == checked


def test_a_log_is_followed_page_by_page() -> None:
    """Also by a gateway that was restarted meanwhile and kept count and head; its memory of answers it has lost."""
    gateway = audit(seen=5)
    assert gateway.check(log(1, 2), signed(log(1, 2)), NOW_MS) == Checked(2, 0, 0)
    assert gateway.check((), signed(log(1, 2)), NOW_MS) == Checked(0, 0, 0)
    assert gateway.check(log(3, 5), signed(log(3, 5), after=gateway.head), NOW_MS) == Checked(3, 0, 0)
    assert (gateway.count, gateway.head) == (5, replay(EMPTY_LOG_HEAD, log(1, 5)))
    restarted = audit(count=gateway.count, head=gateway.head)
    assert restarted.check(log(6, 7), signed(log(6, 7), after=gateway.head), NOW_MS) == Checked(0, 2, 0)


def test_an_answer_matches_once() -> None:
    """A receipt that comes again, under another number, is nobody's answer any more."""
    gateway = audit(seen=1)
    twice = (receipt(1), receipt(1, number=2))
    assert gateway.check(twice, signed(twice), NOW_MS) == Checked(1, 1, 0)


def test_a_page_that_is_replayed_later_is_refused() -> None:
    """It is not the next one."""
    gateway = audit(seen=4)
    gateway.check(log(1, 2), signed(log(1, 2)), NOW_MS)
    second = log(3, 4), signed(log(3, 4), after=gateway.head)
    gateway.check(*second, NOW_MS)
    with pytest.raises(ValueError, match="missing, or comes twice"):
        gateway.check(*second, NOW_MS)
    assert gateway.count == 4


def test_a_log_that_was_lost_is_followed_from_its_new_beginning() -> None:
    """An empty one is waited for, and nothing has moved; what was matched before does not match again."""
    gateway = audit(seen=3)
    gateway.check(PAGE, signed(PAGE), NOW_MS)
    assert gateway.check((), signed(()), NOW_MS) == Checked(0, 0, 0)
    assert gateway.count == 3
    anew = (receipt(1, request_id="req_after"), receipt(2))
    assert gateway.check(anew, signed(anew), NOW_MS) == Checked(0, 2, 0)
    assert (gateway.count, gateway.head) == (2, replay(EMPTY_LOG_HEAD, anew))


def test_memory_of_answers_is_bounded() -> None:
    """The oldest is forgotten for the newest: its receipt is then one that we know nothing of."""
    gateway = audit(seen=1)
    for number in range(REMEMBERED_ANSWERS_MAX):
        gateway.answered(f"other_{number}", "", "", 1)
    assert len(gateway._answers) == REMEMBERED_ANSWERS_MAX
    assert gateway.check(log(1, 1), signed(log(1, 1)), NOW_MS) == Checked(0, 1, 0)


def test_a_failed_attempt_and_its_repetition_are_two_answers() -> None:
    """The same request may be answered twice, by bytes that differ: each has its own receipt."""
    gateway = audit()
    for reply in (b"one", b"two"):
        gateway.answered("req_1", content_digest(body(1)), content_digest(reply), 7)
    both = tuple(
        receipt(number, request_id="req_1", request_digest=receipt(1).request_digest, reply_digest=digest)
        for number, digest in enumerate((hashlib.sha256(b"two").digest(), hashlib.sha256(b"one").digest()), 1)
    )
    chain = Chain()
    for each in both:
        chain.add(each)
    assert gateway.check(both, signed(both), NOW_MS) == Checked(2, 0, 0)
    assert gateway.head == chain.head
