"""OpenAI's own Python client, unmodified."""

import asyncio
import json
import time
from collections.abc import Iterator

import numpy as np
import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

from embedmesh.provision.bootstrap import open_books
from embedmesh.settings import store_path
from tests.story.endpoint import MODEL, SAME, WIDTH, Endpoint, Vectors

TEXTS = ["hello world", "Ein Satz auf Deutsch.", "日本語の文"]
NEXT_S = 3.0  # one short text behind the batch that runs; the abandoned work itself would take two or three times that
REFUSED_FOR_QUOTA = f'embedmesh_requests_total{{code="insufficient_quota",model="{MODEL}",route="/v1/embeddings"}}'
HELLO_WORLD_CL100K = [15339, 1917]  # what OpenAI's tokenizer makes of "hello world"


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[OpenAI]:
    with OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def hello(endpoint: Endpoint) -> Vectors:
    """The vector of "hello world", asked for without any client library."""
    vector: Vectors = endpoint.embed("hello world")[0]
    return vector


def vectors_of(reply: openai.types.CreateEmbeddingResponse) -> Vectors:
    return np.array([item.embedding for item in reply.data], np.float32)


def test_default_and_float_are_the_same_vectors(client: OpenAI, hello: Vectors) -> None:
    """The client asks for base64 unless told otherwise; either way the caller gets the same floats."""
    default = client.embeddings.create(model=MODEL, input=TEXTS)
    floats = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    assert vectors_of(default).shape == (3, WIDTH)
    assert np.array_equal(vectors_of(default), vectors_of(floats))
    assert np.abs(vectors_of(default)[0] - hello).max() <= SAME
    assert [item.index for item in default.data] == [0, 1, 2]
    assert default.model == MODEL
    assert default.usage == floats.usage
    assert default.usage.prompt_tokens == default.usage.total_tokens > 0


@pytest.mark.parametrize(
    "given",
    ["hello world", ["hello world"], HELLO_WORLD_CL100K, [HELLO_WORLD_CL100K]],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_every_form_of_input(client: OpenAI, hello: Vectors, given: str | list[str]) -> None:
    """A text, texts, token ids of cl100k and lists of them: the same text, so the same vector and the same tokens."""
    reply = client.embeddings.create(model=MODEL, input=given)
    assert np.abs(vectors_of(reply) - hello).max() <= SAME
    assert reply.usage.prompt_tokens == 4  # [CLS] hello world [SEP]


def test_dimensions_and_user(client: OpenAI, hello: Vectors) -> None:
    """Fewer dimensions are the first ones at unit length; the base64 the client asks for says the same as floats."""
    first = hello[:64].astype(np.float64)
    for encoding in (openai.omit, "float"):
        reply = client.embeddings.create(
            model=MODEL, input="hello world", dimensions=64, user="someone", encoding_format=encoding
        )
        assert np.abs(vectors_of(reply)[0] - first / np.linalg.norm(first)).max() <= SAME


def test_raw_response_shows_our_headers(client: OpenAI) -> None:
    """What OpenAI's users read from headers is there, and so is what this call cost and who did it."""
    raw = client.embeddings.with_raw_response.create(
        model=MODEL, input="hello world", extra_headers={"x-request-id": "story-1.a_b"}
    )
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-request-id"] == "story-1.a_b"
    assert int(raw.headers["openai-processing-ms"]) >= 1
    assert raw.headers["x-embedmesh-cost-nanousd"] == "40"  # 4 tokens at 10 nano-USD
    assert raw.headers["x-embedmesh-node"] == "local"
    assert raw.headers["x-embedmesh-truncated"] == "0"
    assert len(raw.parse().data) == 1


def test_models(client: OpenAI) -> None:
    """The list has the default model; it is found by its id, slash and all, and by its alias."""
    assert [model.id for model in client.models.list()] == [MODEL]
    for name in (MODEL, "all-MiniLM-L6-v2"):
        assert client.models.retrieve(name).id == MODEL
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("nobody/nothing")
    assert refused.value.code == "model_not_found"


def test_extra_body(client: OpenAI) -> None:
    """Members that OpenAI does not know travel in `extra_body`; a misspelt one is named."""
    long = "word " * 400
    reply = client.embeddings.create(
        model=MODEL, input=long, extra_body={"input_type": "search_query", "truncate": "END"}
    )
    assert reply.usage.prompt_tokens == 256
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=MODEL, input="x", extra_body={"truncat": "end"})
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", "truncat")


