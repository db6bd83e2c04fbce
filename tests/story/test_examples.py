"""Blocks of tutorials and how-to guides do what their pages say, run as they stand.

A page is one script, which runs while each of its blocks is waited for: a story of minutes, on a machine that is busy.
tests/test_docs.py says which blocks are not run.
"""

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from bench.rig.processes import free_port
from embedmesh.provision.assets import assets_dir
from tests.data import THOROUGH
from tests.examples import PAGES, ROOT, blocks_that_run, script_of
from tests.story.endpoint import MARK, Endpoint, wait_until

FIXED = ("8443", "8444", "9091", "9095", "7997")  # ports that pages name; each run gets others
NEEDS_POSTGRES = re.compile(r"\b(psql|createdb|createuser|pg_dump)\b")
BLOCK_S = 100.0  # of one block on a starved machine; it takes some seconds
SHOWN_CHARS = 6_000  # of what a script has said, when it fails
QUICK = {"a-watched-installation", "clients"}  # the others are run by `make thorough`
TRIED = [page for page in PAGES if blocks_that_run(page) and (THOROUGH or page.stem in QUICK)]


class RunningPage:
    """The script of a page, and what it has said so far."""

    def __init__(self, script: str, folder: Path, environment: dict[str, str]) -> None:
        (folder / "script.sh").write_text(script)
        (folder / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n")
        (folder / "work").mkdir()
        self._mark = uuid.uuid4().hex
        self._said = folder / "said"
        home = {"HOME": str(folder / "work"), "CURL_HOME": str(folder), MARK: self._mark}
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                ["bash", str(folder / "script.sh")],
                cwd=folder / "work",
                env=environment | home,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, block: str) -> None:
        """Until a block has ended well."""

        def has_ended() -> bool:
            return f"== {block} ended\n" in self._said.read_text() or self._process.poll() is not None

        try:
            wait_until(f"{block} has ended", has_ended, BLOCK_S)
            assert f"== {block} ended\n" in self._said.read_text()
        except AssertionError as failed:
            raise AssertionError(f"{failed}\n{self._said.read_text()[-SHOWN_CHARS:]}") from None

    def stop(self) -> None:
        """End it, and whatever it has left behind, wherever that belongs now."""
        with suppress(subprocess.TimeoutExpired):
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(BLOCK_S / 4)
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The gateway of pages that take a running one for granted."""
    one = Endpoint(tmp_path_factory.mktemp("asked") / "data").wait_ready()
    yield one
    one.kill_all()


@pytest.fixture(scope="module")
def running(asked: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], RunningPage]]:
    """The page whose script runs: one at a time, for all of its blocks."""
    now: dict[Path, RunningPage] = {}
    with ExitStack() as stack:

        def of(page: Path) -> RunningPage:
            if page not in now:
                stack.close()
                now.clear()
                now[page] = stack.enter_context(_run(page, asked, tmp_path_factory.mktemp(page.stem)))
            return now[page]

        yield of


@contextmanager
def _run(page: Path, asked: Endpoint, folder: Path) -> Iterator[RunningPage]:
    given = {"http://127.0.0.1:8080/v1": "$BASE_URL", "em_…": "$API_KEY"}
    script = script_of(page, given | {port: str(free_port()) for port in FIXED})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDMESH_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "EMBEDMESH_ASSETS_DIR": str(assets_dir()),
        "EMBEDMESH_DATA_DIR": str(asked.data_dir),
        "EMBEDMESH_PORT": "0",
        "BASE_URL": asked.base_url,
        "API_KEY": asked.api_key,
        "ADMIN_KEY": asked.admin_key,
    }
    with ExitStack() as stack:
        if NEEDS_POSTGRES.search(script):
            environment |= stack.enter_context(_postgres(environment["PATH"]))
        running = RunningPage(script, folder, environment)
        stack.callback(running.stop)
        yield running


@contextmanager
def _postgres(path: str) -> Iterator[dict[str, str]]:
    """Variables by which PostgreSQL's own programs find a server of this page's own."""
    from bench.rig.postgres import serving

    with serving() as server:
        folder = re.search(r"host=([^&]+)", server.url("postgres"))
        assert folder is not None
        programs = Path(f"/proc/{server.pid}/exe").resolve().parent  # of the server's own version
        yield {"PGHOST": folder[1], "PGUSER": "postgres", "PATH": f"{programs}:{path}"}


@pytest.mark.parametrize(
    ("page", "block"), [pytest.param(page, block, id=block) for page in TRIED for block in blocks_that_run(page)]
)
def test_a_block_runs(running: Callable[[Path], RunningPage], page: Path, block: str) -> None:
    running(page).wait_for(block)
