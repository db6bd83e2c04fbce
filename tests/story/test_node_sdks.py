"""The Node clients, unmodified: npm `openai` and `atoma-sdk` 0.1.1, pinned and hashed in node/package-lock.json."""

from pathlib import Path

import numpy as np
import pytest

from tests.story.endpoint import MODEL, SAME, WIDTH, Endpoint, Vectors
from tests.story.npm import script
from tests.story.sidecar import CHAT, PAINTER, sidecar_mesh

TEXTS = ["hello world", "日本語の文"]


@pytest.fixture(scope="module")
def expected(endpoint: Endpoint) -> Vectors:
    return endpoint.embed(TEXTS)


@pytest.mark.usefixtures("packages")
def test_openai(endpoint: Endpoint, expected: Vectors) -> None:
    """It asks for base64 unless told otherwise, and shows the same floats; errors are its own, with code and param."""
    got = script("openai.mjs", endpoint.base_url, MODEL, OPENAI_API_KEY=endpoint.api_key)
    assert np.abs(np.array(got["default"]) - expected).max() <= SAME
    assert np.array_equal(np.array(got["default"], np.float32), np.array(got["float"], np.float32))
    assert got["azure"] == got["default"], "the package's client for Azure asks by another path and header"
    assert np.abs(np.array(got["ids"]) - expected[:1]).max() <= SAME
    short = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    assert np.abs(np.array(got["short"]) - short).max() <= SAME
    assert got["many"] == list(range(300))
    assert got["usage"]["prompt_tokens"] == got["usage"]["total_tokens"] > 0
    assert int(got["cost"]) == 10 * got["usage"]["total_tokens"]
    assert (got["models"], got["retrieved"]) == ([MODEL], MODEL)
    assert got["refusals"] == [
        {"kind": "AuthenticationError", "status": 401, "code": "invalid_api_key", "param": None},
        {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"},
        {"kind": "BadRequestError", "status": 400, "code": "empty_input", "param": "input"},
        {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"},
    ]


@pytest.mark.usefixtures("native")
def test_atoma(endpoint: Endpoint, expected: Vectors) -> None:
    """It takes float lists; explicit nulls mean "not given"; errors carry our status and envelope."""
    got = script("atoma.mjs", endpoint.root, MODEL, ATOMASDK_BEARER_AUTH=endpoint.api_key)
    for vectors in (got["plain"], got["nulls"]):
        assert np.array(vectors).shape == (2, WIDTH)
        assert np.abs(np.array(vectors) - expected).max() <= SAME
    assert np.abs(np.array(got["one"]) - expected[:1]).max() <= SAME
    assert got["usage"]["promptTokens"] == got["usage"]["totalTokens"] > 0
    assert np.abs(np.array(got["sealed"]) - expected).max() <= SAME
    assert got["sealedUsage"] == got["usage"]
    public_key, lock, _ = got["lock"]
    endpoint.use_up(public_key, lock)
    assert got["models"] == [MODEL]
    assert got["health"] == {"message": "ok"}
    assert got["refusals"] == [
        {"kind": "APIError", "status": 401, "code": "invalid_api_key"},
        {"kind": "APIError", "status": 404, "code": "model_not_found"},
        {"kind": "APIError", "status": 400, "code": "empty_input"},
    ]


@pytest.mark.usefixtures("native")
def test_atoma_generation(tmp_path: Path) -> None:
    """Its confidential chat, stream and image, at a sidecar.

    Events are 20 ms apart: where several come in one read, this SDK loses some of them (a stale place in its buffer).
    """
    text = "repeat these seven words to me now"
    with sidecar_mesh(tmp_path, pace_s=0.02) as mesh:
        endpoint = mesh.endpoint
        got = script(
            "atoma_confidential.mjs", endpoint.root, CHAT, PAINTER, text, ATOMASDK_BEARER_AUTH=endpoint.api_key
        )
        assert (got["whole"], got["streamed"]) == (text, text)
        assert (got["usage"]["promptTokens"], got["usage"]["completionTokens"]) == (10, 7)
        assert got["finish"] == ["stop"] and got["events"] == 8
        assert got["image"] == "data:image/png;base64,"
        assert got["refused"] == {"kind": "APIError", "status": 400, "code": "confidential_refused"}
        assert endpoint.account().balance_nanousd == 10**11 - 2 * (10 * 1_000 + 7 * 3_000) - 5_000_000