@pytest.mark.parametrize(
    ("members", "kind", "code", "param"),
    [
        ({"input": ""}, openai.BadRequestError, "empty_input", "input"),
        ({"input": ["a", ""]}, openai.BadRequestError, "empty_input", "input.1"),
        ({"input": []}, openai.BadRequestError, "empty_input", "input"),
        ({"input": "word " * 400}, openai.BadRequestError, "context_length_exceeded", "input"),
        ({"input": ["a"] * 2049}, openai.BadRequestError, "too_many_inputs", "input"),
        ({"input": "a", "dimensions": 0}, openai.BadRequestError, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 385}, openai.BadRequestError, "invalid_value", "dimensions"),
        ({"input": "a", "model": "nobody/nothing"}, openai.NotFoundError, "model_not_found", "model"),
    ],
)
def test_refusals(
    client: OpenAI, members: dict[str, object], kind: type[openai.APIStatusError], code: str, param: str
) -> None:
    """Each refusal is the client's own exception, with code, param, words and a request id."""
    with pytest.raises(kind) as refused:
        client.embeddings.create(**{"model": MODEL, **members})  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.param) == (code, param)
    assert isinstance(refused.value.body, dict)
    assert len(refused.value.body["message"]) > 10
    assert refused.value.request_id


@pytest.mark.parametrize("deployment", [None, MODEL])
def test_azures_client(endpoint: Endpoint, hello: Vectors, deployment: str | None) -> None:
    """The same package's client for Azure: the key in `api-key`, the model in the path, a version in the query."""
    with AzureOpenAI(
        azure_endpoint=endpoint.root,
        api_key=endpoint.api_key,
        api_version="2024-10-21",
        azure_deployment=deployment,
        max_retries=0,
    ) as client:
        reply = client.embeddings.create(model="all-MiniLM-L6-v2", input="hello world")
        assert np.abs(vectors_of(reply)[0] - hello).max() <= SAME
        with pytest.raises(openai.NotFoundError) as refused:
            client.embeddings.create(model="text-embedding-3-small", input="hello world")
        assert refused.value.code == "model_not_found"
        assert MODEL in str(refused.value) and "aliases = [" in str(refused.value)
        if deployment is None:
            assert [model.id for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="em_wrong").embeddings.create(model=MODEL, input="x")


async def test_azures_asynchronous_client(endpoint: Endpoint, hello: Vectors) -> None:
    """And its key where other clients have it, as a token of Azure's directory would come."""
    async with AsyncAzureOpenAI(
        azure_endpoint=endpoint.root, azure_ad_token=endpoint.api_key, api_version="2024-10-21", max_retries=0
    ) as client:
        reply = await client.embeddings.create(model=MODEL, input="hello world", encoding_format="float")
    assert np.abs(vectors_of(reply)[0] - hello).max() <= SAME


def test_azures_newer_base_url(endpoint: Endpoint, hello: Vectors) -> None:
    """The plain client with the base URL that Azure documents now."""
    with OpenAI(base_url=endpoint.root + "/openai/v1/", api_key=endpoint.api_key, max_retries=0) as client:
        assert np.abs(vectors_of(client.embeddings.create(model=MODEL, input="hello world"))[0] - hello).max() <= SAME
        assert client.models.retrieve(MODEL).id == MODEL


