"""Rerank as people use it: the command, our clients, and the requests of applications, before a real gateway."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedmesh.client import AsyncClient, Client
from tests.examples import ROOT
from tests.story.endpoint import COMMAND, SETTLE_S, Endpoint, run, run_json, wait_until

FOLDERS = ROOT / "tests" / "engine" / "goldens" / "rerankers"
QUERY = "how do I send a parcel back?"
LINES = ["Our shops close at six.", "Hand it in at any post office.", "", "You have thirty days."]
DOCUMENTS = [line for line in LINES if line]
MANY = [f"passage {number} of many" for number in range(450)]
PAID = 'embedmesh_charged_nanousd_total{model="bge"}'


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """An endpoint with two small rerankers: `bge`, whose scores are from 0 to 1, and `marco`, paid by searches."""
    folder = tmp_path_factory.mktemp("ranks")
    bge = run("models", "inspect", FOLDERS / "xlm_roberta").stdout.decode()
    marco = run("models", "inspect", FOLDERS / "bert").stdout.decode()
    bge = bge.replace('id = "xlm_roberta"', 'id = "bge"\naliases = ["bge-reranker-base"]\nprice = 1_000_000')
    marco = marco.replace('id = "bert"', 'id = "marco"\nsearch_price = 500')
    (folder / "models.toml").write_text(bge + marco)
    one = Endpoint(folder / "data", "--catalogue", folder / "models.toml").wait_ready()
    try:
        yield one
        one.account()
        one.check_ledger()
        assert one.stop() == 0
    finally:
        one.kill_all()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "answers.txt"
    path.write_text("".join(line + "\n" for line in LINES))
    return path


def asked(ranks: Endpoint, **members: Any) -> list[tuple[int, float]]:
    """What `POST /v1/rerank` says."""
    reply = ranks.http.post(f"{ranks.base_url}/rerank", json={"model": "bge", "query": QUERY, **members})
    assert reply.status_code == 200, reply.text
    return [(each["index"], each["relevance_score"]) for each in reply.json()["results"]]


# -- the command -------------------------------------------------------------------------------------------------------


def test_lines_are_printed_best_first(ranks: Endpoint, file: Path) -> None:
    """In a pipe: score, tab, line. The same from standard input, of several files, and of JSON lines."""
    data = ("--data-dir", ranks.data_dir, "--model", "bge")
    best = asked(ranks, documents=DOCUMENTS)
    done = run("rerank", QUERY, file, *data)
    assert done.stdout.decode().splitlines() == [f"{score!r}\t{DOCUMENTS[at]}" for at, score in best]
    assert done.stderr.decode().startswith("3 documents, ")
    assert run("rerank", QUERY, "-", *data, stdin=file.read_bytes()).stdout == done.stdout

    lines = file.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"title": 1, "body": line}) + "\n" for line in DOCUMENTS))
    assert run("rerank", QUERY, lines, "--field", "body", *data).stdout == done.stdout
    both = run("rerank", QUERY, file, file, "--top-n", 2, *data).stdout.decode().splitlines()
    place = 1 + LINES.index(DOCUMENTS[best[0][0]])
    assert both == [f"{best[0][1]!r}\t{file}:{place}\t{DOCUMENTS[best[0][0]]}"] * 2


def test_in_a_terminal_each_line_has_a_bar(ranks: Endpoint, tmp_path: Path) -> None:
    """Nothing of a text is obeyed there, and of very many lines the first are enough."""
    file = tmp_path / "hostile.txt"
    file.write_text("\n".join(f"\x1b[2J[bold]{line}" for line in MANY[:301]))
    terminal, end = pty.openpty()
    command = [*COMMAND, "rerank", QUERY, str(file), "--model", "bge", "--data-dir", str(ranks.data_dir)]
    running = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=end, stderr=subprocess.PIPE, env=os.environ | {"COLUMNS": "80"}
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while piece := os.read(terminal, 4_096):
            shown += piece
    os.close(terminal)
    _, complained = running.communicate(timeout=30)
    assert running.returncode == 0
    rows = shown.decode().splitlines()
    assert len(rows) == 200
    assert all("█" in row and "[2J[bold]passage" in row for row in rows)
    assert b"\x1b[2J" not in shown
    assert complained.decode().startswith("... and 101 more")


def test_many_lines_are_several_requests_with_one_order(ranks: Endpoint, tmp_path: Path) -> None:
    """They cost what one request costs, also by searches."""
    file = tmp_path / "many.txt"
    file.write_text("\n".join(MANY))
    for model, searches in (("bge", None), ("marco", 5)):
        told = run_json("rerank", QUERY, file, "--data-dir", ranks.data_dir, "--model", model)
        best = asked(ranks, model=model, documents=MANY)
        assert [(each["index"], each["score"]) for each in told["results"]] == best
        assert [each["text"] for each in told["results"]] == [MANY[at] for at, _ in best]
        assert told["searches"] == searches
        assert told["cost_nanousd"] == (500 * 5 if searches else told["tokens"])


def test_scores_are_told_as_they_are_asked_for(ranks: Endpoint, file: Path) -> None:
    for model, options, members in (
        ("marco", (), {}),
        ("marco", ("--sigmoid",), {"raw_scores": False}),
        ("bge", ("--raw-scores", "--top-n", 2), {"raw_scores": True, "top_n": 2}),
    ):
        told = run_json("rerank", QUERY, file, "--data-dir", ranks.data_dir, "--model", model, *options)
        best = asked(ranks, model=model, documents=DOCUMENTS, **members)
        assert [(each["index"], each["score"]) for each in told["results"]] == best


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["file"], 78, "Several models rerank: "),
        (["file", "--model", "nothing"], 1, "There is no model of that name here"),
        (["file", "--model", "bge", "--url", "http://127.0.0.1:9/v1", "--api-key-file", "key"], 78, "Is the gateway"),
        (["long", "--model", "bge", "--truncate", "none"], 1, "long, line 2: "),
        (["absent", "--model", "bge"], 2, "absent cannot be read"),
        (["empty", "--model", "bge"], 2, "There is nothing to rank"),
        (["latin", "--model", "bge"], 2, "latin, line 1: the line is not UTF-8"),
        (["file", "--model", "bge", "--field", "x"], 2, "file, line 1: the line is not JSON"),
        (["long", "--model", "bge", "--top-n", "0"], 2, "--top-n"),
    ],
    ids=str,
)
def test_what_cannot_be_ranked_is_told_in_one_line(
    ranks: Endpoint, tmp_path: Path, given: list[str], code: int, says: str
) -> None:
    files = {
        "file": b"text\n",
        "long": b"short\n" + b"word " * 90,
        "empty": b"\n \n",
        "latin": b"\xe9\n",
        "key": b"em_x",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [*COMMAND, "rerank", "q", *given, "--data-dir", str(ranks.data_dir)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_finds_a_server_well_that_only_reranks(ranks: Endpoint) -> None:
    found = {check["name"]: check for check in run_json("doctor", "--data-dir", ranks.data_dir)["checks"]}
    assert found["rerank"]["state"] == "ok", found
    assert found["rerank"]["found"].startswith("2 scores, ")
    assert "embedding" not in found


def test_where_nothing_reranks_it_is_said_what_to_do(endpoint: Endpoint, file: Path) -> None:
    done = run("rerank", QUERY, file, "--data-dir", endpoint.data_dir)
    assert done.returncode == 78
    assert b"No model that reranks is served. Put one into the catalogue" in done.stderr


def test_ctrl_c_ends_it_silently(ranks: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "very-many.txt"
    file.write_text("\n".join(MANY * 100))
    before = ranks.metric(PAID)
    running = subprocess.Popen(
        [*COMMAND, "rerank", QUERY, str(file), "--model", "bge", "--data-dir", str(ranks.data_dir)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until("it has paid something", lambda: ranks.metric(PAID) > before, SETTLE_S)
    running.send_signal(signal.SIGINT)
    said, complained = running.communicate(timeout=30)
    assert (running.returncode, said, complained) == (130, b"", b"")


# -- clients -----------------------------------------------------------------------------------------------------------


async def test_both_clients_say_what_the_gateway_says(ranks: Endpoint) -> None:
    access: dict[str, Any] = {"base_url": ranks.base_url, "api_key": ranks.api_key}
    best = asked(ranks, documents=MANY)

    def blocking() -> Any:
        with Client(**access) as client:
            return client.rerank(QUERY, MANY, model="bge", batch_size=128, top_n=300)

    async with AsyncClient(**access) as client:
        waiting = await client.rerank(QUERY, (text for text in MANY), model="bge", truncate="none")
        by_search = await client.rerank(QUERY, MANY[:101], model="marco")
    told = await asyncio.to_thread(blocking)
    assert [(each.index, each.score) for each in waiting.results] == best
    assert [(each.index, each.score) for each in told.results] == best[:300]
    assert told.tokens == waiting.tokens == told.cost_nanousd == waiting.cost_nanousd
    assert (len(told.request_ids), len(waiting.request_ids), waiting.truncated) == (5, 1, 0)
    assert (by_search.searches, by_search.cost_nanousd) == (2, 1_000)


# -- applications ------------------------------------------------------------------------------------------------------


def test_what_applications_send_is_answered(ranks: Endpoint, endpoint: Endpoint) -> None:
    """The bodies of Open WebUI, RAGFlow and Dify, at the addresses that they make of what docs/how-to/apps.md says."""
    body = {"model": "bge-reranker-base", "query": QUERY, "documents": DOCUMENTS, "top_n": len(DOCUMENTS)}
    for path in ("/v1/rerank", "/rerank"):  # the second of an older RAGFlow
        results = ranks.http.post(ranks.root + path, json=body).json()["results"]
        assert [(each["index"], each["relevance_score"]) for each in results] == asked(ranks, documents=DOCUMENTS)
    texts, short = [*DOCUMENTS, "parcel " * 400], {"model": "all-MiniLM-L6-v2", "input": DOCUMENTS}
    for more in ({}, {"encoding_format": "float", "drop_params": True}):
        reply = endpoint.http.post(f"{endpoint.base_url}/embeddings", json=short | more)
        assert (reply.status_code, len(reply.json()["data"])) == (200, len(DOCUMENTS))
    told = endpoint.http.post(f"{endpoint.base_url}/embeddings", json=short | {"input": texts}).json()
    assert "the model takes at most 256" in told["error"]["message"]
    reply = endpoint.http.post(f"{endpoint.root}/api/embed", json=short | {"input": texts, "truncate": True})
    assert (reply.status_code, len(reply.json()["embeddings"])) == (200, len(texts))
