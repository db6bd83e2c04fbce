"""A model by its name: a local folder, or one that is fetched from a Hugging Face hub for the operator.

Only the files that a model is served from are taken: configs, tokenizer.json, safetensors, and an .onnx file where the
architecture needs it; never pickled weights, never code. They stay in a staging folder until all of them are there and
understood; a folder with its final name is whole. Only `embedmesh models fetch` calls this module, and nothing else
fetches models.
"""

import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from embedmesh.engine import layout
from embedmesh.engine.folder import read_folder
from embedmesh.engine.jsonfile import read_object
from embedmesh.engine.modules import MODULES_FILE
from embedmesh.engine.safetensors import WEIGHTS_INDEX_FILE
from embedmesh.rules.errors import SetupError

HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?)(@(?P<revision>[A-Za-z0-9][\w.-]{0,95}))?"
)
"""`organisation/model`, and if wanted `@` and a branch, a tag or a commit."""

COMMIT = re.compile(r"[0-9a-f]{40,64}")
PLAIN_FILE = re.compile(r"([A-Za-z0-9_][\w.-]*/){0,2}[A-Za-z0-9_][\w.-]*")
CONFIG_FILES = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    MODULES_FILE,
    layout.SENTENCES_FILE,
    WEIGHTS_INDEX_FILE,
    *layout.SENTENCE_FILES,
}
SAFETENSORS = re.compile(r"(^|/)model[^/]*\.safetensors$")
OTHER_RUNTIMES = {"onnx", "openvino", "coreml"}  # folders with copies of the configs for other programs
FETCH_THREADS = 4  # files at a time; more does not make one large file faster
HUB_TIMEOUT_S = 20.0  # for the hub's list of files
STAGING = ".fetch"


def find_model(name: str, *, models_dir: Path, offline: bool) -> Path:
    """The folder of the model `name`: a path, else a folder under `models_dir`, else fetched to there from the hub.

    `name` may end in `@` and a revision of the hub; it is part of the folder's name then. Raises SetupError in one line
    when there is no such model, when the hub fails or the model is not supported, and when it would have to be fetched
    although `offline` forbids it.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path.absolute()
    match = HUB_NAME.fullmatch(name)
    folder = models_dir.absolute() / name
    if match is not None and folder.is_dir():
        return folder
    if match is None or "/" not in name:
        raise SetupError(f"There is no model folder {name}, and it is no name of a hub either (organisation/model).")
    if offline:
        raise SetupError(
            f"The model {name} is not in {models_dir}, and offline mode forbids to fetch it. Copy its folder there, or "
            "fetch it on a machine that is online."
        )
    try:
        _fetch(match["repo"], match["revision"], folder, models_dir.absolute())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise SetupError(
            f"The disk is full: {name} cannot be fetched. Free some space and try again."
            if full
            else f"{models_dir} cannot be written ({error.strerror or type(error).__name__}). Correct its permissions."
        ) from None
    return folder


def _fetch(repo: str, revision: str | None, folder: Path, models_dir: Path) -> None:
    """Fetch into a staging folder, check, and move. Interrupted, the next call goes on where this one ended."""
    staging = models_dir / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():  # another process brought it while we waited
            return
        snapshot = _Snapshot(repo, revision, staging, folder.relative_to(models_dir).as_posix().replace("/", "--"))
        paths = map(PurePosixPath, snapshot.files)
        snapshot.take(str(path) for path in paths if path.name in CONFIG_FILES and path.parts[0] not in OTHER_RUNTIMES)
        try:
            _take_weights(snapshot)
            layout.check_weights(snapshot.folder, read_folder(snapshot.folder).transformer)
        except _NotFetched:
            raise
        except SetupError:
            shutil.rmtree(snapshot.folder)  # it will not be understood next time either
            raise
        shutil.rmtree(snapshot.folder / ".cache", ignore_errors=True)  # the hub's own notes on the download
        os.sync()  # before the name says that it is whole
        folder.parent.mkdir(parents=True, exist_ok=True)
        snapshot.folder.rename(folder)


def _take_weights(snapshot: "_Snapshot") -> None:
    """Safetensors of all modules; an .onnx file where the transformer has none or its architecture is foreign."""
    first, static = layout.find_first(snapshot.folder)
    folders = {folder.relative_to(snapshot.folder).as_posix() for folder in layout.module_folders(snapshot.folder)}
    weights = [name for name in snapshot.files if SAFETENSORS.search(name) and _parent(name) in folders]
    at = first.relative_to(snapshot.folder)
    known = static or read_object(first / "config.json").get("model_type") in layout.ARCHITECTURES
    if not known or not any(_parent(name) == at.as_posix() for name in weights):
        weights = [name for name in weights if _parent(name) != at.as_posix()]
        onnx = next(
            ((at / name).as_posix() for name in layout.ONNX_FILES if (at / name).as_posix() in snapshot.files), None
        )
        weights += [name for name in snapshot.files if onnx is not None and name.startswith(onnx)]
    snapshot.take(weights)


def _parent(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


class _NotFetched(SetupError):
    """The hub failed; files that were fetched already stay for the next try."""


class _Snapshot:
    """One revision of a model on the hub, and its files that are here already. Imports the library at first use."""

    def __init__(self, repo: str, revision: str | None, staging: Path, name: str) -> None:
        """Get the list of files; `name` is that of their folder. Raises SetupError."""
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars

        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
        if not sys.stderr.isatty():
            disable_progress_bars()
        self._repo = repo
        info: Any = self._call(huggingface_hub.HfApi().model_info, repo, revision=revision, timeout=HUB_TIMEOUT_S)
        self._commit = str(info.sha)
        if not COMMIT.fullmatch(self._commit):
            raise _NotFetched(f"The model {repo} cannot be fetched: the hub does not say which commit it has.")
        self.folder = staging / self._commit / name
        for other in set(staging.glob(f"*/{name}")) - {self.folder}:
            shutil.rmtree(other)  # what is left of an older commit; files of two must not mix
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files = sorted(one.rfilename for one in info.siblings or () if PLAIN_FILE.fullmatch(one.rfilename))

    def take(self, names: Iterable[str]) -> None:
        """Fetch files, each whole or not at all; those that are here already are not fetched again."""
        import huggingface_hub

        if wanted := list(names):
            self._call(
                huggingface_hub.snapshot_download,
                self._repo,
                revision=self._commit,
                local_dir=self.folder,
                allow_patterns=wanted,  # PLAIN_FILE has no character that is more than itself in a pattern
                max_workers=FETCH_THREADS,
            )

    def _call(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """Call the library, and turn its errors into ours."""
        from huggingface_hub import errors

        try:
            return call(*arguments, **options)
        except errors.GatedRepoError:
            why = "it is gated: accept its terms on the hub, and set HF_TOKEN"
        except errors.RepositoryNotFoundError:
            why = "the hub has no such model, or HF_TOKEN gives no access to it"
        except errors.RevisionNotFoundError:
            why = "the hub has no such revision of it"
        except errors.OfflineModeIsEnabled:
            why = "HF_HUB_OFFLINE forbids it"
        except errors.HfHubHTTPError as error:
            why = f"the hub answered {error.response.status_code}; try again later"
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = f"the hub cannot be reached ({type(error).__name__}); check the network, or copy the folder here"
        raise _NotFetched(f"The model {self._repo} cannot be fetched: {why}.")
