"""A node's receipts outlive its process, leave in pages until the gateway has checked them, and fill no disk."""

import stat
from pathlib import Path

import msgspec
import pytest

from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import HEARTBEAT_RECEIPTS_MAX
from embedmesh.rules.membership import Receipt
from embedmesh.signing import receipt_log
from embedmesh.signing.receipt_log import ReceiptLog, ReceiptPage
from embedmesh.signing.receipts import EMPTY_LOG_HEAD, replay

TIME_MS = 1_700_000_000_000


def expected(number: int) -> Receipt:
    return Receipt(number, f"req_{number}", bytes([number % 256]) * 32, b"r" * 32, number, TIME_MS)


def add(log: ReceiptLog, count: int) -> None:
    """So many further answers."""
    for _ in range(count):
        one = expected(log.count + 1)
        assert log.add(*msgspec.structs.astuple(one)[1:]) == one.number


def page(first: int, last: int, *, head: bytes = EMPTY_LOG_HEAD) -> ReceiptPage:
    """The page of these receipts; `head` is the head before them."""
    receipts = tuple(expected(number) for number in range(first, last + 1))
    return ReceiptPage(receipts, last, replay(head, receipts))


def head_of(last: int) -> bytes:
    return page(1, last).head


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "receipts.log"


def test_a_new_log_is_empty_and_private(path: Path) -> None:
    log = ReceiptLog(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert log.count == 0
    assert log.page(1) == ReceiptPage((), 0, EMPTY_LOG_HEAD)
    log.close()


@pytest.mark.parametrize("checked", [0, 1, 5, 6])
def test_what_was_logged_is_there_after_a_restart(path: Path, checked: int) -> None:
    """Count, head, and all that the gateway has not checked yet; numbers go on."""
    log = ReceiptLog(path)
    add(log, 6)
    assert log.wanted_from(checked + 1) == checked + 1
    log.close()
    again = ReceiptLog(path)
    assert again.count == 6
    assert again.wanted_from(checked + 1) == checked + 1
    rest = page(checked + 1, 6, head=head_of(checked))
    assert again.page(checked + 1) == rest if checked < 6 else ReceiptPage((), 6, head_of(6))
    add(again, 1)
    assert again.page(checked + 1) == page(checked + 1, 7, head=head_of(checked))
    again.close()


def test_a_crash_loses_nothing_that_a_page_had(path: Path) -> None:
    """A page is written through before it leaves: the next process knows all that the gateway may know."""
    log = ReceiptLog(path)
    add(log, 3)
    sent = log.page(1)
    add(log, 1)  # not in a page yet
    crashed = ReceiptLog(path)  # another process, while this one has written no more
    assert crashed.page(1) == sent
    crashed.close()
    log.close()


def test_a_tail_that_a_crash_cut_off_is_dropped(path: Path) -> None:
    """Wherever it was cut: what is whole stays, and what is added then is found by the next start."""
    log = ReceiptLog(path)
    sizes = [path.stat().st_size]
    for _ in range(3):
        add(log, 1)
        log.page(1)
        sizes.append(path.stat().st_size)
    log.close()
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 11), *sizes, *(size - 1 for size in sizes), *(size + 1 for size in sizes[:-1])}:
        path.write_bytes(whole[:size])
        cut = ReceiptLog(path)
        assert cut.count == sum(size >= each for each in sizes[1:])
        add(cut, 2)
        last = cut.count
        cut.close()
        again = ReceiptLog(path)
        assert again.page(1) == page(1, last)
        again.close()


@pytest.mark.parametrize("tail", [bytes(2), bytes(4096), b"\x00\x05junk!", b"\x00\x01\xc1"])
def test_a_tail_that_a_power_cut_spoiled_is_dropped(path: Path, tail: bytes) -> None:
    """The file is not synced: after a power cut its end may be zeros, or what was in the blocks before."""
    log = ReceiptLog(path)
    add(log, 2)
    log.close()
    with path.open("ab") as file:
        file.write(tail)
    again = ReceiptLog(path)
    assert again.page(1) == page(1, 2)
    add(again, 1)
    again.close()
    third = ReceiptLog(path)
    assert third.page(1) == page(1, 3)
    third.close()


def test_receipts_that_do_not_follow_are_dropped_with_the_tail(path: Path) -> None:
    """As after a rewrite that the disk mixed with older blocks: nobody could check them."""
    log = ReceiptLog(path)
    add(log, 2)
    log.close()
    body = msgspec.msgpack.encode(expected(7))
    with path.open("ab") as file:
        file.write(len(body).to_bytes(2, "big") + body)
    again = ReceiptLog(path)
    assert again.count == 2
    again.close()


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    """In one line that says what to do; it stays as it is."""
    for content in (b"\x00\x01\xc1 and more", b"\x00\x04text", b"#!/bin/sh\n" * 4096):
        path.write_bytes(content)
        with pytest.raises(SetupError, match="Move the file away"):
            ReceiptLog(path)
        assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(SetupError, match="Move the file away"):
        ReceiptLog(path)


def test_a_page_is_bounded_and_the_next_follows_on_it(path: Path) -> None:
    log = ReceiptLog(path)
    add(log, HEARTBEAT_RECEIPTS_MAX + 5)
    first = log.page(1)
    assert first == page(1, HEARTBEAT_RECEIPTS_MAX)
    assert log.page(1) == first  # until the gateway says that it has it
    assert log.wanted_from(HEARTBEAT_RECEIPTS_MAX + 1) == HEARTBEAT_RECEIPTS_MAX + 1
    assert log.page(HEARTBEAT_RECEIPTS_MAX + 1) == page(
        HEARTBEAT_RECEIPTS_MAX + 1, HEARTBEAT_RECEIPTS_MAX + 5, head=first.head
    )
    log.close()


@pytest.mark.parametrize(
    ("checked", "wanted", "anew"),
    [
        (3, 0, True),
        (3, 1, True),  # the gateway has lost what it knew, and the first three are gone
        (3, 3, True),
        (3, 8, True),  # the gateway knows more than this log has: it is another one
        (3, 10**9, True),
        (3, 4, False),
        (3, 6, False),
        (3, 7, False),  # all of it
        (0, 1, False),
    ],
)
def test_a_log_begins_anew_where_the_gateway_wants_what_it_does_not_have(
    path: Path, checked: int, wanted: int, anew: bool
) -> None:
    log = ReceiptLog(path)
    add(log, 6)
    log.wanted_from(checked + 1)
    if not anew:
        assert log.wanted_from(wanted) == wanted
        assert log.count == 6
        log.close()
        return
    assert log.wanted_from(wanted) == 1
    assert log.page(1) == ReceiptPage((), 0, EMPTY_LOG_HEAD)
    add(log, 2)
    log.close()
    again = ReceiptLog(path)
    assert again.page(1) == page(1, 2)
    again.close()


def test_the_file_is_rewritten_without_what_was_checked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it has a bound as long as the gateway checks, and loses nothing that it has not."""
    monkeypatch.setattr(receipt_log, "RECEIPTS_FILE_BYTES_MAX", 10_000)
    log = ReceiptLog(path)
    for turn in range(1, 101):
        add(log, 10)
        log.page(log.count)
        assert path.stat().st_size < 12_000
        log.wanted_from(turn * 10 - 1)  # the last two wait
    assert log.page(999) == page(999, 1_000, head=head_of(998))
    log.close()
    again = ReceiptLog(path)
    assert again.count == 1_000
    assert again.wanted_from(999) == 999
    assert again.page(999) == page(999, 1_000, head=head_of(998))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again.close()
