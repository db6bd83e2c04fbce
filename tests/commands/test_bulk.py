"""The plain decisions behind `embedmesh embed`: cutting lines, judging refusals, waiting, and whose key goes where."""

import asyncio
import hashlib
import os
import random
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.commands.bulk.client import Problem, Verdict, judge, read_problem, wait_s
from embedmesh.commands.bulk.lines import BATCH_BYTES_MAX, LINE_BYTES_MAX, Batch, Refusal, Splitter, read_batches
from embedmesh.commands.endpoint import find_endpoint
from embedmesh.rules.errors import SetupError
from tests.commands.edge import bootstrap


@given(st.lists(st.text("ab\r\n", max_size=9).map(str.encode), max_size=9))
def test_lines_do_not_depend_on_how_the_input_is_cut(chunks: list[bytes]) -> None:
    """Every line comes once and whole, and its digest is that of the input up to its end."""
    splitter = Splitter()
    told = [(line, splitter.digest) for chunk in chunks for line in splitter.feed(chunk)]
    told += [(line, splitter.digest) for line in splitter.end()]
    whole = b"".join(chunks)
    lines = [line + b"\n" for line in whole.split(b"\n")]
    lines[-1] = lines[-1].removesuffix(b"\n")
    expected = lines if lines[-1] else lines[:-1]
    assert [line for line, _ in told] == expected
    ends = [len(b"".join(expected[: i + 1])) for i in range(len(expected))]
    assert [digest for _, digest in told] == [hashlib.sha256(whole[:end]).hexdigest() for end in ends]


def batches_of(chunks: list[bytes], inputs_max: int) -> list[Batch]:
    async def source() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[Batch]:
        return [batch async for batch in read_batches(source(), field=None, inputs_max=inputs_max)]

    return asyncio.run(collect())


