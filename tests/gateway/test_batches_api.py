"""Files and batches over HTTP, on each store: uploaded, validated, worked off, read line by line, paid once."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from embedmesh.fleet.load import Load
from embedmesh.fleet.registry import Node
from embedmesh.gateway.nodes.coalesce import CoalescingLink
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.jobs import finish, validate, work
from embedmesh.jobs import runner as runner_module
from embedmesh.jobs.files import FileStore
from embedmesh.jobs.folder import segment_key
from embedmesh.rules.file_failures import StorageFull
from embedmesh.rules.money import cost_nanousd
from embedmesh.rules.shares import Shares
from embedmesh.storage.books.keys import Limits
from embedmesh.upstream.pools import unix_pool
from tests.flow.world import CATALOGUE, MODEL
from tests.gateway.mesh import ON_EACH_STORE, Gateway
from tests.http.raw import Raw, request, send
from tests.test_walk import answer

pytestmark = [pytest.mark.asyncio(loop_scope="module"), ON_EACH_STORE]

ENDPOINT = "/v1/embeddings"
PRICE = MODEL.price // 2
WITHIN_S = 60.0  # some hundred milliseconds on a quiet machine
FINAL = ("completed", "failed", "expired", "cancelled")


def line(number: int, text: Any = "abc", **more: Any) -> bytes:
    body = {"model": "tiny", "input": text} | more.pop("body", {})
    whole = {"custom_id": f"id-{number}", "method": "POST", "url": ENDPOINT, "body": body} | more
    return json.dumps(whole).encode() + b"\n"


def form(data: bytes, filename: str = "lines.jsonl", **fields: str) -> bytes:
    """The file first, as some clients send it."""
    head = f'--XyZ\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'.encode()
    parts = [
        f'--XyZ\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in ({"purpose": "batch"} | fields).items()
    ]
    return head + data + b"\r\n" + b"".join(parts) + b"--XyZ--\r\n"


class Batcher:
    """A caller of files and batches."""

    def __init__(self, gw: Gateway, key: str) -> None:
        self.gw = gw
        self.key = key

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        reply = await self.gw.ask(method, path, body, key=self.key)
        assert reply.status == 200, reply.body
        return json.loads(reply.body)

    async def refused(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        reply = await self.gw.ask(method, path, body, key=self.key)
        assert reply.status >= 400, reply.body
        return reply.error | {"status": reply.status}

    async def send(self, sent: bytes) -> Raw:
        raw = request("POST", "/v1/files", sent, key=self.key, content_type="multipart/form-data; boundary=XyZ")
        return await send(self.gw.port, raw, timeout_s=WITHIN_S)

    async def upload(self, data: bytes, **fields: str) -> str:
        reply = await self.send(form(data, **fields))
        assert reply.status == 200, reply.body
        file_id: str = json.loads(reply.body)["id"]
        return file_id

    async def create(self, data: bytes, **more: Any) -> dict[str, Any]:
        body = {"input_file_id": await self.upload(data), "endpoint": ENDPOINT, "completion_window": "24h"}
        batch: dict[str, Any] = await self.ask("POST", "/v1/batches", body | more)
        return batch

    async def until(self, batch_id: str, *states: str) -> dict[str, Any]:
        async with asyncio.timeout(WITHIN_S):
            while True:
                batch: dict[str, Any] = await self.ask("GET", f"/v1/batches/{batch_id}")
                if batch["status"] in (states or FINAL):
                    return batch
                await asyncio.sleep(0.02)

    async def run(self, data: bytes, **more: Any) -> dict[str, Any]:
        return await self.until((await self.create(data, **more))["id"])

    async def content(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        reply = await self.gw.ask("GET", f"/v1/files/{file_id}/content", key=self.key)
        assert reply.status == 200
        return [json.loads(row) for row in reply.body.splitlines()]

    async def results(self, batch: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return await self.content(batch["output_file_id"]), await self.content(batch["error_file_id"])

    async def balance(self) -> tuple[int, int]:
        """Balance and what is held, in nano-USD."""
        account = await self.ask("GET", "/v1/account")
        return account["balance_nanousd"], account["held_nanousd"]


@asynccontextmanager
async def node_of(gw: Gateway, folder: Path, *models: str) -> AsyncIterator[None]:
    """A node, played by hand, of all models or of some."""
    path = str(folder / "batch-node.sock")
    server = await asyncio.start_unix_server(answer, path)
    gw.registry.answered_right(
        gw.registry.add(Node("n0", f"unix:{path}")), models or [model.id for model in CATALOGUE.models]
    )
    gw.clients.add("n0", CoalescingLink(OwnLink(unix_pool(path), gw.clock), Load()))
    try:
        yield
    finally:
        gw.registry.remove("n0")
        gw.clients.remove("n0")
        server.close()


@asynccontextmanager
async def running(gw: Gateway) -> AsyncIterator[None]:
    task = asyncio.create_task(gw.runner.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest_asyncio.fixture(loop_scope="module")
async def caller(gw: Gateway) -> Batcher:
    """A key of an account of its own, with a dollar."""
    account = f"a{len(gw.keys)}-{os.urandom(4).hex()}"
    gw.books.accounts.create(account)
    gw.books.accounts.credit(account, 10**9, account)
    return Batcher(gw, gw.books.keys.create(account, ("embeddings",))[1])


@pytest_asyncio.fixture(loop_scope="module")
async def node(gw: Gateway, folder: Path) -> AsyncIterator[None]:
    async with node_of(gw, folder):
        yield


@pytest_asyncio.fixture(loop_scope="module")
async def runner(gw: Gateway, node: None) -> AsyncIterator[None]:
    async with running(gw):
        yield


# -- a batch from end to end -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runner")
async def test_a_batch_is_worked_off_and_paid_line_by_line(caller: Batcher) -> None:
    """Each line once, in the output or in the error file; the sum of what the answers say they used; nothing held."""
    before = await caller.balance()
    data = b"".join(
        [line(1), line(2, ["a", "ab"]), line(3, "a" * 100), line(4, ""), line(5, "hello", body={"user": "u"})]
    )
    batch = await caller.run(data, metadata={"job": "nightly"})
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 5, "completed": 3, "failed": 2}
    assert batch["metadata"] == {"job": "nightly"}
    output, errors = await caller.results(batch)
    assert sorted(each["custom_id"] for each in output) == ["id-1", "id-2", "id-5"]
    assert sorted(each["custom_id"] for each in errors) == ["id-3", "id-4"]
    assert {each["response"]["body"]["error"]["code"] for each in errors} == {"context_length_exceeded", "empty_input"}
    used = [each["response"]["body"]["usage"]["total_tokens"] for each in output]
    assert batch["usage"]["total_tokens"] == sum(used)
    assert (before[0] - sum(cost_nanousd(tokens, PRICE) for tokens in used), 0) == await caller.balance()
    assert batch["held_nanousd"] == sum(cost_nanousd(tokens, PRICE) for tokens in used)
    times = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
    assert times == sorted(times)
    files = (await caller.ask("GET", "/v1/files?purpose=batch_output"))["data"]
    assert {file["id"] for file in files} == {batch["output_file_id"], batch["error_file_id"]}
    assert files[0]["filename"].startswith(batch["id"])


@pytest.mark.usefixtures("runner")
async def test_many_units_come_together_in_one_file(caller: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "UNIT_LINES_MAX", 7)
    batch = await caller.run(b"\n".join(line(number, "a" * (1 + number % 6)) for number in range(300)))
    output, errors = await caller.results(batch)
    assert [each["custom_id"] for each in output] == [f"id-{number}" for number in range(300)], "in their order"
    assert (errors, batch["error_file_id"]) == ([], None)


@pytest.mark.usefixtures("runner")
async def test_where_no_line_is_answered_there_is_no_output_file(caller: Batcher) -> None:
    batch = await caller.run(line(1, "") + line(2, ""))
    assert (batch["status"], batch["output_file_id"]) == ("completed", None)
    assert batch["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
    assert (await caller.balance())[1] == 0


# -- validation --------------------------------------------------------------------------------------------------------

BAD_FILES = {
    "broken UTF-8": (line(1) + b'{"custom_id": "\xff"}\n', "invalid_json_line", 2),
    "a duplicate": (line(1) + line(1), "duplicate_custom_id", 2),
    "two models": (line(1) + line(2, body={"model": "acme/native"}), "mismatched_model", 2),
    "no line": (b"\n\n", "empty_file", None),
    "another url": (line(1, url="/v1/chat/completions"), "invalid_url", 1),
    "a long line": (line(1) + line(2, "x" * 5 * 1024 * 1024), "line_too_long", 2),
}


@pytest.mark.usefixtures("runner")
@pytest.mark.parametrize(("data", "code", "row"), BAD_FILES.values(), ids=BAD_FILES)
async def test_a_bad_file_fails_its_batch_and_nothing_runs(
    caller: Batcher, data: bytes, code: str, row: int | None
) -> None:
    before = await caller.balance()
    batch = await caller.run(data)
    assert batch["status"] == "failed"
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["line"]) == (code, row)
    assert batch["failed_at"] and not batch["output_file_id"] and not batch["error_file_id"]
    assert await caller.balance() == before


@pytest.mark.usefixtures("runner")
async def test_too_many_lines(caller: Batcher) -> None:
    """50,001 of them."""
    batch = await caller.run(b"".join(line(number, "a") for number in range(50_001)))
    assert [error["code"] for error in batch["errors"]["data"]] == ["too_many_lines"]


@pytest.mark.usefixtures("runner")
async def test_a_batch_over_the_balance_is_refused_with_its_sum(gw: Gateway, caller: Batcher) -> None:
    gw.books.accounts.create("poor")
    gw.books.accounts.credit("poor", 10, "poor")
    poor = Batcher(gw, gw.books.keys.create("poor", ("embeddings",))[1])
    batch = await poor.run(b"".join(line(number) for number in range(10)))
    assert batch["status"] == "failed"
    (error,) = batch["errors"]["data"]
    assert error["code"] == "insufficient_quota"
    assert await poor.balance() == (10, 0)


# -- cancel ------------------------------------------------------------------------------------------------------------


async def test_a_batch_that_is_cancelled_before_it_is_validated(gw: Gateway, caller: Batcher) -> None:
    batch = await caller.create(line(1))
    assert batch["status"] == "validating"
    cancelled = await caller.ask("POST", f"/v1/batches/{batch['id']}/cancel")
    assert cancelled["status"] == "cancelling"
    async with running(gw):
        ended = await caller.until(batch["id"])
    assert (ended["status"], ended["output_file_id"], ended["error_file_id"]) == ("cancelled", None, None)
    assert (await caller.balance())[1] == 0


async def test_a_batch_without_a_node_waits_and_when_it_is_cancelled_its_lines_say_so(
    gw: Gateway, caller: Batcher
) -> None:
    before = await caller.balance()
    async with running(gw):
        batch = await caller.create(line(1) + line(2))
        began = await caller.until(batch["id"], "in_progress")
        assert (await caller.balance())[1] == began["held_nanousd"] > 0
        await caller.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        ended = await caller.until(batch["id"])
    assert ended["status"] == "cancelled"
    output, errors = await caller.results(ended)
    assert output == []
    assert [(each["custom_id"], each["response"], each["error"]["code"]) for each in errors] == [
        ("id-1", None, "batch_cancelled"),
        ("id-2", None, "batch_cancelled"),
    ]
    assert await caller.balance() == before


@pytest.mark.usefixtures("runner")
async def test_what_is_over_cannot_be_cancelled(caller: Batcher) -> None:
    batch = await caller.run(line(1))
    assert (await caller.refused("POST", f"/v1/batches/{batch['id']}/cancel"))["status"] == 400


async def test_a_key_that_is_revoked_ends_its_batches(gw: Gateway, caller: Batcher) -> None:
    """Nobody can be charged by a key that was revoked."""
    account = (await caller.ask("GET", "/v1/account"))["id"]
    key, token = gw.books.keys.create(account, ("embeddings",))
    batch = await Batcher(gw, token).create(line(1))
    gw.books.keys.revoke(key.key_id)
    async with running(gw):
        ended = await caller.until(batch["id"])
    assert ended["status"] == "cancelled"


# -- time --------------------------------------------------------------------------------------------------------------


async def test_a_batch_whose_time_is_over_expires_and_costs_nothing(gw: Gateway, caller: Batcher) -> None:
    before = await caller.balance()
    async with running(gw):
        batch = await caller.create(line(1) + line(2))
        await caller.until(batch["id"], "in_progress")
        gw.clock.ahead_s += 86_400
        try:
            gw.runner.look(batch["id"])
            ended = await caller.until(batch["id"])
        finally:
            gw.clock.ahead_s -= 86_400
    assert ended["status"] == "expired"
    _, errors = await caller.results(ended)
    assert {each["error"]["code"] for each in errors} == {"batch_expired"}
    assert await caller.balance() == before


# -- another gateway ---------------------------------------------------------------------------------------------------


async def test_another_gateway_goes_on_where_one_has_stopped(
    gw: Gateway, caller: Batcher, node: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its units: what is done stays done and is charged once, the rest is worked off."""
    monkeypatch.setattr(validate, "UNIT_LINES_MAX", 5)
    before = await caller.balance()
    batch = await caller.create(b"".join(line(number) for number in range(400)))
    for _ in range(6):
        async with running(gw):
            async with asyncio.timeout(WITHIN_S):
                while (now := await caller.ask("GET", f"/v1/batches/{batch['id']}"))["status"] not in FINAL:
                    if now["request_counts"]["completed"] > 0 and os.urandom(1)[0] < 80:
                        break
                    await asyncio.sleep(0.005)
    async with running(gw):
        ended = await caller.until(batch["id"])
    output, errors = await caller.results(ended)
    assert (sorted(each["custom_id"] for each in output), errors) == (
        sorted(f"id-{number}" for number in range(400)),
        [],
    )
    assert (before[0] - 400 * cost_nanousd(5, PRICE), 0) == await caller.balance()


