"""Tiers: what a CPU must have, and that each is computed as it is named."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedmesh.engine import cpu, precision
from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import TIERS, Tier
from tests.engine.tiny import make_folder

CPUS = {
    "fpu sse2 avx2 fma": ("exact",),
    "fpu avx2 avx512f avx512bw": ("exact",),  # OpenVINO would imitate bfloat16 here
    "fpu avx512f avx512_vnni": ("exact", "int8"),
    "fpu avx2 avx_vnni": ("exact",),  # nobody has measured it
    "fpu avx2 avx_vnni avx512f avx512_bf16": ("exact", "fast"),
    "fpu avx512f avx512_vnni avx512_bf16": ("exact", "fast", "int8"),
    "fpu avx512f amx_bf16 amx_tile amx_int8": ("exact", "fast", "int8"),
}


def pretend(monkeypatch: pytest.MonkeyPatch, info: Path) -> None:
    """Have this file say what the CPU can do."""
    monkeypatch.setattr(cpu, "CPU_INFO", info)
    monkeypatch.setattr(precision, "cpu_flags", cpu.cpu_flags.__wrapped__)


@pytest.mark.parametrize("flags", CPUS)
def test_tiers_by_what_the_cpu_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """A tier is served only where its instructions are; elsewhere it is refused by name, in one line."""
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: avx512_bf16 avx512_vnni\nflags\t\t: {flags}\nbugs\t: none\n\n" * 2)
    pretend(monkeypatch, info)
    assert precision.tiers_here() == CPUS[flags]
    for tier in TIERS:
        if tier in CPUS[flags]:
            precision.check_cpu(tier)
        else:
            with pytest.raises(SetupError, match=f"'{tier}'.*erve the tier 'exact' here") as refused:
                precision.check_cpu(tier)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "rest", "says"),
    [
        ("fpu avx2 fma", "float32", "8-bit integer instructions .*slower than float32"),
        ("fpu avx2 fma", "bfloat16", "8-bit integer instructions .*slower than float32"),
        ("fpu avx512f avx512_vnni", "bfloat16", "no bfloat16 .*--rest float32"),
        ("fpu avx512f avx512_vnni", "float32", None),
        ("fpu avx512f avx512_vnni avx512_bf16", "bfloat16", None),
    ],
)
def test_int8_by_what_the_rest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, rest: precision.Rest, says: str | None
) -> None:
    """A folder whose rest is float32 needs no bfloat16; who lacks what is told what to do."""
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags\t\t: {flags}\n")
    pretend(monkeypatch, info)
    if says is None:
        precision.check_cpu("int8", rest)
    else:
        with pytest.raises(SetupError, match=f"{says}.*'exact' here"):
            precision.check_cpu("int8", rest)


def test_the_tiers_are_known_without_openvino() -> None:
    """`doctor` names them, and may not take half a second and 100 MB for it."""
    asked = "import sys, embedmesh.engine.precision as p; p.tiers_here(); print('openvino' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "False\n"


def test_an_unknown_cpu_serves_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing says what the CPU can do, nothing is assumed."""
    pretend(monkeypatch, tmp_path / "absent")
    assert precision.tiers_here() == ("exact",)


@pytest.mark.story
def test_fast_is_bfloat16(tmp_path: Path) -> None:
    """Vectors near the exact ones, but not nearer than bfloat16 products can be, and always the same."""
    if "fast" not in precision.tiers_here():
        pytest.skip("this CPU cannot run the tier 'fast'")
    folder = read_folder(make_folder(tmp_path / "tiny"))
    sequences = [[2, *range(4, 4 + count), 3] for count in (1, 7, 20)]
    tiers: tuple[Tier, ...] = ("exact", "fast", "fast")
    exact, fast, again = (CompiledModel(folder, 1, tier).run(sequences, 4, 24) for tier in tiers)
    assert 1e-5 < np.abs(exact - fast).max() < 0.05
    assert np.array_equal(fast, again)


@pytest.mark.story
def test_int8_needs_its_file(tmp_path: Path) -> None:
    if "int8" not in precision.tiers_here():
        pytest.skip("this CPU cannot run the tier 'int8'")
    with pytest.raises(SetupError, match=r"no int8\.json"):
        CompiledModel(read_folder(make_folder(tmp_path / "tiny")), 1, "int8")
