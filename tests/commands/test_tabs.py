"""Tabs by command: explained, and the requests under them explained and refunded."""

import asyncio
import csv
import io
import time
from functools import partial
from pathlib import Path

import pytest

from embedmesh.provision.bootstrap import bootstrap
from embedmesh.rules.batches import FilePurpose, FileRow, line_request_id
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.holds import Charge, Hold, Payable
from embedmesh.rules.tabs import Tab
from embedmesh.settings import secret_path, store_path
from embedmesh.storage.ledger.open_tab import CloseTab, OpenTab
from embedmesh.storage.ledger.settle_tab import SettleRequest
from embedmesh.storage.secrets.secret import load_secret
from embedmesh.storage.store import Store
from tests.commands.conftest import run_offline
from tests.commands.test_money import shown, told
from tests.storage.batching import asks, plan_of, results_of, units_of

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MONTH = time.strftime("%Y-%m", time.gmtime())


def serve_some(data_dir: Path, key_id: str) -> None:
    """What a gateway does: a tab is opened, three requests are settled together, and it is closed; another is not."""

    async def all_of_it() -> None:
        secret = partial(load_secret, secret_path(data_dir))
        place = store_path(data_dir)
        store = await Store.open(place, folder=data_dir, clock=SystemClock(), secret=secret, on_fatal=pytest.fail)
        deadline_ms = SystemClock().unix_ms() + 60_000
        for tab_id in ("tab_closed", "tab_open"):
            store._writer.submit(OpenTab(Tab(tab_id, "local", key_id, deadline_ms), "gw_here", 1_000, 1))
        await store.drain()
        for number in range(3):
            hold = Hold(f"req_{number}", "local", 140, deadline_ms, key_id, "tab_closed")
            charge = Charge(140, 7, MODEL, key_id, "n1", price=20_000_000, payables=(Payable("n1", 40),))
            store._writer.submit(SettleRequest("tab_closed", hold, charge))
        await store.drain()
        store._writer.submit(CloseTab("tab_closed", "local"))
        await store.close()

    asyncio.run(all_of_it())


def test_a_tab_and_the_requests_under_it_are_told_of(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    bootstrap(data_dir, "http://127.0.0.1:8080/v1")
    run = run_offline(data_dir)
    key_id = shown(run("keys", "create", "local", "--json"))["key_id"]
    serve_some(data_dir, key_id)
    story = told(run("ledger", "explain", "tab_closed")).splitlines()
    assert story[0] == f"Tab tab_closed of local, with {key_id}"
    assert [line[27:] for line in story[1:]] == [
        "opened for $0.000001 by gateway gw_here",
        "charge: $0.00000042 from local to revenue, for 3 requests",
        "payable: $0.00000012 from revenue to node:n1",
        "3 requests settled for $0.00000042; closed: what was not spent went back",
    ]
    live = told(run("ledger", "explain", "tab_open")).splitlines()
    assert live[-1].endswith("its deadline: 0 requests settled for $0.00 until now")
    found = shown(run("ledger", "explain", "tab_closed", "--json"))
    assert (found["account_id"], found["amount"], found["captured"], found["state"]) == ("local", 1_000, 420, "closed")
    assert found["opened"] <= found["ended"] <= found["deadline"]
    assert "The ledger knows no tab tab_none." in run("ledger", "explain", "tab_none").stderr

    story = told(run("ledger", "explain", "req_1")).splitlines()
    assert [line[27:] for line in story[1:]] == [
        "set aside by gateway gw_here, from tab tab_closed",
        "the reply was delivered, and $0.00000014 of it charged",
        f"for 7 tokens of {MODEL} at $0.02 a million, by node n1",
        "charge: $0.00000042 from local to revenue, for 3 requests",
        "payable: $0.00000012 from revenue to node:n1, for 3 requests",
    ]
    assert shown(run("ledger", "explain", "req_1", "--json"))["held"] is None
    refund = ("ledger", "refund", "req_1", "--reference", "ticket 1")
    assert told(run(*refund)).startswith("$0.00000014 given back; local has ")
    assert told(run(*refund)).startswith("Nothing done: ")
    assert "refund: $0.00000014 from revenue to local, reference ticket 1" in told(run("ledger", "explain", "req_1"))

    rows = list(csv.DictReader(io.StringIO(told(run("accounts", "statement", "local", MONTH)))))
    (row,) = [row for row in rows if row["kind"] == "charge"]
    assert (row["amount_nanousd"], row["requests"], row["tab_id"], row["request_id"]) == ("-420", "3", "tab_closed", "")
    assert (row["key_id"], row["model"], row["tokens"]) == (key_id, MODEL, "21")
    assert told(run("ledger", "check")).startswith("The money adds up: ")


def work_off_a_batch(data_dir: Path, key_id: str) -> str:
    """What gateways do: three lines are set aside for, two are done. The batch's id."""

    async def all_of_it() -> str:
        secret = partial(load_secret, secret_path(data_dir))
        clock = SystemClock()
        store = await Store.open(
            store_path(data_dir), folder=data_dir, clock=clock, secret=secret, on_fatal=pytest.fail
        )
        row = FileRow(
            file_id="file-1",
            account_id="local",
            filename="in.jsonl",
            purpose=FilePurpose.BATCH,
            bytes=30,
            created_ms=clock.unix_ms(),
            expires_ms=clock.unix_ms() + 10**9,
        )
        await store.files.add(row, bytes_max=10**9)
        batch = await store.batches.create(asks(key_id, account_id="local"))
        taken = await store.batches.lease()
        assert taken is not None
        units = units_of([2, 1])
        await store.batches.add_units(taken[0], units)
        await store.batches.begin(taken[0], plan_of(units), bytes_max=10**9)
        await store.batches.finish_unit(taken[0], results_of(units[0], key_id, failing=1))
        await store.close()
        return batch.batch_id

    return asyncio.run(all_of_it())


def test_a_batch_and_its_lines_are_told_of(tmp_path: Path) -> None:
    """By the batch's id, and by the id that a line has in the output file."""
    data_dir = tmp_path / "data"
    bootstrap(data_dir, "http://127.0.0.1:8080/v1")
    run = run_offline(data_dir)
    key_id = shown(run("keys", "create", "local", "--json"))["key_id"]
    batch_id = work_off_a_batch(data_dir, key_id)
    story = told(run("ledger", "explain", batch_id)).splitlines()
    assert story[0] == f"Tab {batch_id} of local, with {key_id}"
    assert [line[27:] for line in story[1:-1]] == [
        "opened for $0.00000003 for all lines of the batch",
        "charge: $0.00000001 from local to revenue",
        "payable: $0.000000003 from revenue to node:n1",
        "its deadline: 1 requests settled for $0.00000001 until now",
    ]
    assert story[-1] == "  Batch of /v1/embeddings with m: in_progress, 1 of 3 lines completed, 1 failed"
    found = shown(run("ledger", "explain", batch_id, "--json"))
    assert found["batch"] == {
        "state": "in_progress", "endpoint": "/v1/embeddings", "model": "m", "lines": 3, "completed": 1, "failed": 1
    }  # fmt: skip
    request_id = line_request_id(batch_id, 1)
    for asked in (request_id, f"batch_{request_id}"):
        story = told(run("ledger", "explain", asked)).splitlines()
        assert story[0] == f"Request {request_id} of local, with {key_id}"
        assert story[1].endswith(f"line 2 of {batch_id}, from whose money it was set aside: its batch was made")
    assert shown(run("ledger", "explain", request_id, "--json"))["line"] == 2
    assert told(run("ledger", "check")).startswith("The money adds up: ")
