"""atoma-sdk 0.1.3 for Python, unmodified: it takes float lists, exactly 200 and `application/json`."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from atoma_sdk import AtomaSDK
from atoma_sdk.models import APIError

from tests.story.endpoint import MODEL, SAME, WIDTH, Endpoint


@pytest.fixture(scope="module")
def sdk(endpoint: Endpoint) -> Iterator[AtomaSDK]:
    with AtomaSDK(bearer_auth=endpoint.api_key, server_url=endpoint.root) as made:
        yield made


def test_floats(sdk: AtomaSDK, endpoint: Endpoint) -> None:
    """A text, texts and every member it knows, explicit nulls included."""
    texts = ["hello world", "日本語の文"]
    expected = endpoint.embed(texts)
    one = sdk.embeddings.create(model=MODEL, input_=texts[0])
    assert np.abs(np.array(one.data[0].embedding) - expected[0]).max() <= SAME
    assert one.usage.prompt_tokens == one.usage.total_tokens == 4
    nulls = sdk.embeddings.create(model=MODEL, input_=texts, dimensions=None, encoding_format=None, user=None)
    assert np.abs(np.array([item.embedding for item in nulls.data]) - expected).max() <= SAME
    all_members = sdk.embeddings.create(
        model=MODEL, input_=texts, dimensions=WIDTH, encoding_format="float", user="someone"
    )
    assert np.abs(np.array([item.embedding for item in all_members.data]) - expected).max() <= SAME


async def test_async(sdk: AtomaSDK, endpoint: Endpoint) -> None:
    """Its asynchronous form is the same request."""
    async with AtomaSDK(bearer_auth=endpoint.api_key, server_url=endpoint.root) as own:
        reply = await own.embeddings.create_async(model=MODEL, input_="hello world")
    assert len(reply.data[0].embedding) == WIDTH


@pytest.mark.parametrize(
    ("key", "model", "text", "status", "code"),
    [
        ("em_wrong", MODEL, "x", 401, "invalid_api_key"),
        (None, "nobody/nothing", "x", 404, "model_not_found"),
        (None, MODEL, "", 400, "empty_input"),
    ],
)
def test_errors_are_shown(endpoint: Endpoint, key: str | None, model: str, text: str, status: int, code: str) -> None:
    """Its exception carries our status and our envelope, word for word."""
    with (
        AtomaSDK(bearer_auth=key or endpoint.api_key, server_url=endpoint.root) as sdk,
        pytest.raises(APIError) as refused,
    ):
        sdk.embeddings.create(model=model, input_=text)
    assert refused.value.status_code == status
    assert json.loads(refused.value.body)["error"]["code"] == code


def test_models_and_health(sdk: AtomaSDK) -> None:
    """Its other calls that we serve."""
    assert [model.id for model in sdk.models_.models_list().data] == [MODEL]
    assert sdk.health.health().message == "ok"


def test_confidential(endpoint: Endpoint) -> None:
    """Its confidential calls lock a node, seal, and open; the vectors are those of the plain call."""
    texts = ["hello world", "日本語の文"]
    with AtomaSDK(bearer_auth=endpoint.api_key, server_url=endpoint.root) as sdk:
        reply = sdk.confidential_embeddings.create(model=MODEL, input=texts)
    assert np.abs(np.array([item.embedding for item in reply.data]) - endpoint.embed(texts)).max() <= SAME
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0


async def test_confidential_async(endpoint: Endpoint) -> None:
    """Its asynchronous form is the same request."""
    async with AtomaSDK(bearer_auth=endpoint.api_key, server_url=endpoint.root) as own:
        reply = await own.confidential_embeddings.create_async(
            model=MODEL, input="hello world", encoding_format="float"
        )
    assert np.abs(np.array(reply.data[0].embedding) - endpoint.embed(["hello world"])[0]).max() <= SAME


def test_a_lock(endpoint: Endpoint) -> None:
    """A lock can be taken by itself: a key, and two whole numbers."""
    with AtomaSDK(bearer_auth=endpoint.api_key, server_url=endpoint.root) as sdk:
        lock, other = (sdk.nodes.nodes_create_lock(model=MODEL) for _ in range(2))
    assert lock.public_key == other.public_key
    assert lock.stack_small_id != other.stack_small_id
    assert lock.node_small_id == other.node_small_id
    for each in (lock, other):
        endpoint.use_up(each.public_key, each.stack_small_id)


@pytest.mark.parametrize(
    ("model", "text", "code"), [("nobody/nothing", "x", "model_not_found"), (MODEL, "", "refused")]
)
def test_confidential_errors_are_shown(endpoint: Endpoint, model: str, text: str, code: str) -> None:
    """Its exception carries our envelope. What the node has to say of an empty text is sealed."""
    with AtomaSDK(bearer_auth=endpoint.api_key, server_url=endpoint.root) as sdk, pytest.raises(APIError) as refused:
        sdk.confidential_embeddings.create(model=model, input=text)
    assert code in str(refused.value.body)
