"""The plain decisions behind `embedmesh embed`: cutting lines, judging refusals, waiting, and whose key goes where."""

import asyncio
import csv
import hashlib
import io
import os
import random
import re
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.bulk.lines import (
    BATCH_BYTES_MAX,
    BOM,
    LINE_BYTES_MAX,
    ChunkReader,
    LineBatch,
    LineRecords,
    Refusal,
    Splitter,
)
from embedmesh.bulk.tables import CsvRecords, find_column
from embedmesh.client.access import find_access
from embedmesh.client.bulk.refusals import Verdict, judge, wait_s
from embedmesh.client.bulk.wire import BulkWire
from embedmesh.client.refusals import Problem, read_problem
from embedmesh.commands.bulk.client import BulkClient, Stopped
from embedmesh.commands.bulk.report import RunReport
from embedmesh.commands.endpoint import find_gateway
from embedmesh.commands.output import WrongUsage
from embedmesh.rules.errors import SetupError
from tests.commands.edge import Edge, bootstrap, failure


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


def batches_of(chunks: list[bytes], inputs_max: int, records: LineRecords | None = None) -> list[LineBatch]:
    async def source() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[LineBatch]:
        reader = ChunkReader(source(), records or LineRecords())
        return [batch async for batch in reader.batches(inputs_max=inputs_max)]

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
        (504, "deadline_exceeded", None, 2, "split"),  # "Send fewer or shorter inputs."
        (504, "deadline_exceeded", None, 1, "retry"),
        (504, "http_504", None, 2, "retry"),
        (400, "too_many_inputs", None, 2, "split"),
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
        (0, {"retry-after-ms": "250", "retry-after": "9"}, 0.25, 0.25),
        (0, {"retry-after": "3"}, 3, 3),
        (0, {"retry-after": "86400"}, 120, 120),
        (0, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.25, 0.5),
        (0, {"retry-after": "nan"}, 0.25, 0.5),
        (0, {"retry-after": "-5"}, 0.25, 0.5),
        (3, {}, 2, 4),
        (9, {}, 5, 10),
        (9, {"retry-after": "1"}, 1, 1),
        (10, {"retry-after": "1"}, 5, 10),
        (5_000, {}, 5, 10),
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
            find_gateway(url, None, data_dir, "api")
        assert "sk" not in str(refused.value)
    else:
        found = find_gateway(url, None, data_dir, "api")
        assert (found.base_url, found.key) == (base_url, key)


def test_a_key_from_a_file(tmp_path: Path) -> None:
    """The file wins over all; one that cannot be read or holds no key is named."""
    data_dir, file = bootstrap(tmp_path / "data", HOME), tmp_path / "key"
    file.write_text("sk-file\n")
    assert find_gateway(None, file, data_dir, "api").key == "sk-file"
    file.write_bytes(os.urandom(40) + b"\xff")
    for bad, says in [(file, "no key file"), (tmp_path / "absent", "cannot be read")]:
        with pytest.raises(SetupError, match=says):
            find_gateway(None, bad, data_dir, "api")
    (data_dir / "bootstrap.json").write_text("{")
    with pytest.raises(SetupError, match="damaged"):
        find_gateway(None, None, data_dir, "api")


CELLS = st.text(st.sampled_from('ab",;\n\r\té '), max_size=6)


