"""Files and batches with OpenAI's own clients for Python and Node, unmodified; and the commands that look at them."""

import io
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from bench.rig.live import embedmesh
from tests.story.endpoint import MODEL, SAME, Endpoint
from tests.story.generating import INPUT_PRICE, OUTPUT_PRICE, Generating, asking
from tests.story.npm import script

TEXTS = ["hello world", "日本語の文", "Ein Satz auf Deutsch."]
WINDOW: Literal["24h"] = "24h"
ENDED = ("completed", "failed", "expired", "cancelled")
WAIT_S = 90.0
COUNTED = (  # of its metrics
    f'embedmesh_batch_lines_total{{model="{MODEL}",result="completed"}}',
    f'embedmesh_batch_tokens_total{{model="{MODEL}"}}',
    f'embedmesh_batch_charged_nanousd_total{{model="{MODEL}"}}',
)


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[OpenAI]:
    with OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as made:
        yield made


def lines_of(texts: list[str], **body: Any) -> bytes:
    rows = [
        {
            "custom_id": f"text-{number}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": MODEL, "input": text} | body,
        }
        for number, text in enumerate(texts)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def wait_for(client: OpenAI, batch_id: str) -> openai.types.Batch:
    """As the documentation of the API shows it."""
    import time

    until = time.monotonic() + WAIT_S
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        assert time.monotonic() < until, batch
        time.sleep(0.1)
    return batch


def test_a_batch_as_the_documentation_shows_it(client: OpenAI, endpoint: Endpoint) -> None:
    """Upload, create, wait, read the results by `custom_id`: the vectors and the tokens of the same requests alone."""
    file = client.files.create(file=("requests.jsonl", lines_of(TEXTS), "application/jsonl"), purpose="batch")
    assert client.files.wait_for_processing(file.id, max_wait_seconds=10).status == "processed"
    before, counted = endpoint.account().balance_nanousd, {name: endpoint.metric(name) for name in COUNTED}
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window=WINDOW, metadata={"job": "story"}
    )
    assert (batch.status, batch.request_counts.total if batch.request_counts else None) == ("validating", 0)
    ended = wait_for(client, batch.id)
    assert ended.status == "completed"
    assert ended.request_counts is not None and ended.output_file_id is not None
    assert (ended.request_counts.completed, ended.request_counts.failed) == (3, 0)
    assert ended.metadata == {"job": "story"}
    rows = [json.loads(row) for row in client.files.content(ended.output_file_id).text.splitlines()]
    expected = endpoint.embed(TEXTS)
    for row in rows:
        body = row["response"]["body"]
        number = int(row["custom_id"].removeprefix("text-"))
        assert np.abs(np.array(body["data"][0]["embedding"], np.float32) - expected[number]).max() <= SAME
    used = sum(row["response"]["body"]["usage"]["total_tokens"] for row in rows)
    assert ended.usage is not None and ended.usage.total_tokens == used
    alone = used * 10  # what `expected` cost, at 10 nano-USD a token
    assert before - endpoint.account().balance_nanousd == alone + used * 5
    more = [endpoint.metric(name) - value for name, value in counted.items()]
    assert more == [3, used, used * 5]
    assert batch.id in [each.id for each in client.batches.list(limit=1)]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_an_upload_from_a_stream_with_an_expiry(client: OpenAI) -> None:
    file = client.files.create(
        file=("a.jsonl", io.BytesIO(lines_of(["x"]))),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3_600},
    )
    assert file.expires_at == file.created_at + 3_600
    assert client.files.content(file.id).content == lines_of(["x"])
    assert file.id in [each.id for each in client.files.list(purpose="batch", order="desc")]
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", b"x"), purpose="fine-tune")
    assert refused.value.param == "purpose"


