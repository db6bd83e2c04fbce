"""An edge for each test, and an environment without EMBEDMESH_ variables."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from embedmesh.commands.group import cli
from tests.commands.edge import Edge, bootstrap

WIDE = {"COLUMNS": "240"}  # a terminal in which every table has a row a line
STORE_ONLY = ("store", "doctor")  # commands that have no --offline: they never need a gateway


def run_offline(data_dir: Path) -> Callable[..., Result]:
    """`embedmesh WORDS` on a store that no gateway serves, in this process."""

    def run(*words: object) -> Result:
        offline = [] if words[0] in STORE_ONLY else ["--offline"]
        return CliRunner(env=WIDE).invoke(cli, [*map(str, words), *offline, "--data-dir", str(data_dir)])

    return run


@pytest.fixture
def edge() -> Iterator[Edge]:
    with Edge().running() as running:
        yield running


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EMBEDMESH_") and name != "EMBEDMESH_ASSETS_DIR"]:
        monkeypatch.delenv(name)


@pytest.fixture
def embed(edge: Edge, tmp_path: Path) -> Callable[..., Result]:
    """`embedmesh embed` in this process, with the edge's address in bootstrap.json."""
    from embedmesh.commands.embed import embed as command

    data_dir = bootstrap(tmp_path / "data", edge.base_url)

    def run(*arguments: object) -> Result:
        given = [str(argument) for argument in (*arguments, "--data-dir", data_dir)]
        return CliRunner().invoke(command, given)

    return run
