"""Batches whose files are in object storage: what holds with a disk holds there, and while storage comes and goes."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from uuid import uuid4

import pytest
import pytest_asyncio

from embedmesh.jobs import objects, validate, work
from embedmesh.jobs.objects import ObjectStorage
from tests.gateway.mesh import Gateway, gateway
from tests.gateway.test_batches_api import (
    Batcher,
    caller,
    form,
    line,
    node,
    runner,
    running,
    test_a_batch_is_worked_off_and_paid_line_by_line,
    test_a_deleted_file_is_gone_but_for_the_batch_that_reads_it,
    test_an_input_file_that_is_lost_on_the_disk_ends_the_batch,
    test_many_units_come_together_in_one_file,
    test_results_that_are_lost_on_the_disk_are_made_again_and_paid_once,
)
from tests.jobs.faulty import faults

pytestmark = pytest.mark.asyncio(loop_scope="module")

__all__ = [  # the same tests as with a disk
    "caller",
    "node",
    "runner",
    "test_a_batch_is_worked_off_and_paid_line_by_line",
    "test_a_deleted_file_is_gone_but_for_the_batch_that_reads_it",
    "test_an_input_file_that_is_lost_on_the_disk_ends_the_batch",
    "test_many_units_come_together_in_one_file",
    "test_results_that_are_lost_on_the_disk_are_made_again_and_paid_once",
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gw(folder: Path) -> AsyncIterator[Gateway]:
    async with gateway(folder, files_place=f"faulty://{uuid4()}") as made:
        yield made


async def test_while_storage_is_away_files_are_refused_and_all_else_goes_on(gw: Gateway, caller: Batcher) -> None:
    """A 507 that says to come again, for what is sent and for what is read; a file can be deleted all the same."""

    def away(operation: str) -> None:
        raise OSError("it is away")

    file_id = await caller.upload(line(1))
    with faults(away):
        reply = await caller.send(form(b"x" * 3_000_000))
        assert (reply.status, reply.error["code"]) == (507, "storage_full")
        read = await gw.ask("GET", f"/v1/files/{file_id}/content", key=caller.key)
        assert (read.status, read.error["code"]) == (507, "storage_full")
        assert (await caller.ask("GET", "/v1/files"))["data"][0]["id"] == file_id
        assert (await caller.ask("DELETE", f"/v1/files/{file_id}"))["deleted"]
    assert await caller.upload(line(2))


async def test_a_batch_goes_on_whatever_storage_does(
    gw: Gateway, caller: Batcher, node: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every fourth operation fails: each line is there once and paid once, and nothing is an internal error."""
    monkeypatch.setattr(validate, "UNIT_LINES_MAX", 7)
    monkeypatch.setattr(work, "AGAIN_FIRST_S", 0.01)
    batch = await caller.create(b"".join(line(number) for number in range(70)))
    before, dice, failed = await caller.balance(), Random(7), 0

    def some(operation: str) -> None:
        nonlocal failed
        if dice.random() < 0.25:
            failed += 1
            raise OSError("it is away")

    with faults(some), caplog.at_level(logging.INFO):
        async with running(gw):
            ended = await caller.until(batch["id"])
    assert failed > 5
    assert ended["status"] == "completed"
    output, errors = await caller.results(ended)
    assert ([each["custom_id"] for each in output], errors) == ([f"id-{number}" for number in range(70)], [])
    used = sum(each["response"]["body"]["usage"]["total_tokens"] for each in output)
    assert ended["usage"]["total_tokens"] == used
    assert await caller.balance() == (before[0] - ended["held_nanousd"], 0)
    assert not any("internal error" in record.getMessage() for record in caplog.records)


async def test_a_batch_whose_storage_answers_nothing_goes_on_afterwards(
    gw: Gateway, caller: Batcher, node: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits, takes no other's thread for longer than an operation may take, and ends once storage is back."""
    monkeypatch.setattr(objects, "OPERATION_S", 0.2)
    batch = await caller.create(line(1) + line(2))
    assert isinstance(gw.files.folder.backend, ObjectStorage)
    silent, back = asyncio.Event(), threading.Semaphore(0)
    loop = asyncio.get_running_loop()

    def wait(operation: str) -> None:
        loop.call_soon_threadsafe(silent.set)
        back.acquire(timeout=20)
        back.release()

    with faults(wait):
        async with running(gw):
            await asyncio.wait_for(silent.wait(), 20)
            await asyncio.sleep(0.5)
            assert (await caller.ask("GET", f"/v1/batches/{batch['id']}"))["status"] == "validating"
            back.release()
            ended = await caller.until(batch["id"])
    assert (ended["status"], ended["request_counts"]["completed"]) == ("completed", 2)
