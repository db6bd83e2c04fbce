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
