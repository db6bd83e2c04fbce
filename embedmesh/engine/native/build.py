"""Building `encoder.c`: `python -m embedmesh.engine.native.build`. Installing does it, too, where there is a compiler.

It needs nothing but the standard library, because `hatch_build.py` runs it before anything is installed.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("encoder.c")
LIBRARY = Path(__file__).with_name("encoder.so")
COMPILERS = ("cc", "gcc", "clang")
OPTIONS = ("-std=c11", "-O3", "-mavx2", "-mfma", "-fPIC", "-shared", "-pthread", "-ffp-contract=off")
BUILD_S = 120.0  # a second or two, on a machine that is not busy


class CannotBuild(Exception):
    """Why there is no library, in words."""


def stamp() -> str:
    """What a library must say that it was built from: the source's hash."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def build(library: Path = LIBRARY) -> Path:
    """Compile the source to `library`; it is there whole or not at all. Raises CannotBuild."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise CannotBuild("the kernels are for Linux on x86-64")
    compiler = os.environ.get("CC") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        raise CannotBuild("there is no C compiler (cc)")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        define = f'-DEMBEDMESH_STAMP="{stamp()}"'
        command = [*compiler.split(), *OPTIONS, define, str(SOURCE), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotBuild(f"{compiler} did not run ({type(error).__name__})") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise CannotBuild(f"{compiler} failed: {lines[0][:200]}")
        made.replace(library)
    return library


if __name__ == "__main__":
    try:
        sys.stdout.write(f"built {build()}\n")
    except CannotBuild as why:
        sys.exit(f"not built: {why}")
