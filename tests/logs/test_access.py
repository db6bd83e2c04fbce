"""The access log: what was paid has a line; of anything else no more than nobody can fill a disk with, and counts."""

import asyncio
import logging
import time

import pytest

from embedmesh.logs import access
from embedmesh.logs.access import UNPAID_LINES, WrittenAccessLog, access_log
from embedmesh.rules.request_record import RequestRecord


class Written:
    """Stands for the writer, whose own tests are beside."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def put_request(self, record: RequestRecord) -> None:
        self.records.append(record)


@pytest.fixture
def written() -> Written:
    return Written()


@pytest.fixture
async def log(written: Written) -> WrittenAccessLog:
    made = access_log("on", written, lambda peer, forwarded: "never")  # type: ignore[arg-type]
    assert made is not None
    return made


def refused(account: str = "", status: int = 401, route: str = "/v1/embeddings") -> RequestRecord:
    return RequestRecord("r", account=account, status=status, route=route, method="POST")


def test_off_is_nothing() -> None:
    assert access_log("off", None, lambda *_: "") is None


async def test_paid_requests_all_have_a_line(written: Written, log: WrittenAccessLog) -> None:
    for _ in range(10 * UNPAID_LINES["accounts"]):
        log.ended(RequestRecord("r", account="a", status=200, tokens=3))
    assert len(written.records) == 10 * UNPAID_LINES["accounts"]
    assert abs(written.records[0].ended_at - time.time()) < 60


async def test_a_flood_has_few_lines_and_takes_nobody_else_s(
    written: Written, log: WrittenAccessLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Strangers have lines of their own, each account some, all accounts together some more; the rest is told."""
    monkeypatch.setattr(access, "UNPAID_WINDOW_S", 0.2)
    began = time.monotonic()
    for _ in range(5_000):
        log.ended(refused())
    log.ended(refused("a", 400))
    for _ in range(5_000):
        log.ended(refused("b", 429))
    for number in range(5_000):
        log.ended(refused(f"c{number % 100}", 404, route=""))
    if time.monotonic() - began < 0.2:  # on a busy machine the window may have passed
        by = [sum(record.account.startswith(name) for record in written.records) for name in "abc"]
        strangers = sum(not record.account for record in written.records)
        assert (strangers, *by[:2]) == (UNPAID_LINES["strangers"], 1, UNPAID_LINES["account"])
        assert sum(by) == UNPAID_LINES["accounts"]
    lines = len(written.records)
    assert lines < 3_000
    with caplog.at_level(logging.INFO, "embedmesh.access"):
        async with asyncio.timeout(30):
            while "(no route) ended with 404" not in caplog.text:
                await asyncio.sleep(0.01)
    told = sum(int(message.partition(" ")[0]) for message in caplog.messages)
    assert told + lines == 15_001
    log.ended(refused())
    assert len(written.records) == lines + 1, "a new window"


async def test_what_machines_ask_every_few_seconds_is_left_out_while_it_is_well(
    written: Written, log: WrittenAccessLog
) -> None:
    log.ended(refused(status=200, route="/readyz"))
    log.ended(refused(status=503, route="/readyz"))
    assert [record.status for record in written.records] == [503]


async def test_a_method_is_one_of_http_s(written: Written, log: WrittenAccessLog) -> None:
    """It is any word that a caller likes."""
    log.ended(RequestRecord("r", method="PRIVATE", status=405))
    assert written.records[0].method == "_OTHER"
