"""The pages on confidential requests: their programs run, and their tables have every reason and error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import embedmesh.client
from embedmesh.client.bulk.options import BulkOptions
from embedmesh.client.rerank import RerankOptions
from embedmesh.client.words import NODE_WORDS, REPLY_WORDS
from tests.client.gateway import KEY, ScriptedGateway

ROOT = Path(__file__).parent.parent.parent
HOW_TO = (ROOT / "docs" / "how-to" / "confidential.md").read_text("utf-8")
MANY_TEXTS = (ROOT / "docs" / "how-to" / "many-texts.md").read_text("utf-8")
RERANK = (ROOT / "docs" / "how-to" / "rerank.md").read_text("utf-8")
PROGRAMS = re.findall(r"```python\n(.+?)```", HOW_TO, re.S)


@pytest.mark.parametrize("program", PROGRAMS, ids=["sync", "async"])
def test_a_program_of_the_how_to_runs_as_it_is(
    gateway: ScriptedGateway, pins: Path, tmp_path: Path, program: str
) -> None:
    variables = {"EMBEDMESH_BASE_URL": gateway.base_url, "EMBEDMESH_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | variables, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    assert set(gateway.paths) == {"/nodes/lock", "/confidential/embeddings"}
    assert b"private" not in b"".join(one.raw for one in gateway.received)
    assert done.stdout.decode() in (f"2 6 {gateway.node.node_id}\n", "[4, 4, 4]\n")


def test_there_is_a_program_for_each_client() -> None:
    assert len(PROGRAMS) == 2


def test_the_how_to_has_every_reason_and_every_error() -> None:
    before, _, after = HOW_TO.partition("| reason, of a reply |")
    assert words(before.partition("| reason, before")[2]) >= NODE_WORDS.keys() | {"not_pinned"}
    assert words(after) >= REPLY_WORDS.keys()
    errors = {name for name in embedmesh.client.__all__ if is_error(name)}
    assert words(HOW_TO) | words(MANY_TEXTS) | words(RERANK) >= errors - {"NotTrusted"}


@pytest.mark.parametrize("program", re.findall(r"```python\n(.+?)```", MANY_TEXTS, re.S))
def test_a_program_for_many_texts_runs_as_it_is(gateway: ScriptedGateway, tmp_path: Path, program: str) -> None:
    (tmp_path / "texts.txt").write_text("".join(f"line {number}\n" for number in range(1_000)))
    variables = {"EMBEDMESH_BASE_URL": gateway.base_url, "EMBEDMESH_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | variables, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    assert sum(len(one.body["input"]) for one in gateway.received) == 1_000
    assert done.stdout.decode().splitlines()[-1] == "(1000, 4)"


def test_every_option_for_rerank_is_explained() -> None:
    assert words(RERANK) >= RerankOptions.__annotations__.keys()


def test_every_option_for_many_texts_is_explained() -> None:
    assert words(MANY_TEXTS) >= set(BulkOptions.__annotations__)


def words(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def is_error(name: str) -> bool:
    value = getattr(embedmesh.client, name)
    return isinstance(value, type) and issubclass(value, embedmesh.client.EmbedmeshError)


def test_the_words_on_the_sdks_scheme_are_there() -> None:
    """Nobody shall think that it keeps a gateway out."""
    page = (ROOT / "docs" / "confidential.md").read_text("utf-8")
    assert "protects against logs and curious storage, not against an active gateway" in page.replace("\n", " ")
    assert "canaries on ordinary work only" in page
