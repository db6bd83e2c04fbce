"""openai-python's own tests of embeddings, from its sdist, against a live endpoint.

Changed is only what says where and who: the address (by its own TEST_API_BASE_URL), the key, and in our catalogue an
alias, since its tests name one of OpenAI's models.

Left out are those that check strictly and leave `encoding_format` to the client: it then asks for base64, and its
strict check wants a list of floats before it has decoded it. They pass only where a server ignores what is asked.
"""

import os
import re
import subprocess
import sys
import tarfile
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.data import CHECKOUT, model_folder
from tests.story.conftest import Serve

DOWNLOAD_S = 60.0  # two seconds here
RUN_S = 60.0
SAFE: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python has it from 3.11.4 on
NEEDED = (
    "tests/__init__.py",
    "tests/conftest.py",
    "tests/utils.py",
    "tests/respx2/",
    "tests/api_resources/__init__.py",
)
ITS_TESTS = "tests/api_resources/test_embeddings.py"
ITS_KEY = 'api_key = "My API Key"'
ITS_MODEL = "text-embedding-3-small"
CAN_PASS = "loose or with_all_params"
ITS_SETTINGS = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = session\n"


@pytest.fixture(scope="module")
def sdist(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the locked version, its hash checked by pip, in pytest's cache. Skips where it cannot be had."""
    locked = re.search(r"^openai==(\S+)(?: \\\n +--hash=\S+)+", (CHECKOUT / "requirements/dev.lock").read_text(), re.M)
    assert locked is not None
    assert pytestconfig.cache is not None
    file = pytestconfig.cache.mkdir("sdists") / f"openai-{locked[1]}.tar.gz"
    if not file.exists():
        wanted = tmp_path_factory.mktemp("sdist") / "wanted.txt"
        wanted.write_text(locked[0] + "\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--require-hashes"]
        command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(file.parent)]
        done = subprocess.run(
            [*command, "-r", str(wanted)], capture_output=True, text=True, timeout=DOWNLOAD_S, check=False
        )
        if done.returncode != 0 or not file.exists():
            pytest.skip(f"the sdist of openai {locked[1]} cannot be had: {done.stderr.strip()[-300:]}")
    return file


@pytest.fixture
def unpacked(sdist: Path, tmp_path: Path) -> Path:
    """Its tests of embeddings and what they import, with our key."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.isfile() and member.name.startswith((*NEEDED, ITS_TESTS)):
                archive.extract(member, tmp_path, **SAFE)
    conftest = tmp_path / "tests/conftest.py"
    assert ITS_KEY in conftest.read_text()
    conftest.write_text(conftest.read_text().replace(ITS_KEY, 'api_key = os.environ["OPENAI_API_KEY"]'))
    (tmp_path / "pytest.ini").write_text(ITS_SETTINGS)
    return tmp_path


def test_its_own_tests_pass(unpacked: Path, serve: Serve, tmp_path: Path) -> None:
    """Synchronous and asynchronous, loose, strict and over aiohttp, raw and streamed, with and without all members."""
    catalogue = tmp_path / "models.toml"
    ours = (resources.files("embedmesh") / "data/catalogue.toml").read_text()
    ours = re.sub(r"aliases = .*", f'aliases = ["{ITS_MODEL}"]', ours)
    catalogue.write_text(re.sub(r"folder = .*", f'folder = "{model_folder()}"', ours))
    endpoint = serve("--catalogue", catalogue).wait_ready()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", CAN_PASS, ITS_TESTS],
        cwd=unpacked,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        env=os.environ | {"TEST_API_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": endpoint.api_key},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b11 passed", done.stdout), done.stdout[-300:]
    assert endpoint.stop() == 0
