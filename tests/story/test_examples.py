"""Blocks of tutorials and how-to guides do what their pages say, run as they stand. tests/test_docs.py: which are not run."""

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from embedmesh.provision.assets import assets_dir
from tests.data import THOROUGH
from tests.examples import PAGES, ROOT, script_of
from tests.story.endpoint import MARK, Endpoint

FIXED = ("8443", "8444", "9091", "9095", "7997")  # ports that pages name; each run gets others
NEEDS_POSTGRES = re.compile(r"\b(psql|createdb|createuser|pg_dump)\b")
RUN_S = 280  # of the longest page, on a starved machine; half a minute alone
QUICK = {"a-watched-installation", "clients", "from-litellm", "tls"}  # the others are run by `make thorough`


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The gateway of pages that take a running one for granted."""
    one = Endpoint(tmp_path_factory.mktemp("asked") / "data").wait_ready()
    yield one
    one.kill_all()


def free_ports() -> dict[str, str]:
    from bench.rig.processes import free_port

    return {port: str(free_port()) for port in FIXED}


@pytest.mark.timeout(RUN_S + 20)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if script_of(page, {}) and (THOROUGH or page.stem in QUICK)], ids=lambda page: page.stem
)
def test_the_blocks_of_a_page_run(page: Path, asked: Endpoint, tmp_path: Path) -> None:
    given = {"http://127.0.0.1:8080/v1": "$BASE_URL", "em_…": "$API_KEY"} | free_ports()
    script = script_of(page, given)
    assert script is not None
    (tmp_path / "script.sh").write_text(script)
    (tmp_path / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n")
    (tmp_path / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDMESH_")}
    mark = uuid.uuid4().hex
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "work"),
        "CURL_HOME": str(tmp_path),
        "EMBEDMESH_ASSETS_DIR": str(assets_dir()),
        "EMBEDMESH_DATA_DIR": str(asked.data_dir),
        "EMBEDMESH_PORT": "0",
        "BASE_URL": asked.base_url,
        "API_KEY": asked.api_key,
        "ADMIN_KEY": asked.admin_key,
        MARK: mark,
    }
    with ExitStack() as stack:
        if NEEDS_POSTGRES.search(script):
            environment |= stack.enter_context(_postgres(environment["PATH"]))
        stack.callback(_kill_marked, mark)
        output = tmp_path / "output"
        with output.open("wb") as said:
            done = subprocess.run(
                ["bash", str(tmp_path / "script.sh")],
                cwd=tmp_path / "work",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=RUN_S,
                check=False,
            )
    assert done.returncode == 0, output.read_text()[-6_000:]


@contextmanager
def _postgres(path: str) -> Iterator[dict[str, str]]:
    """Variables by which PostgreSQL's own programs find a server of this test's own."""
    from bench.rig.postgres import serving, wheel

    with serving() as server:
        folder = re.search(r"host=([^&]+)", server.url("postgres"))
        assert folder is not None
        programs = Path(str(wheel.__file__)).parent / "pginstall" / "bin"
        yield {"PGHOST": folder[1], "PGUSER": "postgres", "PATH": f"{programs}:{path}"}


def _kill_marked(mark: str) -> None:
    """End whatever a script has left behind, wherever it belongs now."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ProcessLookupError):
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
