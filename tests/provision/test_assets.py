"""Set-up brings whole and right files or none, whatever goes wrong on the way. Real wheels, real pip, no network."""

import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from embedmesh.commands.setup import setup
from embedmesh.provision.assets import (
    ASSETS,
    CL100K,
    DEFAULT_MODEL_ASSET,
    Asset,
    AssetFile,
    fetch,
    find_cl100k,
    wrong_files,
)
from embedmesh.provision.wheels import Wheel
from embedmesh.rules.errors import SetupError
from tests.data import model_folder

CONTENTS = {"toy/big.bin": b"b" * 3_000_000, "toy/1_Sub/small.json": b"{}"}


def make_wheel(folder: Path, contents: dict[str, bytes] = CONTENTS) -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(exist_ok=True)
    path = folder / "embedmesh_toy-1.0-py3-none-any.whl"
    info = "embedmesh_toy-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        archive.writestr("toy/unwanted.py", b"1/0")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: embedmesh-toy\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def toy(wheel: Path, contents: dict[str, bytes] = CONTENTS) -> Asset:
    """The asset that the wheel carries."""
    raw = wheel.read_bytes()
    return Asset(
        name="toy",
        needed=True,
        wheel=Wheel("embedmesh-toy", "1.0", wheel.name, len(raw), hashlib.sha256(raw).hexdigest()),
        files=tuple(
            AssetFile(name, name.removeprefix("toy/"), len(content), hashlib.sha256(content).hexdigest())
            for name, content in contents.items()
        ),
    )


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}


