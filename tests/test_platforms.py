"""What differs between systems has a place and a fallback; and what is pinned, and for whom, is read right."""

import ast
import errno
import fcntl
import functools
import json
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import platforms
from bench.platforms import PlatformFigures, PlatformRow, built_for, needed, read_lock
from embedmesh import system
from embedmesh.engine import kernel
from embedmesh.storage.sqlite.driver import SQLITE_VERSION_MIN
from tests.data import CHECKOUT
from tests.engine.tiny import catalogue_entry, make_folder
from tests.node.live_node import write_catalogue

PACKAGE = CHECKOUT / "embedmesh"

# -- places ------------------------------------------------------------------------------------------------------------

PLACES = {
    r"ctypes": ("system.py", "engine/native/"),
    r"prctl|malloc_trim|mallopt": ("engine/worker.py", "engine/memory.py", "process.py"),  # through `system.call_c`
    r"/proc\b|/sys/": (
        *("engine/cpu.py", "engine/estimate.py", "engine/kernel.py", "engine/memory.py", "engine/threads.py"),
        *("engine/widened.py", "engine/worker.py", "process.py", "commands/checks.py"),
    ),
    r"sched_\w+|fdatasync|F_FULLFSYNC|TCP_KEEP\w+|RLIMIT_NOFILE": ("system.py", "http/connections.py"),
    r"TCP_NOTSENT_LOWAT": ("http/streaming.py",),
    r"ru_maxrss|getrusage|prlimit": (),  # bytes on macOS, kilobytes on Linux
    r"SO_REUSEPORT|SO_PEERCRED|SO_BINDTODEVICE|SCM_CREDENTIALS": (),
    r"epoll|kqueue|eventfd|memfd_create|signalfd|timerfd|inotify|pidfd|posix_fadvise|sync_file_range|splice": (),
    r"/dev/shm|O_DIRECT|O_TMPFILE|renameat2|copy_file_range|MADV_(?!DONTNEED)\w+|setns|unshare": (
        "engine/native/memory.py",
    ),
    r"sqlite3|pysqlite3": ("storage/sqlite/driver.py",),
}
"""Names that only some systems have, and the modules that may use them, since those do without as well."""


