"""The Node clients, unmodified: npm `openai` and `atoma-sdk` 0.1.1, pinned and hashed in node/package-lock.json."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.story.endpoint import MODEL, SAME, WIDTH, Endpoint, Vectors
from tests.story.sidecar import CHAT, PAINTER, sidecar_mesh

HERE = Path(__file__).parent / "node"
INSTALL_S = 120.0  # five seconds here; npm's own retries are longer than anybody wants to wait
SCRIPT_S = 60.0
TEXTS = ["hello world", "日本語の文"]
NATIVE = "blake2"  # of atoma-sdk; compiled at install, which wants a C++ compiler and Node's headers


def npm(*arguments: str) -> str | None:
    """Run npm here; None if it did well, else the end of what it said."""
    try:
        done = subprocess.run(
            ["npm", *arguments, "--no-audit", "--no-fund"],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            env=os.environ | headers_of_node(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {INSTALL_S:.0f} s"
    return None if done.returncode == 0 else done.stderr.strip()[-400:] or f"exit code {done.returncode}"


def headers_of_node() -> dict[str, str]:
    """Compile against the headers that came with Node, where they did, instead of fetching them."""
    prefix = Path(shutil.which("node") or "/usr/bin/node").resolve().parent.parent
    return {"npm_config_nodedir": str(prefix)} if (prefix / "include" / "node" / "node.h").exists() else {}


@pytest.fixture(scope="module")
def packages() -> Path:
    """node_modules as the lock file says, without anybody's install scripts; skips where that cannot be had."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    modules = HERE / "node_modules"
    stamp = modules / ".of-this-lock"
    lock = (HERE / "package-lock.json").read_bytes()
    if not stamp.exists() or stamp.read_bytes() != lock:
        if (problem := npm("ci", "--ignore-scripts")) is not None:
            pytest.skip(f"the packages cannot be installed: {problem}")
        stamp.write_bytes(lock)
    return modules


@pytest.fixture(scope="module")
def native(packages: Path) -> None:
    """atoma-sdk cannot be imported without its native part, though only confidential calls use it."""
    if not (packages / NATIVE / "build" / "Release" / f"{NATIVE}.node").exists():
        problem = npm("rebuild", NATIVE)
        if not (packages / NATIVE / "build" / "Release" / f"{NATIVE}.node").exists():
            pytest.skip(f"{NATIVE}, which atoma-sdk needs, cannot be compiled: {problem}")


def script(name: str, *arguments: str, **environment: str) -> Any:
    """The JSON that a script of node/ prints; it must end well."""
    done = subprocess.run(
        ["node", name, *arguments],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=SCRIPT_S,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
        got = script("atoma_generation.mjs", endpoint.root, CHAT, PAINTER, text, ATOMASDK_BEARER_AUTH=endpoint.api_key)
        assert (got["whole"], got["streamed"]) == (text, text)
        assert (got["usage"]["promptTokens"], got["usage"]["completionTokens"]) == (10, 7)
        assert got["finish"] == ["stop"] and got["events"] == 8
        assert got["image"] == "data:image/png;base64,"
        assert got["refused"] == {"kind": "APIError", "status": 400, "code": "confidential_refused"}
        assert endpoint.account().balance_nanousd == 10**11 - 2 * (10 * 1_000 + 7 * 3_000) - 5_000_000
