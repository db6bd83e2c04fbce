"""The packages of node/, as its lock file says, installed once by whichever process comes first."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "node"
MODULES = HERE / "node_modules"
INSTALL_S = 120.0  # five seconds here; npm's own retries are longer than anybody wants to wait
SCRIPT_S = 60.0
NATIVE = "blake2"  # of atoma-sdk, which cannot be imported without; compiling it wants C++ and Node's headers
BUILT = MODULES / NATIVE / "build" / "Release" / f"{NATIVE}.node"


def why_no_packages() -> str | None:
    """Have node_modules, without anybody's install scripts; what is in the way of that."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    lock, stamp = (HERE / "package-lock.json").read_bytes(), MODULES / ".of-this-lock"
    with _alone():
        if not stamp.exists() or stamp.read_bytes() != lock:
            if (problem := _npm("ci", "--ignore-scripts")) is not None:
                return f"the packages cannot be installed: {problem}"
            stamp.write_bytes(lock)
    return None


def why_no_native() -> str | None:
    """Have the native part of atoma-sdk; what is in the way of that."""
    with _alone():
        problem = None if BUILT.exists() else _npm("rebuild", NATIVE)
    return None if BUILT.exists() else f"{NATIVE}, which atoma-sdk needs, cannot be compiled: {problem}"


def script(name: str, *arguments: str, **environment: str) -> Any:
    """The JSON that a script of node/ prints; it must end well."""
    done = subprocess.run(
        ["node", name, *arguments],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=SCRIPT_S,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def _alone() -> Iterator[None]:
    with (HERE / "package.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _npm(*arguments: str) -> str | None:
    """Run npm here; None if it did well, else the end of what it said."""
    try:
        done = subprocess.run(
            ["npm", *arguments, "--no-audit", "--no-fund"],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            env=os.environ | _headers_of_node(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {INSTALL_S:.0f} s"
    return None if done.returncode == 0 else done.stderr.strip()[-400:] or f"exit code {done.returncode}"


def _headers_of_node() -> dict[str, str]:
    """Compile against the headers that came with Node, where they did, instead of fetching them."""
    prefix = Path(shutil.which("node") or "/usr/bin/node").resolve().parent.parent
    return {"npm_config_nodedir": str(prefix)} if (prefix / "include" / "node" / "node.h").exists() else {}