@functools.cache
def names_used() -> dict[str, set[str]]:
    """By module: names, attributes and texts of the code, docstrings left out."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        found[path.relative_to(PACKAGE).as_posix()] = set(_names(tree, prose))
    return found


def _names(tree: ast.AST, prose: set[int]) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(name) | ast.Attribute(attr=name) | ast.alias(name=name):
                yield name
            case ast.ImportFrom(module=str(name)):
                yield name
            case ast.Constant(value=str(text)) if id(node) not in prose and " " not in text:
                yield text  # a path, or a name for getattr; a sentence may say what it likes


@pytest.mark.parametrize("pattern", PLACES)
def test_what_only_some_systems_have_is_used_where_there_is_a_fallback(pattern: str) -> None:
    """A new place needs one, and a line in PLACES."""
    word = re.compile(rf"(?<![\w.])(?:{pattern})(?!\w)")
    found = {name for name, used in names_used().items() if any(word.search(each) for each in used)}
    assert {name for name in found if not name.startswith(PLACES[pattern])} == set()


def test_the_test_of_places_sees_a_new_one() -> None:
    """An attribute, an import and a path are seen; a sentence and a docstring are not."""
    code = '"""/proc is read."""\nimport ctypes\nos.eventfd(0)\nopen("/proc/self/stat")\nlog("all of /proc fails")\n'
    tree = ast.parse(code)
    assert isinstance(tree.body[0], ast.Expr)
    used = set(_names(tree, {id(tree.body[0].value)}))
    assert {"ctypes", "eventfd", "/proc/self/stat"} <= used and not any(
        "all of" in each or "read" in each for each in used
    )


# -- fallbacks ---------------------------------------------------------------------------------------------------------


def test_a_function_that_the_c_library_lacks_is_not_called() -> None:
    """As malloc_trim on macOS and musl."""
    system.call_c("a_function_that_no_library_has", 0)


@pytest.mark.parametrize("missing", [(), ("fdatasync",)])
def test_content_is_synced_whatever_the_system_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    """And a descriptor that is none is a failure, not a success."""
    for name in missing:
        monkeypatch.delattr(os, name)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x")
        system.sync_data(file.fileno())
        closed = os.dup(file.fileno())
    os.close(closed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        system.sync_data(closed)


@pytest.mark.parametrize(("number", "synced"), [(errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_full_sync_that_fails_is_a_failure_unless_the_file_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, synced: bool
) -> None:
    """macOS: F_FULLFSYNC is tried first."""

    def fails(descriptor: int, command: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fails)
    with (tmp_path / "file").open("wb") as file:
        if synced:
            system.sync_data(file.fileno())
        else:
            with pytest.raises(OSError, match="Input/output"):
                system.sync_data(file.fileno())


@pytest.mark.parametrize("missing", [(), ("TCP_KEEPIDLE",), ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")])
def test_connections_are_kept_alive_as_far_as_the_system_can(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    for name in missing:
        monkeypatch.delattr(socket, name)
    with socket.socket() as sock:
        system.keep_alive(sock, 20, 5, 3)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.parametrize("hard_max", [1 << 40, system.OPEN_FILES_MAX])
def test_the_limit_of_files_is_raised_as_far_as_the_system_lets_us(
    monkeypatch: pytest.MonkeyPatch, hard_max: int
) -> None:
    """macOS says that there is no hard limit, and refuses more than OPEN_MAX."""
    given: list[int] = []

    def set_limit(which: int, limits: tuple[int, int]) -> None:
        if limits[0] > hard_max:
            raise ValueError("current limit exceeds maximum limit")
        given.append(limits[0])

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1 << 30))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    system.raise_file_limit()
    assert given == [min(hard_max, 1 << 30)]


def test_without_proc_nothing_is_told_and_nothing_fails(tmp_path: Path) -> None:
    assert kernel.cpu_quota(tmp_path / "self", tmp_path) is None
    assert kernel.throttled(tmp_path / "self", tmp_path) == kernel.killed_for_memory(tmp_path, tmp_path) == 0


# -- missing packages --------------------------------------------------------------------------------------------------


def without(folder: Path, package: str) -> dict[str, str]:
    """The environment of a Python that lacks a package: a module of its name is found first, and says so."""
    (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('there is none', name={package!r})")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(CHECKOUT)])}


def test_a_gateway_needs_no_openvino(tmp_path: Path) -> None:
    """It is built of modules that import without it, and so are all commands."""
    program = "import embedmesh.cli, embedmesh.gateway.main, embedmesh.node.main, embedmesh.supervisor"
    subprocess.run([sys.executable, "-c", program], env=without(tmp_path, "openvino"), check=True, timeout=60)


def test_a_node_without_openvino_says_what_to_do(tmp_path: Path) -> None:
    """In one line, with the exit code for what a person must mend; it does not try again and again."""
    model = catalogue_entry(make_folder(tmp_path / "tiny"))
    catalogue = write_catalogue(tmp_path / "catalogue.toml", [model])
    command = [
        sys.executable,
        "-m",
        "embedmesh",
        "node",
        "--uds",
        str(tmp_path / "socket"),
        "--catalogue",
        str(catalogue),
    ]
    command += ["--data-dir", str(tmp_path / "data")]
    ran = subprocess.run(command, env=without(tmp_path, "openvino"), capture_output=True, text=True, timeout=60)
    assert ran.returncode == 78
    (line,) = (line for line in ran.stderr.splitlines() if line.startswith("embedmesh node:"))
    assert "has no OpenVINO" in line and "embedmesh gateway" in line and "Traceback" not in ran.stderr


def test_without_pysqlite3_the_store_takes_pythons_own_if_that_is_sound(tmp_path: Path) -> None:
    """By its version, which doctor says, and what to do where it is too old."""
    env = without(tmp_path, "pysqlite3")
    program = "from embedmesh.storage.sqlite.driver import driver, BRINGS; print(driver.__name__, BRINGS)"
    ran = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.split() == ["sqlite3.dbapi2", "Python"]
    command = [sys.executable, "-m", "embedmesh", "doctor", "--json", "--data-dir", str(tmp_path / "data")]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    (check,) = (check for check in json.loads(ran.stdout)["checks"] if check["name"] == "sqlite")
    version, sound = sqlite3.sqlite_version, sqlite3.sqlite_version_info >= SQLITE_VERSION_MIN
    assert check["state"] == ("ok" if sound else "fail") and f"{version} of Python" in check["found"]
    assert sound or "PostgreSQL" in check["todo"]


# -- pins --------------------------------------------------------------------------------------------------------------

LOCK = f"""aiohttp==3.14.5 \\
    --hash=sha256:{"a" * 64} \\
    --hash=sha256:{"b" * 64}
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:{"c" * 64}
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:{"d" * 64}
Py_SQLite3==0.6.1 ; platform_machine == 'x86_64' or sys_platform != 'linux' \\
    --hash=sha256:{"e" * 64}