def test_batches_are_bounded_by_lines_and_by_bytes() -> None:
    """At most so many lines; a batch ends with the line that fills it."""
    short = batches_of([b"x\n" * 25], 10)
    assert [(batch.first, len(batch.lines)) for batch in short] == [(0, 10), (10, 10), (20, 5)]
    half = b"x" * (BATCH_BYTES_MAX // 2) + b"\n"
    assert [len(batch.lines) for batch in batches_of([half * 5], 10)] == [2, 2, 1]


def test_a_line_without_end_costs_no_memory() -> None:
    """A line of 80 MB is refused, the next is read, and neither is ever held whole."""
    chunk = b"x" * 262_144
    tracemalloc.start()
    [batch] = batches_of([*([chunk] * 320), b"\nnext\n"], 10)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(batch.lines[0], Refusal) and batch.lines[0].code == "line_too_long"
    assert batch.lines[1] == b'"next"'
    assert peak_bytes < 2 * LINE_BYTES_MAX


@pytest.mark.parametrize(
    "status, code, param, inputs, verdict",
    [
        (400, "context_length_exceeded", "input.3", 5, "line"),
        (400, "invalid_value", "input[0]", 1, "line"),
        (400, "invalid_value", "input.5", 5, "stop"),  # there is no such input: the two disagree about the request
        (400, "invalid_value", "input", 5, "split"),
        (400, "invalid_value", "input", 1, "line"),
        (400, "max_tokens_per_request", None, 2, "split"),
        (400, "max_tokens_per_request", None, 1, "line"),
        (413, "http_413", None, 2, "split"),
        (400, "invalid_value", "dimensions", 2, "stop"),
        (401, "invalid_api_key", None, 2, "stop"),
        (404, "model_not_found", "model", 2, "stop"),
        (409, "idempotency_conflict", None, 2, "stop"),
        (301, "http_301", None, 2, "stop"),
        (429, "rate_limit_exceeded", None, 2, "retry"),
        (429, "insufficient_quota", None, 2, "stop"),
        (408, "request_timeout", None, 2, "retry"),
        (500, "internal_error", None, 2, "retry"),
        (503, "no_node_available", None, 2, "retry"),
        (504, "deadline_exceeded", None, 2, "retry"),
    ],
)
def test_what_a_refusal_means(status: int, code: str, param: str | None, inputs: int, verdict: Verdict) -> None:
    """One line out, a smaller request, the same again, or the end."""
    problem = Problem(status, code, "no", param)
    assert judge(problem, {}, inputs) == verdict
    assert judge(problem, {"x-should-retry": "false"}, inputs) == "stop"


@pytest.mark.parametrize(
    "attempt, headers, low, high",
    [
        (0, {"retry-after-ms": "250", "Retry-After": "9"}, 0.25, 0.25),
        (0, {"Retry-After": "3"}, 3, 3),
        (0, {"Retry-After": "86400"}, 120, 120),
        (0, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.25, 0.5),
        (0, {"Retry-After": "nan"}, 0.25, 0.5),
        (0, {"Retry-After": "-5"}, 0.25, 0.5),
        (3, {}, 2, 4),
        (9, {}, 15, 30),
    ],
)
def test_how_long_it_waits(attempt: int, headers: dict[str, str], low: float, high: float) -> None:
    """What the server asks for, bounded; else twice as long each time, with dice."""
    for seed in range(20):
        assert low <= wait_s(attempt, headers, random.Random(seed)) <= high


@pytest.mark.parametrize(
    "body, code, message",
    [
        (b'{"error":{"message":"a\\u001b[2Jb","code":"c"}}', "c", "a[2Jb"),
        (b'{"error":{"message":"' + b"m" * 999 + b'"}}', "http_400", "m" * 300),
        (b"<html>", "http_400", "HTTP status 400"),
        (b"[" * 100_000, "http_400", "HTTP status 400"),
        (b"\xff", "http_400", "HTTP status 400"),
    ],
)
def test_an_error_is_repeated_with_care(body: bytes, code: str, message: str) -> None:
    """No control characters for the terminal, no novels, whatever a server answers."""
    problem = read_problem(400, body)
    assert (problem.code, problem.message) == (code, message)


HOME = "http://127.0.0.1:8080/v1"


@pytest.mark.parametrize(
    "url, environment, base_url, key",
    [
        (None, {}, HOME, "sk-home"),
        (HOME + "/", {}, HOME, "sk-home"),
        ("https://b.example/v1", {}, None, "No API key is known"),  # never the local key to another address
        (None, {"EMBEDMESH_BASE_URL": "https://b.example/v1"}, None, "No API key is known"),
        ("https://b.example/v1/", {"EMBEDMESH_API_KEY": "sk-b"}, "https://b.example/v1", "sk-b"),
        (HOME, {"EMBEDMESH_BASE_URL": "https://b.example/v1"}, HOME, "sk-home"),
        ("https://u:p@b.example/v1", {}, None, "must look like"),
        ("b.example/v1", {}, None, "must look like"),
        ("http://[::1/v1", {}, None, "must look like"),
        ("http://x:99999/v1", {}, None, "must look like"),
        (None, {"EMBEDMESH_API_KEY": "sk b\r\nX: y"}, None, "no key has"),
    ],
)
def test_which_endpoint_and_whose_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: str | None,
    environment: dict[str, str],
    base_url: str | None,
    key: str,
) -> None:
    """The command line wins over the environment, that over bootstrap.json; a refusal never shows a key."""
    data_dir = bootstrap(tmp_path / "data", HOME, "sk-home")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if base_url is None:
        with pytest.raises(SetupError, match=key) as refused:
            find_endpoint(url, None, data_dir)
        assert "sk" not in str(refused.value)
    else:
        found = find_endpoint(url, None, data_dir)
        assert (found.base_url, found.api_key) == (base_url, key)


def test_a_key_from_a_file(tmp_path: Path) -> None:
    """The file wins over all; one that cannot be read or holds no key is named."""
    data_dir, file = bootstrap(tmp_path / "data", HOME), tmp_path / "key"
    file.write_text("sk-file\n")
    assert find_endpoint(None, file, data_dir).api_key == "sk-file"
    file.write_bytes(os.urandom(40) + b"\xff")
    for bad, says in [(file, "no key file"), (tmp_path / "absent", "cannot be read")]:
        with pytest.raises(SetupError, match=says):
            find_endpoint(None, bad, data_dir)
    (data_dir / "bootstrap.json").write_text("{")
    with pytest.raises(SetupError, match="damaged"):
        find_endpoint(None, None, data_dir)
