"""`embedmesh embed` into a database: killed and run again, each row is there once."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psycopg
import pytest

from bench.rig.postgres import PostgresServer
from embedmesh.bulk.sinks import job_output, sink_for
from embedmesh.bulk.units import UNIT_TEXTS_MAX
from embedmesh.commands.embed import embed as embed_command
from tests.commands.edge import Edge, bootstrap, start, vector_of
from tests.commands.test_embed_process import wait_until
from tests.commands.test_job import MANY, jsonl
from tests.commands.texts import Embed
from tests.test_docs import ROOT


@pytest.fixture
def shop(postgres: PostgresServer) -> Iterator[str]:
    """The address of a database with pgvector."""
    url = postgres.new()
    with psycopg.connect(url) as session:
        session.execute("CREATE EXTENSION vector")
    yield url
    postgres.drop(url)


def test_a_killed_job_goes_on_in_the_database(edge: Edge, embed: Embed, tmp_path: Path, shop: str) -> None:
    """kill -9 after the first of three units; then all rows are there with their own vectors, none paid twice."""
    file, data_dir = jsonl(tmp_path / "in.jsonl", MANY), bootstrap(tmp_path / "data", edge.base_url)
    manifest = tmp_path / "manifest.jsonl"
    command = (file, "-o", f"pgvector:{shop}&table=docs&text=body", "--id", "id", "--manifest", manifest)
    edge.holds_back = lambda asked: asked.texts[0] not in MANY[:UNIT_TEXTS_MAX]
    process = start("embed", *map(str, command), "--data-dir", str(data_dir))
    wait_until(lambda: manifest.exists() and manifest.read_bytes().count(b"\n") == 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    edge.holds_back = lambda asked: False
    result = embed(*command)
    assert result.exit_code == 0, result.output
    assert sorted(edge.answered) == sorted(MANY)
    with psycopg.connect(shop) as session:
        found = session.execute("SELECT id, embedding::real[], metadata FROM docs").fetchall()
    rows = {key: (vector, metadata) for key, vector, metadata in found}
    assert len(found) == len(rows) == len(MANY)
    for at, text in enumerate(MANY):
        vector, metadata = rows[f"r{at}"]
        assert np.array_equal(np.float32(vector), vector_of(text))
        assert metadata == {"n": at, "body": text}
    assert embed(*command).exit_code == 0
    with psycopg.connect(shop) as session:
        session.execute("DROP TABLE docs")
    gone = embed(*command)
    assert gone.exit_code == 3 and "was dropped during the job" in gone.stderr


def test_what_cannot_go_there_is_refused_before_anything_is_paid(
    edge: Edge, embed: Embed, tmp_path: Path, shop: str
) -> None:
    """No ids; a password; vectors of another width, where the server tells which it has."""
    from aiohttp import web

    file = jsonl(tmp_path / "in.jsonl", ["one"])
    output, noted = f"pgvector:{shop}&table=docs", ("--manifest", tmp_path / "manifest.jsonl")
    told = {"id": "all-MiniLM-L6-v2", "width": 4}
    edge.routes["/v1/models/sentence-transformers/all-MiniLM-L6-v2"] = web.Response(
        text=json.dumps(told), content_type="application/json"
    )
    with psycopg.connect(shop) as session:
        session.execute("CREATE TABLE docs (id text PRIMARY KEY, embedding vector(384))")
    for words, arguments in {
        "name the input's column of ids with --id": (output,),
        "PGPASSWORD": ("pgvector:postgresql://me:hunter2@host/db?table=docs", "--id", "id"),
        "vectors of 384 components, and these have 4": (output, "--id", "id"),
        "must look like": ("qdrant:docs", "--id", "id"),
    }.items():
        result = embed(file, *noted, "-o", *arguments)
        assert result.exit_code == 2 and words in result.stderr, result.output
        assert "hunter2" not in result.output
    assert edge.asked == []


PAGES = [ROOT / "docs" / page for page in ("how-to/sinks.md", "tutorial/a-million-texts.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_can_be_given(page: Path) -> None:
    """Each option and each output that they show is one."""
    commands = re.findall(r"^\$ embedmesh embed (.+)", page.read_text("utf-8"), re.M)
    assert commands
    for command in commands:
        given = embed_command.make_context("embed", shlex.split(command)).params
        assert job_output(given["output"]) is not None
        if ":" in given["output"]:
            sink_for(given["output"])


def test_the_texts_of_the_tutorial(tmp_path: Path) -> None:
    program, reading = re.findall(r"```python\n(.+?)```", PAGES[1].read_text("utf-8"), re.S)
    made = subprocess.run([sys.executable, "-c", program, "2100"], capture_output=True, check=True).stdout
    assert [json.loads(line)["id"] for line in made.splitlines()] == [f"doc-{number}" for number in range(2_100)]
    compile(reading, "reading", "exec")
