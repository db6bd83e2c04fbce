"""The peers' own Python environments, `.bench/<peer>`, apart from each other and from ours.

Each has its lock (requirements/bench). Torch is not in them: where it comes from decides whether it brings gigabytes of
CUDA along, so it is installed first by its version alone, from wherever this machine's pip finds it (for a build
without CUDA set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL). A peer that does not install is named and left out.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
HOME = CHECKOUT / ".bench"
LOCKS = CHECKOUT / "requirements" / "bench"
TORCH = "torch==2.13.0"
NEED_TORCH = {"sentence-transformers", "infinity"}
INSTALL_S = 1_200.0  # of one step; half a minute from a local folder of wheels
STAMP = ".installed"  # has the hash of the lock that was installed
WORDS_MAX = 200  # of pip's last line

SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
"""MKL gives AVX-512 to CPUs whose vendor is Intel, and asks this function of its own who the vendor is."""


class NotInstalled(Exception):
    """Why a peer is left out, in words."""


def python_of(peer: str) -> Path:
    """The interpreter of an installed peer."""
    return HOME / peer / "bin" / "python"


def install(peer: str) -> None:
    """Make the peer's environment unless it is there already. Raises NotInstalled."""
    lock = LOCKS / f"{peer}.lock"
    stamp, wanted = HOME / peer / STAMP, hashlib.sha256(lock.read_bytes()).hexdigest() + TORCH
    if stamp.exists() and stamp.read_text() == wanted:
        return
    pip = [str(python_of(peer)), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    run_step([sys.executable, "-m", "venv", "--clear", str(HOME / peer)])
    if peer in NEED_TORCH:
        run_step([*pip, TORCH])
    run_step([*pip, "--require-hashes", "--no-deps", "-r", str(lock)])
    stamp.write_text(wanted)


def install_one(peer: str, requirement: str) -> None:
    """Make an environment with one pinned program, unless it is there already. Raises NotInstalled."""
    stamp = HOME / peer / requirement
    if stamp.exists():
        return
    run_step([sys.executable, "-m", "venv", "--clear", str(HOME / peer)])
    run_step([str(python_of(peer)), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", requirement])
    stamp.touch()


def build_shim() -> Path:
    """A library that, loaded before MKL, makes it use AVX-512 on any CPU that has it. Raises NotInstalled."""
    source, library = HOME / "mkl_avx512.c", HOME / "mkl_avx512.so"
    HOME.mkdir(exist_ok=True)
    source.write_text(SHIM)
    run_step(["cc", "-shared", "-fPIC", "-o", str(library), str(source)])
    return library


def onnx_folder(model: Path) -> Path:
    """`model` with an ONNX form of its weights, exported by sentence-transformers' torch. Raises NotInstalled."""
    folder = HOME / "onnx" / model.name
    if not (folder / "model.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in model.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        part = folder / "model.onnx.part"
        run_step(
            [str(python_of("sentence-transformers")), str(Path(__file__).with_name("export.py")), str(model), str(part)]
        )
        part.rename(folder / "model.onnx")
    return folder


def run_step(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{Path(command[0]).name}: {type(error).__name__}") from None
    if done.returncode:
        said = (done.stderr.strip() or "no words").splitlines()[-1]
        raise NotInstalled(f"{Path(command[0]).name} failed: {said[:WORDS_MAX]}")