def test_a_file_that_is_not_right(client: OpenAI) -> None:
    file = client.files.create(file=("bad.jsonl", lines_of(["x"]) * 2), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window=WINDOW)
    ended = wait_for(client, batch.id)
    assert ended.status == "failed" and ended.errors is not None and ended.errors.data is not None
    (error,) = ended.errors.data
    assert (error.code, error.line, error.param) == ("duplicate_custom_id", 2, "custom_id")
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


async def test_the_asynchronous_client_and_errors_line_by_line(endpoint: Endpoint) -> None:
    async with AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as client:
        data = lines_of(["fine", ""])
        file = await client.files.create(file=("requests.jsonl", data), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window=WINDOW)
        while batch.status not in ENDED:
            batch = await client.batches.retrieve(batch.id)
        assert batch.error_file_id is not None
        (row,) = (json.loads(row) for row in (await client.files.content(batch.error_file_id)).text.splitlines())
        assert (row["custom_id"], row["response"]["status_code"]) == ("text-1", 400)
        assert (await client.batches.list(limit=1)).data[0].id == batch.id


@pytest.mark.usefixtures("packages")
def test_the_client_for_node(endpoint: Endpoint) -> None:
    """It sends the form in the order of its members, the file first."""
    got = script("openai_batches.mjs", endpoint.base_url, MODEL, OPENAI_API_KEY=endpoint.api_key)
    assert got["processed"] == "processed"
    assert (got["status"], got["counts"]) == ("completed", {"total": 2, "completed": 2, "failed": 0})
    assert got["ids"] == ["a", "b"]
    assert np.abs(np.array(got["vector"], np.float32) - endpoint.embed("hello world")[0]).max() <= SAME
    assert got["listed"] and got["deleted"]
    assert got["cancelled"] in ("cancelling", "cancelled", "completed")


def test_the_commands(client: OpenAI, endpoint: Endpoint) -> None:
    file = client.files.create(file=("requests.jsonl", lines_of(TEXTS)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window=WINDOW)
    wait_for(client, batch.id)

    def said(*arguments: str) -> Any:
        done = embedmesh(endpoint.data_dir, *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert batch.id in [each["id"] for each in said("batches", "list")]
    assert said("batches", "show", batch.id)["status"] == "completed"
    assert embedmesh(endpoint.data_dir, "batches", "cancel", batch.id).returncode == 1
    assert file.id in [each["id"] for each in said("files", "list")]
    assert said("files", "delete", file.id)["deleted"]
    assert said("ledger", "check")["ok"]


def test_a_batch_of_chats_over_a_server_of_another_make(speaking: Generating) -> None:
    """Each line is answered once, and charged once by what it used, at the batch's price."""
    rows = [
        {"custom_id": f"chat-{number}", "method": "POST", "url": "/v1/chat/completions", "body": asking(max_tokens=50)}
        for number in range(3)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    before = speaking.endpoint.account().balance_nanousd
    with OpenAI(base_url=speaking.endpoint.base_url, api_key=speaking.endpoint.api_key, max_retries=0) as client:
        file = client.files.create(file=("chats.jsonl", data), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=WINDOW)
        ended = wait_for(client, batch.id)
        assert ended.status == "completed" and ended.output_file_id is not None
        answers = [json.loads(row) for row in client.files.content(ended.output_file_id).text.splitlines()]
    assert sorted(each["custom_id"] for each in answers) == ["chat-0", "chat-1", "chat-2"]
    cost = 0
    for each in answers:
        body = each["response"]["body"]
        assert body["choices"][0]["message"]["content"]
        used = body["usage"]
        ordinary = used["prompt_tokens"] * INPUT_PRICE + used["completion_tokens"] * OUTPUT_PRICE
        cost += -(-ordinary // 2)  # half of it, rounded up once
    assert (
        ended.usage is not None
        and ended.usage.output_tokens == 3 * answers[0]["response"]["body"]["usage"]["completion_tokens"]
    )
    assert before - speaking.endpoint.account().balance_nanousd == cost
