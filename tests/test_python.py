"""Which Python `make` sets up with, and how we say which one runs."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from embedmesh.process import is_profiled, python_in_words
from tests.data import CHECKOUT, THOROUGH

SCRIPT = Path(__file__).parents[1] / "requirements" / "python.sh"


@pytest.mark.parametrize(
    ("says", "chosen"),
    [
        ({"python3": "profiled", "python3.11": "profiled"}, "python3"),
        ({"python3": "plain", "python3.11": "plain", "python3.12": "profiled"}, "python3.12"),
        ({"python3.12": "profiled"}, "python3.12"),
        ({"python3": "plain", "python3.11": ""}, "python3"),
    ],
)
def test_make_takes_a_profiled_python_where_there_is_one(tmp_path: Path, says: dict[str, str], chosen: str) -> None:
    """By what each says of itself; one that is too old, or cannot make environments, says nothing."""
    for name, word in says.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho {word}\n" if word else "#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    script = SCRIPT.read_text().replace(" /usr/bin/python3;", ";")  # which this machine may have or not
    assert script != SCRIPT.read_text()
    found = subprocess.run(
        ["/bin/sh", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == chosen


def test_the_script_and_the_program_agree_on_this_python(tmp_path: Path) -> None:
    """They have the same rule, once in shell for a machine that has nothing yet."""
    (tmp_path / "python3.11").symlink_to(sys.executable)
    (tmp_path / "python3").write_text("#!/bin/sh\necho plain\n")
    (tmp_path / "python3").chmod(0o755)
    script = SCRIPT.read_text().replace(" /usr/bin/python3;", ";")
    found = subprocess.run(
        ["/bin/sh", "-c", script],
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (found.stdout.strip() == "python3.11") is is_profiled()


@pytest.mark.parametrize(
    ("build", "profiled"),
    [
        ({"CONFIG_ARGS": "'--prefix=/usr/local' '--enable-optimizations' '--with-lto'"}, True),
        ({"CONFIG_ARGS": "'--enable-shared'", "PGO_PROF_USE_FLAG": ""}, True),
        ({"CONFIG_ARGS": "'--enable-shared'", "PGO_PROF_USE_FLAG": "-fprofile-use -fprofile-correction"}, False),
        ({"CONFIG_ARGS": ""}, False),
        ({}, False),
    ],
    ids=["configured so", "Debian", "plain", "nothing said", "another system"],
)
def test_a_build_tells_whether_it_had_a_profile(build: dict[str, object], profiled: bool) -> None:
    assert is_profiled(build) is profiled


def test_the_python_that_runs_is_named_in_full() -> None:
    assert python_in_words().startswith(f"Python {platform.python_version()} with")


@pytest.mark.skipif(not THOROUGH, reason="two workers that wait for a test to be ended: `make thorough`")
def test_a_test_that_cannot_be_failed_is_named_and_the_run_ends(tmp_path: Path) -> None:
    """Its worker is ended, and is not replaced: the next one would run the same test, and the next."""
    hangs = "import signal, time\ndef test_it():\n    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
    (tmp_path / "test_hangs.py").write_text(f"{hangs}    time.sleep(1_000)\n")
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")
    given = ["-n", "2", "--dist", "loadfile", "-c", CHECKOUT / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
    given += ["-o", "timeout=1", "-o", "faulthandler_timeout=3", "-p", "no:cacheprovider", "-p", "no:schemathesis"]
    command = [sys.executable, "-m", "pytest", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "crashed while running" in done.stdout, done.stdout[-2_000:]
    assert "test_hangs.py::test_it" in done.stdout


def test_what_starts_a_node_imports_no_server_and_no_tls() -> None:
    """`embedmesh serve` starts its node once all that it needs itself is imported: half of that was an HTTP server."""
    heavy = ("aiohttp", "cryptography", "numpy", "tokenizers", "psycopg")
    script = f"import sys, embedmesh.supervisor; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