@given(st.lists(st.tuples(CELLS, CELLS), max_size=6), st.integers(1, 7), st.booleans(), st.sampled_from(",\t"))
def test_csv_is_what_pythons_own_writer_wrote(
    rows: list[tuple[str, str]], cut: int, quoted: bool, delimiter: str
) -> None:
    """Line ends, quotes and delimiters in values, however the input is cut into chunks."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    writer.writerows([("id", "text"), *rows])
    content = BOM + text.getvalue().encode()
    chunks = [content[at : at + cut] for at in range(0, len(content), cut)]
    batches = batches_of(chunks, 4, CsvRecords(delimiter, None))
    texts = [orjson.loads(line) if isinstance(line, bytes) else "" for batch in batches for line in batch.lines]
    assert texts == [text for _, text in rows]
    assert [kept for batch in batches for kept in batch.kept] == [(kept,) for kept, _ in rows]
    assert all(batch.columns == ("id",) for batch in batches)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (b'1,"a\nb"\n', None),
        (b'1,a"b"c\n', None),
        (b'1,"a"b"c\n', None),
        (b"1,a,more\n", None),
        (b"1\n", "missing_field"),
        (b"1,\n", "empty_input"),
        (b"1,\xff\n", "not_utf8"),
        (b"1,a\rb,c\n", "invalid_csv"),
        (b'1,"' + b"x" * LINE_BYTES_MAX + b'"\n', "line_too_long"),
    ],
)
def test_a_row_that_cannot_be_read_does_not_stop_the_others(row: bytes, code: str | None) -> None:
    [batch] = batches_of([b"id,text\n\n", row, b"\r\n2,next\n"], 10, CsvRecords(",", None))
    refused = [line.code if isinstance(line, Refusal) else None for line in batch.lines]
    assert refused == [code, None] and batch.lines[1] == b'"next"' and batch.kept[1] == ("2",)


def test_a_quote_that_is_never_closed_costs_no_memory() -> None:
    """What follows is one row of 80 MB, which is refused and never held."""
    tracemalloc.start()
    chunks = [b'id,text\n1,"a\n', *([(b"x" * 9_999 + b"\n") * 26] * 320)]
    [batch] = batches_of(chunks, 10, CsvRecords(",", None))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line.code for line in batch.lines if isinstance(line, Refusal)] == ["line_too_long"]
    assert peak_bytes < 5 * LINE_BYTES_MAX


@pytest.mark.parametrize(
    ("columns", "asked", "found"),
    [
        (["id", "text"], None, 1),
        (["body"], None, 0),
        (["id", "body"], "body", 1),
        (["id", "body"], "0", 0),
        (["1", "0"], "0", 1),  # the name comes first
        (["id", "body"], None, "no column 'text'. Name one with --column: id, body"),
        (["id", "body"], "2", "no column '2'"),
        ([], None, "no column 'text'. Name one with --column: it has none"),
    ],
)
def test_which_column_is_embedded(columns: list[str], asked: str | None, found: int | str) -> None:
    if isinstance(found, int):
        assert find_column(columns, asked) == found
    else:
        with pytest.raises(WrongUsage, match=re.escape(found)):
            find_column(columns, asked)


class Heard:
    """Remembers what a client tells."""

    def __init__(self) -> None:
        self.waited: list[tuple[str, int]] = []

    def waiting(self, why: str, pause_s: float, requests: int) -> None:
        self.waited.append((why, requests))

    def paid(self, tokens: int, cost_nanousd: int) -> None:
        pass


async def asked_of(edge: Edge, heard: Heard, requests: int = 1, away_s: float = 0.0) -> float:
    """Embed in so many requests at once; the clock stands still but for pauses. Returns what it showed at the end."""
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > away_s > 0.0:
            edge.script = lambda asked: None
        await asyncio.sleep(0)

    wire = BulkWire(find_access(edge.base_url, "k", None), 60.0)
    client = BulkClient(
        wire.post, {"model": "m"}, observer=heard, dice=random.Random(3), sleep=sleep, clock=lambda: now
    )
    try:
        await asyncio.gather(*(client.embed([b'"a"']) for _ in range(requests)))
    finally:
        wire.close()
    return now


def test_it_outlasts_an_engine_s_restart_however_short_the_waits_that_are_asked_for(edge: Edge) -> None:
    """Ten minutes of "again in a second": hundreds of attempts would be too many, and ten too few."""
    edge.script = lambda asked: failure(503, "no_node_available", Retry_After="1")
    asyncio.run(asked_of(edge, Heard(), away_s=600.0))
    assert edge.answered == ["a"] and 60 < len(edge.asked) < 130


def test_it_does_not_wait_for_ever(edge: Edge) -> None:
    edge.script = lambda asked: failure(503, "no_node_available", "Nobody is there.", Retry_After="1")
    heard = Heard()
    with pytest.raises(Stopped, match=r"answered nothing for \d+ minutes: Nobody is there \(no_node_available\)"):
        asyncio.run(asked_of(edge, heard, requests=3))
    assert {1} <= {count for _, count in heard.waited} <= {1, 2, 3}  # once one was refused, fewer are sent


def test_one_line_tells_of_all_that_wait(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal it is said once; with one the line below the bar is that of now, and goes away."""
    report = RunReport(None, None)
    for count in (1, 2, 3):
        report.waiting("the server is busy (overloaded)", 3.0, count)
    assert capsys.readouterr().err == "the server is busy (overloaded); trying again in 3 s\n"
    report.waiting("the server is busy (overloaded)", 3.0, 4)
    shown = [str(each) for each in report.bar.get_renderables()][-1]
    assert shown == "the server is busy (overloaded); trying again in 3 s (4 requests waiting)"
    report.paid(1, 1)
    assert "waiting" not in [str(each) for each in report.bar.get_renderables()][-1]
