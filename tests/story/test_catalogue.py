"""An operator's own catalogue: several models on one node, prompts, native token ids, prices of their own."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from embedmesh.engine.precision import tiers_here
from embedmesh.engine.tokens import ModelTokenizer
from tests.data import model_folder
from tests.story.conftest import Serve
from tests.story.endpoint import Endpoint

DIGEST = "8b15441b4c169b78dcc3f86d491663fade918ca0772dae0b58d0eba4f681d569"
EMBEDMESH = [sys.executable, "-m", "embedmesh"]
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


def vector(endpoint: Endpoint, asked: object, **members: Any) -> np.ndarray:
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


def test_an_operator_opens_the_api_to_pages_and_to_members_that_are_not_known(serve: Serve) -> None:
    """Both settings reach the gateway that `serve` starts, and do not reach what they are not about."""
    page = "https://app.example.com"
    endpoint = serve("--unknown-members", "ignore", EMBEDMESH_CORS_ORIGIN=f"{page} http://localhost:3000").wait_ready()
    reply = endpoint.ask(input=TEXT, seed=1, metadata={})
    assert (reply.status_code, reply.headers["x-embedmesh-ignored"]) == (200, "seed,metadata")
    assert endpoint.ask(input=TEXT, pooling="max").json()["error"]["code"] == "unknown_parameter"
    for origin, allowed in ((page, page), ("http://localhost:3000", "http://localhost:3000"), ("https://other", None)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        for path, opened in (("/v1/embeddings", True), ("/v1/admin/keys", False)):
            answer = httpx.options(endpoint.root + path, headers=asked)
            assert answer.headers.get("access-control-allow-origin") == (allowed if opened else None)
    assert endpoint.stop() == 0


@pytest.mark.skipif("fast" not in tiers_here(), reason="this CPU has no bfloat16 instructions")
def test_a_tier_is_chosen_by_name_and_comes_and_goes(serve: Serve) -> None:
    """Served where it was asked for only; close to the exact numbers, other than they, and never in their place."""
    endpoint = serve().wait_ready()
    plain = "sentence-transformers/all-MiniLM-L6-v2"
    socket = ["--node", str(endpoint.data_dir / "run" / "node.sock")]

    def served() -> dict[str, str]:
        return {model["id"]: model["tier"] for model in endpoint.get("/v1/models", endpoint.api_key).json()["data"]}

    def until(expected: dict[str, str]) -> None:
        ends = time.monotonic() + 15  # the gateway asks every five seconds
        while served() != expected:
            assert time.monotonic() < ends, served()
            time.sleep(0.05)

    assert served() == {plain: "exact"}
    refused = endpoint.ask(input=TEXT, model="all-MiniLM-L6-v2:fast")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    exact = vector(endpoint, TEXT, model="all-MiniLM-L6-v2")

    run = subprocess.run(
        [*EMBEDMESH, "models", "load", "all-MiniLM-L6-v2:fast", *socket], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, f"{plain}:fast is served now, in the tier fast.\n")
    until({plain: "exact", f"{plain}:fast": "fast"})
    fast = vector(endpoint, TEXT, model="all-MiniLM-L6-v2:fast")
    assert 0.999 < fast @ exact / np.linalg.norm(fast) / np.linalg.norm(exact) < 1 - 1e-7
    assert (vector(endpoint, TEXT, model="all-MiniLM-L6-v2:exact") == exact).all()

    run = subprocess.run([*EMBEDMESH, "models", "unload", f"{plain}:fast", *socket], capture_output=True, text=True)
    assert run.returncode == 0
    assert endpoint.ask(input=TEXT, model="all-MiniLM-L6-v2:fast").status_code == 503
    until({plain: "exact"})
    assert (vector(endpoint, TEXT, model="all-MiniLM-L6-v2") == exact).all()


def test_where_only_other_servers_run_the_models_there_is_no_node(serve: Serve, tmp_path: Path) -> None:
    """`serve` runs the gateway alone, says what to do next, and its own node is not missed."""
    file = tmp_path / "models.toml"
    file.write_text('[[models]]\nid = "llama"\nmodalities = ["chat"]\nmax_tokens = 8_192\nprice = 50_000_000\n')
    endpoint = serve("--catalogue", file, as_json=False).wait_ready("Ready:")
    assert set(endpoint.processes().values()) == {"serve", "gateway"}
    assert "embedmesh nodes add URL --model MODEL" in endpoint.said.read_text()
    reply = endpoint.http.post(
        f"{endpoint.base_url}/chat/completions", json={"model": "llama", "messages": [{"role": "user", "content": "x"}]}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_node_available")
    assert endpoint.stop() == 0
