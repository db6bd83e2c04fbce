"""An operator's own catalogue: several models on one node, prompts, native token ids, prices of their own."""

from pathlib import Path

import numpy as np
import pytest

from embedmesh.engine.tokens import ModelTokenizer
from tests.data import model_folder
from tests.story.conftest import Serve
from tests.story.endpoint import Endpoint

DIGEST = "8b15441b4c169b78dcc3f86d491663fade918ca0772dae0b58d0eba4f681d569"
TEXT = "The harbour lights went out one by one."

CATALOGUE = """
[defaults]
price = 20_000_000

[[models]]
id = "acme/plain"
folder = "{folder}"
width = 384
max_tokens = 256
digest = "{digest}"

[[models]]
id = "acme/native"
aliases = ["ids"]
folder = "{folder}"
width = 384
max_tokens = 64
price = 0
digest = "{digest}"
token_ids = "native"
prompts = {{ query = "query: " }}
"""


@pytest.fixture
def endpoint(serve: Serve, tmp_path: Path) -> Endpoint:
    file = tmp_path / "models.toml"
    file.write_text(CATALOGUE.format(folder=model_folder(), digest=DIGEST))
    return serve("--catalogue", file).wait_ready()


def vector(endpoint: Endpoint, asked: object, **members: object) -> np.ndarray:
    reply = endpoint.ask(input=asked, **members)
    assert reply.status_code == 200, reply.text
    return np.array(reply.json()["data"][0]["embedding"], np.float32)


def test_two_models_on_one_node(endpoint: Endpoint) -> None:
    listed = {model["id"]: model for model in endpoint.get("/v1/models", endpoint.api_key).json()["data"]}
    assert set(listed) == {"acme/plain", "acme/native"}
    assert listed["acme/native"]["max_tokens"] == 64

    tokenizer = ModelTokenizer(model_folder(), 256)
    ids = tokenizer.ids([TEXT])[0]
    plain = vector(endpoint, TEXT, model="acme/plain")

    # Native ids are the model's own: the same vector as the text, with or without a prompt before them.
    assert np.abs(vector(endpoint, ids, model="ids") - plain).max() < 1e-6
    as_query = vector(endpoint, f"query: {TEXT}", model="acme/plain")
    assert np.abs(vector(endpoint, ids, model="ids", input_type="query") - as_query).max() < 1e-6
    assert np.abs(vector(endpoint, TEXT, model="ids", input_type="search_query") - as_query).max() < 1e-6
    assert np.abs(vector(endpoint, TEXT, model="ids", input_type="document") - plain).max() < 1e-6
    assert np.abs(as_query - plain).max() > 0.01

    refusals: list[tuple[object, str]] = [([30_522], "input"), ([[7], [101]], "input.1"), ([[7], [0]], "input.1")]
    for wrong, param in refusals:
        reply = endpoint.ask(input=wrong, model="ids")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    reply = endpoint.ask(input=[7] * 63, model="ids")
    assert reply.json()["error"]["code"] == "context_length_exceeded"

    # The price of a model without one is the file's; one that costs nothing is charged as nothing.
    tokens = len(ids) + 2
    assert endpoint.ask(input=TEXT, model="acme/plain").headers["x-embedmesh-cost-nanousd"] == str(tokens * 20)
    assert endpoint.ask(input=TEXT, model="ids").headers["x-embedmesh-cost-nanousd"] == "0"
    endpoint.check_ledger()
    assert endpoint.stop() == 0