def pip_finds(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Configure pip as a user may: no index, wheels from a folder."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.mark.story
def test_it_fetches_by_pip_only_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's own configuration is used; nothing but the named files stays; the second time there is nothing to do."""
    asset = toy(make_wheel(tmp_path / "wheels"))
    pip_finds(monkeypatch, tmp_path / "wheels")
    told: list[tuple[str, int, int]] = []
    folder = tmp_path / "assets"
    assert fetch(asset, folder, progress=lambda *step: told.append(step)) is True
    assert files_under(folder) == {"big.bin", "1_Sub/small.json"}
    assert wrong_files(asset, folder) == ()
    assert ("unpacking", 3_000_002, 3_000_002) in told
    assert all(0 <= done <= total for _, done, total in told)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch(asset, folder) is False


def test_it_takes_wheels_from_a_folder_and_mends_what_is_damaged(tmp_path: Path) -> None:
    """With --from nothing is downloaded; only wrong or missing files are written."""
    asset, folder = toy(make_wheel(tmp_path / "wheels")), tmp_path / "assets"
    fetch(asset, folder, wheels=tmp_path / "wheels")
    kept = (folder / "big.bin").stat().st_mtime_ns
    (folder / "1_Sub" / "small.json").write_bytes(b"[]")
    assert [file.path for file in wrong_files(asset, folder)] == ["1_Sub/small.json"]
    assert fetch(asset, folder, wheels=tmp_path / "wheels") is True
    assert (folder / "1_Sub" / "small.json").read_bytes() == b"{}"
    assert (folder / "big.bin").stat().st_mtime_ns == kept


@pytest.mark.parametrize("longer", [True, False])
def test_a_member_with_other_content_is_refused(tmp_path: Path, longer: bool) -> None:
    """Files before it stay, since they are right; it and its staging folder do not."""
    other = CONTENTS | {"toy/1_Sub/small.json": b"x" * 5_000_000 if longer else b"[]"}
    wheel = make_wheel(tmp_path / "wheels", other)
    asset = msgspec.structs.replace(toy(wheel), files=toy(wheel, CONTENTS).files)
    with pytest.raises(SetupError, match=r"small\.json in .* is not the expected file"):
        fetch(asset, tmp_path / "assets", wheels=tmp_path / "wheels")
    assert files_under(tmp_path / "assets") == {"big.bin"}


def test_a_wheel_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    """The message names the file and how to get it."""
    asset = toy(make_wheel(tmp_path / "wheels"))
    with pytest.raises(SetupError, match=r"is not in .*pip download .*embedmesh-toy==1\.0"):
        fetch(asset, tmp_path / "assets", wheels=tmp_path)
    make_wheel(tmp_path / "wheels", {"toy/other": b""})
    with pytest.raises(SetupError, match="is not the published file"):
        fetch(asset, tmp_path / "assets", wheels=tmp_path / "wheels")
    assert files_under(tmp_path / "assets") == set()


@pytest.mark.story
def test_pip_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong hash and an index without the wheel are told apart; nothing stays behind."""
    asset = toy(make_wheel(tmp_path / "wheels"))
    pip_finds(monkeypatch, tmp_path / "wheels")
    make_wheel(tmp_path / "wheels", {"toy/other": b""})
    with pytest.raises(SetupError, match="wrong SHA-256") as wrong:
        fetch(asset, tmp_path / "assets")
    pip_finds(monkeypatch, tmp_path / "empty")
    with pytest.raises(SetupError, match="out of reach or does not have it") as absent:
        fetch(asset, tmp_path / "assets")
    assert "\n" not in str(wrong.value) + str(absent.value)
    assert files_under(tmp_path / "assets") == set()


@pytest.mark.story
def test_ctrl_c_in_the_middle_of_a_download(tmp_path: Path) -> None:
    """With an index that never answers: it ends at once, takes pip with it and leaves no file."""
    make_wheel(tmp_path / "wheels")
    (tmp_path / "asset.json").write_bytes(
        msgspec.json.encode(toy(tmp_path / "wheels" / "embedmesh_toy-1.0-py3-none-any.whl"))
    )
    program = (
        "import sys, msgspec; from pathlib import Path; from embedmesh.provision.assets import Asset, fetch;"
        "fetch(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Asset), Path(sys.argv[2]))"
    )
    with socket.socket() as index:
        index.bind(("127.0.0.1", 0))
        index.listen()
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        environment = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": address, "PIP_NO_INDEX": "0"}
        command = [sys.executable, "-c", program, str(tmp_path / "asset.json"), str(tmp_path / "assets")]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        index.settimeout(10)
        connection, _ = index.accept()  # pip has asked
        with connection:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=5)
    assert process.returncode != 0
    assert files_under(tmp_path / "assets") == set()
    with pytest.raises(ProcessLookupError):  # nobody of its process group is left
        deadline = time.monotonic() + 10  # whoever adopts them has to have time to notice
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.01)


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    """A staging folder of a killed set-up does not stay for ever."""
    asset, folder = toy(make_wheel(tmp_path / "wheels")), tmp_path / "assets"
    (folder / ".fetch-dead").mkdir(parents=True)
    (folder / ".fetch-dead" / "part").write_bytes(b"x")
    fetch(asset, folder, wheels=tmp_path / "wheels")
    assert files_under(folder) == {"big.bin", "1_Sub/small.json"}


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """A failed write is one line and leaves no half file (here: the largest file that this process may write)."""
    asset, folder = toy(make_wheel(tmp_path / "wheels")), tmp_path / "assets"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(SetupError, match="cannot be written"):
            fetch(asset, folder, wheels=tmp_path / "wheels")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert files_under(folder) == set()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """One line that names the folder and the setting."""
    asset = toy(make_wheel(tmp_path / "wheels"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SetupError, match="EMBEDMESH_ASSETS_DIR"):
        fetch(asset, tmp_path / "file" / "assets", wheels=tmp_path / "wheels")


def test_setup_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its wheel the model is a set-up error."""
    monkeypatch.setenv("EMBEDMESH_ASSETS_DIR", str(tmp_path / "assets"))
    result = CliRunner().invoke(setup, ["--from", str(tmp_path)])
    assert isinstance(result.exception, SetupError) and DEFAULT_MODEL_ASSET.wheel.filename in str(result.exception)
    assert find_cl100k() is None


@pytest.mark.model
def test_a_second_setup_finds_all_there(tmp_path: Path) -> None:
    """Every byte is checked in less than half a second, and nothing is fetched."""
    folder = model_folder().parent
    if wrong_files(CL100K, folder):
        pytest.skip("the cl100k_base ranks are not here; run `embedmesh setup`")
    result = CliRunner().invoke(setup, ["--json"])
    said = json.loads(result.stdout)
    assert said["assets"] == [{"name": asset.name, "state": "already there"} for asset in ASSETS]
    assert said["seconds"] < 0.5


@pytest.mark.model
def test_without_the_ranks_setup_still_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are optional: their absence is told, with what it means."""
    (tmp_path / DEFAULT_MODEL_ASSET.name).symlink_to(model_folder())
    monkeypatch.setenv("EMBEDMESH_ASSETS_DIR", str(tmp_path))
    result = CliRunner().invoke(setup, ["--from", str(tmp_path)])
    assert result.exit_code == 0
    assert "cl100k_base: missing" in result.stdout and "token ids are refused" in result.stderr


def test_no_path_leaves_the_assets_folder() -> None:
    """The table is ours, and still: no absolute path, no `..`."""
    for asset in ASSETS:
        for file in asset.files:
            assert not Path(file.path).is_absolute() and ".." not in Path(file.path).parts
            assert len(file.sha256) == 64