tzdata==2026.6 ; sys_platform == 'win32' \\
    --hash=sha256:{"f" * 64}
"""


@pytest.mark.parametrize(
    ("platform", "python", "pins"),
    [
        ("Linux x86-64", "3.11", ["aiohttp 3.14.5", "numpy 2.4.6", "py-sqlite3 0.6.1"]),
        ("Linux aarch64", "3.12", ["aiohttp 3.14.5", "numpy 2.5.5"]),
        ("macOS arm64", "3.13", ["aiohttp 3.14.5", "numpy 2.5.5", "py-sqlite3 0.6.1"]),
    ],
)
def test_which_pins_a_platform_needs(platform: str, python: str, pins: list[str]) -> None:
    """By their markers, as they are for it and not for the machine that asks."""
    found = read_lock(LOCK)
    assert [len(pin.hashes) for pin in found] == [2, 1, 1, 1, 1]
    (asked,) = (each for each in platforms.platforms() if each.name == platform)
    assert [f"{pin.name} {pin.version}" for pin in needed(found, asked, python)] == pins


def test_the_real_lock_names_a_hash_for_each_pin_and_no_index() -> None:
    text = platforms.INSTALL_LOCK.read_text()
    pins = read_lock(text)
    assert len(pins) > 30 and all(pin.hashes for pin in pins)
    assert len(pins) == len(re.findall(r"^[A-Za-z]", text, re.M)), "a line was not understood"
    assert "://" not in text


@pytest.mark.parametrize(
    ("file", "system_"),
    [
        ("a-1-py3-none-any.whl", None),
        ("a-1-cp312-cp312-manylinux_2_28_x86_64.whl", ("glibc", 2, 28)),
        ("a-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", ("glibc", 2, 17)),
        ("a-1-cp312-cp312-manylinux1_x86_64.manylinux_2_28_x86_64.manylinux_2_5_x86_64.whl", ("glibc", 2, 5)),
        ("a-1-cp312-cp312-macosx_11_0_arm64.whl", ("macOS", 11, 0)),
        ("a-1-cp39-abi3-macosx_14_0_universal2.whl", ("macOS", 14, 0)),
    ],
)
def test_what_system_a_wheel_asks_for(file: str, system_: tuple[str, int, int] | None) -> None:
    assert built_for(file) == system_


def test_a_pin_without_a_wheel_breaks_the_promise() -> None:
    """And so does a wheel that the lock does not know."""
    good = PlatformRow(2, 2, "glibc 2.28", [], [])
    assert PlatformFigures({"a": good}).broken == []
    bad = PlatformRow(2, 1, "", ["b 1"], ["c"])
    assert PlatformFigures({"a": good, "z": bad}).broken == ["z: no wheel of b 1", "z: not in the lock: c"]