# -- what others do --------------------------------------------------------------------------------------------------


async def test_batches_that_wait_do_not_keep_those_of_others_from_beginning(
    gw: Gateway, caller: Batcher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a gateway works on at one time, all of one account, for a model without a node: perhaps for a day."""
    monkeypatch.setattr(runner_module, "BATCHES_OF_GATEWAY_MAX", 6)
    monkeypatch.setattr(gw.runner, "_room", Shares(6))
    account = f"crowd-{os.urandom(4).hex()}"
    gw.books.accounts.create(account)
    gw.books.accounts.credit(account, 10**9, account)
    crowd = Batcher(gw, gw.books.keys.create(account, ("embeddings",))[1])
    async with node_of(gw, folder, MODEL.id), running(gw):
        waiting = [await crowd.create(line(1, body={"model": "acme/native"})) for _ in range(8)]
        for each in waiting[:5]:
            await crowd.until(each["id"], "in_progress")
        assert (await caller.run(line(1)))["status"] == "completed"
        for each in waiting:
            await crowd.ask("POST", f"/v1/batches/{each['id']}/cancel")
        for each in waiting:
            await crowd.until(each["id"], "cancelled")


# -- files -------------------------------------------------------------------------------------------------------------


async def test_a_file_comes_back_as_it_was_sent(gw: Gateway, caller: Batcher, folder: Path) -> None:
    data = os.urandom(300_000)
    file_id = await caller.upload(data, filename="my requests.jsonl")
    shown = await caller.ask("GET", f"/v1/files/{file_id}")
    assert (shown["bytes"], shown["purpose"], shown["status"]) == (300_000, "batch", "processed")
    assert shown["expires_at"] == shown["created_at"] + 30 * 86_400
    reply = await gw.ask("GET", f"/v1/files/{file_id}/content", key=caller.key)
    assert (reply.body, reply.headers["content-type"]) == (data, "application/octet-stream")
    assert reply.headers["x-request-id"]
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(request("HEAD", f"/v1/files/{file_id}/content", key=caller.key, Connection="close"))
    async with asyncio.timeout(WITHIN_S):
        head = await reader.read()
    assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")
    assert b"Content-Length: 300000\r\n" in head
    writer.close()
    assert not any(data[:64] in path.read_bytes() for path in (folder / "files").rglob("*") if path.is_file())


async def test_a_file_can_expire_sooner(caller: Batcher) -> None:
    file_id = await caller.upload(line(1), **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    shown = await caller.ask("GET", f"/v1/files/{file_id}")
    assert shown["expires_at"] == shown["created_at"] + 3_600


BAD_FORMS = {
    "no file": (b'--XyZ\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--XyZ--\r\n', "file", 400),
    "no purpose": (form(b"x").replace(b'"purpose"', b'"purpos"'), "purpos", 400),
    "another purpose": (form(b"x", purpose="fine-tune"), "purpose", 400),
    "two files": (form(b"x").replace(b"--XyZ--", form(b"y")), "file", 400),
    "no name": (form(b"x", filename=""), "file", 400),
    "an anchor alone": (form(b"x", **{"expires_after[anchor]": "created_at"}), "expires_after[seconds]", 400),
    "too soon": (
        form(b"x", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}),
        "expires_after[seconds]",
        400,
    ),
}


@pytest.mark.parametrize(("sent", "param", "status"), BAD_FORMS.values(), ids=BAD_FORMS)
async def test_a_bad_form_leaves_nothing(caller: Batcher, sent: bytes, param: str, status: int) -> None:
    reply = await caller.send(sent)
    assert (reply.status, reply.error["param"]) == (status, param)
    assert (await caller.ask("GET", "/v1/files"))["data"] == []


async def test_files_of_others_are_not_there(gw: Gateway, caller: Batcher) -> None:
    file_id = await caller.upload(line(1))
    other = Batcher(gw, gw.key("embeddings"))
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert (await other.refused(method, f"/v1/files/{file_id}{path}"))["status"] == 404
    body = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
    assert (await other.refused("POST", "/v1/batches", body))["status"] == 404
    assert file_id not in str(await other.ask("GET", "/v1/files"))


async def test_a_deleted_file_is_gone_but_for_the_batch_that_reads_it(gw: Gateway, caller: Batcher, node: None) -> None:
    batch = await caller.create(line(1) + line(2))
    file_id = batch["input_file_id"]
    assert await caller.ask("DELETE", f"/v1/files/{file_id}") == {"id": file_id, "object": "file", "deleted": True}
    assert (await caller.refused("GET", f"/v1/files/{file_id}/content"))["status"] == 404
    async with running(gw):
        ended = await caller.until(batch["id"])
    output, _ = await caller.results(ended)
    assert (ended["status"], len(output)) == ("completed", 2)


async def test_an_input_file_that_is_lost_on_the_disk_ends_the_batch(gw: Gateway, caller: Batcher, node: None) -> None:
    batch = await caller.create(line(1) + line(2))
    gw.files.folder.drop(batch["input_file_id"])
    async with running(gw):
        ended = await caller.until(batch["id"])
    assert ended["status"] == "failed"
    assert [error["code"] for error in ended["errors"]["data"]] == ["input_file_lost"]


async def test_pages(caller: Batcher) -> None:
    ids = sorted([await caller.upload(line(number)) for number in range(5)])  # by their time, to the millisecond
    page = await caller.ask("GET", "/v1/files?limit=2")
    assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[:2:-1], True)
    assert (page["first_id"], page["last_id"]) == (ids[4], ids[3])
    page = await caller.ask("GET", f"/v1/files?order=asc&limit=10000&after={ids[1]}")
    assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[2:], False)
    batches = sorted(
        [
            (
                await caller.ask(
                    "POST", "/v1/batches", {"input_file_id": each, "endpoint": ENDPOINT, "completion_window": "24h"}
                )
            )["id"]
            for each in ids
        ]
    )  # by their time, to the millisecond
    page = await caller.ask("GET", "/v1/batches?limit=3")
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == (batches[:1:-1], True)
    page = await caller.ask("GET", f"/v1/batches?after={page['last_id']}")
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == (batches[1::-1], False)
    for each in batches:
        await caller.ask("POST", f"/v1/batches/{each}/cancel")


@pytest.mark.parametrize(
    ("members", "param", "status"),
    [
        ({"endpoint": "/v1/nothing"}, "endpoint", 400),
        ({"completion_window": "1h"}, "completion_window", 400),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata", 400),
        ({"metadata": {"a": "x" * 513}}, "metadata", 400),
        ({"metadata": {str(number): "\1" * 512 for number in range(16)}}, "metadata", 400),
        ({"input_file_id": "file-\0"}, "input_file_id", 404),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds", 400),
        ({"input_file_id": "file-none"}, "input_file_id", 404),
        ({"endpoint": "/v1/chat/completions"}, None, 403),
        ({"surprise": 1}, "surprise", 400),
    ],
)
async def test_a_bad_batch_is_refused(caller: Batcher, members: dict[str, Any], param: str | None, status: int) -> None:
    body = {"input_file_id": await caller.upload(line(1)), "endpoint": ENDPOINT, "completion_window": "24h"}
    refused = await caller.refused("POST", "/v1/batches", body | members)
    assert (refused["status"], refused["param"] or None) == (status, param)


async def test_a_key_for_other_models_makes_no_batch(gw: Gateway, caller: Batcher) -> None:
    account = (await caller.ask("GET", "/v1/account"))["id"]
    limits = Limits(models=("acme/native",))
    narrow = Batcher(gw, gw.books.keys.create(account, ("embeddings",), limits=limits)[1])
    body = {"input_file_id": await caller.upload(line(1)), "endpoint": ENDPOINT, "completion_window": "24h"}
    assert (await narrow.refused("POST", "/v1/batches", body))["status"] == 403


# -- the disk ----------------------------------------------------------------------------------------------------------


async def test_a_full_disk_is_told_and_leaves_nothing(
    gw: Gateway, caller: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept of an upload that the disk has no room for; reads go on, and so do uploads once there is room."""
    kept = await caller.upload(line(1))
    with monkeypatch.context() as full:
        full.setattr(gw.files.folder.backend, "_free_min", 2**62)
        reply = await caller.send(form(b"x" * 1_000_000))
    assert (reply.status, reply.error["code"]) in ((507, "storage_full"), (429, "storage_quota"))
    assert [file["id"] for file in (await caller.ask("GET", "/v1/files"))["data"]] == [kept]
    assert (await gw.ask("GET", f"/v1/files/{kept}/content", key=caller.key)).status == 200
    assert await caller.upload(line(2))


async def test_a_batch_waits_for_room_on_the_disk(
    gw: Gateway, caller: Batcher, node: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are written once there is room: nothing is lost, and nothing is charged twice."""
    failing = [True]
    begin = gw.files.folder.begin_segment

    def begin_segment(batch_id: str, name: str) -> Any:
        if failing[0]:
            failing[0] = False
            raise StorageFull("The disk for files is full. Try again later.")
        return begin(batch_id, name)

    monkeypatch.setattr(gw.files.folder, "begin_segment", begin_segment)
    before = await caller.balance()
    async with running(gw):
        ended = await caller.run(line(1) + line(2))
    assert (ended["status"], ended["request_counts"]["completed"], failing) == ("completed", 2, [False])
    assert (before[0] - 2 * cost_nanousd(5, PRICE), 0) == await caller.balance()


@pytest.mark.usefixtures("runner")
async def test_a_line_of_many_megabytes_is_not_kept_in_memory(caller: Batcher) -> None:
    """It is passed over piece by piece, and named; the lines behind it are read."""
    batch = await caller.run(line(1) + b'{"custom_id":"' + b"x" * 60_000_000 + b'"}\n' + b"{\n")
    assert [(error["code"], error["line"]) for error in batch["errors"]["data"]] == [
        ("line_too_long", 2),
        ("invalid_json_line", 3),
    ]


LOSSES = {
    "made again": ("results", 30.0, [], 4),
    "not in time": ("results", 0.0, ["results_lost"] * 4, 0),
    "with the requests": ("all", 30.0, [], 0),
}


@pytest.mark.parametrize(("lost", "within_s", "codes", "made"), LOSSES.values(), ids=LOSSES)
async def test_results_that_are_lost_on_the_disk_are_made_again_and_paid_once(
    gw: Gateway,
    caller: Batcher,
    node: None,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
    within_s: float,
    codes: list[str],
    made: int,
) -> None:
    """Two units of four lines; the results of the first are lost before the batch ends. What cannot be made says so."""
    monkeypatch.setattr(validate, "UNIT_LINES_MAX", 4)
    monkeypatch.setattr(work, "LOST_S", within_s)
    write = finish.write_outputs

    async def write_outputs(batches: Any, files: FileStore, lease: Any, batch: Any, *more: Any) -> Any:
        (first, *_) = await batches.done_units(lease, limit=1)
        files.folder.backend.drop(segment_key(batch.batch_id, first.segment.name))
        if lost == "all":
            files.folder.drop(batch.input_file_id)
        return await write(batches, files, lease, batch, *more)

    monkeypatch.setattr(work, "write_outputs", write_outputs)
    before = await caller.balance()
    async with running(gw):
        ended = await caller.run(b"".join(line(number) for number in range(8)))
    assert ended["status"] == "completed"
    output, errors = await caller.results(ended)
    assert len({each["custom_id"] for each in output}) == len(output) == 4 + made
    assert [each["error"]["code"] for each in errors] == codes
    assert (before[0] - 8 * cost_nanousd(5, PRICE), 0) == await caller.balance()