def test_members_of_other_apis(client: OpenAI, hello: Vectors) -> None:
    """What changes nothing is named in a header; what means something that we have is done."""
    harmless = {"metadata": {"trace": "a"}, "timeout": 30, "drop_params": True, "priority": 1}
    raw = client.embeddings.with_raw_response.create(model=MODEL, input="hello world", extra_body=harmless)
    assert raw.headers["x-embedmesh-ignored"] == ",".join(harmless)
    assert np.abs(vectors_of(raw.parse())[0] - hello).max() <= SAME
    meant = {"output_dimension": 64, "truncate_prompt_tokens": 3, "normalize": True, "task": "text-matching"}
    raw = client.embeddings.with_raw_response.create(model=MODEL, input="hello world again", extra_body=meant)
    assert "x-embedmesh-ignored" not in raw.headers
    reply = raw.parse()
    assert (reply.usage.prompt_tokens, vectors_of(reply).shape) == (3, (1, 64))
    same = client.embeddings.create(model=MODEL, input="hello", dimensions=64)  # [CLS] hello [SEP]
    assert np.abs(vectors_of(reply) - vectors_of(same)).max() <= SAME
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=MODEL, input="x", extra_body={"normalize": False})
    assert refused.value.param == "normalize"


def test_a_wrong_key(client: OpenAI) -> None:
    """No key but ours opens anything."""
    for key in ("em_wrong", "sk-" + "x" * 48):
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key=key).embeddings.create(model=MODEL, input="x")
        assert refused.value.code == "invalid_api_key"


def test_as_many_inputs_as_one_request_takes(client: OpenAI, endpoint: Endpoint) -> None:
    """2,048 texts in one request come back in order, each as if it had come alone."""
    texts = [f"text {number}" for number in range(2048)]
    vectors = vectors_of(client.embeddings.create(model=MODEL, input=texts))
    assert vectors.shape == (2048, WIDTH)
    for number in (0, 1023, 2047):
        assert np.abs(endpoint.embed(texts[number])[0] - vectors[number]).max() <= SAME


async def test_fifty_at_once(endpoint: Endpoint) -> None:
    """Fifty calls of the asynchronous client at one time: each gets its own vector."""
    texts = [f"question {number}: " + "why " * (number % 17) for number in range(50)]
    async with AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as client:
        replies = await asyncio.gather(*(client.embeddings.create(model=MODEL, input=text) for text in texts))
    together = endpoint.embed(texts)
    for reply, expected in zip(replies, together, strict=True):
        assert np.abs(vectors_of(reply)[0] - expected).max() <= SAME


def test_hanging_up_costs_nothing_and_leaves_nothing(client: OpenAI, endpoint: Endpoint) -> None:
    """A client that gives up in the middle is not charged, and those behind it do not wait for its work."""
    before = endpoint.account().balance_nanousd
    much = [f"{at} " + "one two three four five six seven eight nine ten " * 15 for at in range(600)]  # many seconds
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).embeddings.create(model=MODEL, input=much)
    began = time.monotonic()
    endpoint.embed("me next")
    assert time.monotonic() - began < NEXT_S
    charged = before - endpoint.account().balance_nanousd
    assert charged == 40  # "me next", nothing else


async def test_hanging_up_async(endpoint: Endpoint) -> None:
    """The same when a task is cancelled."""
    before = endpoint.account().balance_nanousd
    async with AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as client:
        task = asyncio.create_task(
            client.embeddings.create(model=MODEL, input=[f"{at} " + "some more words " * 60 for at in range(200)])
        )
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert endpoint.account().balance_nanousd == before


def test_without_money(endpoint: Endpoint) -> None:
    """No money is the client's RateLimitError with the code that OpenAI uses; it does not try again."""
    with open_books(endpoint.data_dir, store_path(endpoint.data_dir)) as books:
        books.accounts.create("penniless")
        _, key = books.keys.create("penniless", ("embeddings",))
    before = endpoint.metric(REFUSED_FOR_QUOTA)
    with (
        OpenAI(base_url=endpoint.base_url, api_key=key, max_retries=3) as client,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        client.embeddings.create(model=MODEL, input="x")
    assert endpoint.metric(REFUSED_FOR_QUOTA) == before + 1
    assert refused.value.code == "insufficient_quota"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert json.loads(refused.value.response.content)["error"]["type"] == "insufficient_quota"
