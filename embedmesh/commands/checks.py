"""What `embedmesh doctor` checks, one function a thing: what it found and, where it is not well, what to do.

Nothing is changed, and nothing leaves this machine except the requests to the endpoint of bootstrap.json.
"""

import platform
import shutil
import socket
import stat
import sys
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from embedmesh.catalogue import load_catalogue
from embedmesh.commands.key_limits import in_words
from embedmesh.engine.folder import digest, read_folder
from embedmesh.engine.precision import missing_here, tiers_here
from embedmesh.engine.reranker import check_scores
from embedmesh.engine.runtime import ENGINE_NAMES, choose_engine
from embedmesh.engine.threads import engine_threads
from embedmesh.process import beyond_loopback, is_profiled
from embedmesh.provision.assets import ASSETS, assets_dir, wrong_files
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from embedmesh.signing.public_lines import PUBLIC_SUFFIX
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.books.new_keys import LIMITS_EXAMPLE, NewKeys
from embedmesh.storage.sqlite.driver import BRINGS, REMEDIES, check_version, driver

State = Literal["ok", "warn", "fail"]

MEMORY_FAIL_BYTES = 512 * 1024 * 1024  # a gateway (120 MB) and a node (320 MB) do not fit
MEMORY_WARN_BYTES = 1024 * 1024 * 1024  # they fit, with nothing to spare for bursts
DISK_FAIL_BYTES = 100 * 1024 * 1024  # the store could soon not write a hold
DISK_WARN_BYTES = 1024 * 1024 * 1024
PYTHON_MIN = (3, 11)


class HealthCheck(msgspec.Struct, frozen=True):
    """One thing that was checked. `todo` is empty where it is well."""

    name: str
    state: State
    found: str
    todo: str = ""


def check_python(version: tuple[int, ...] = sys.version_info[:3], *, profiled: bool | None = None) -> HealthCheck:
    """PYTHON_MIN is the oldest that we are tested with. Without a profile (PGO) it works as well, only slower."""
    profiled = is_profiled() if profiled is None else profiled
    found = ".".join(map(str, version)) + (" with PGO" if profiled else " without PGO: a request costs a fifth more")
    if version < PYTHON_MIN:
        return HealthCheck("python", "fail", found, "Install Python 3.11 or newer and make a new environment.")
    return HealthCheck("python", "ok", found)


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> HealthCheck:
    """Which vector instructions there are: they decide the speed, nothing else."""
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        return HealthCheck("cpu", "ok", platform.machine())
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "BF16", "avx512_vnni": "VNNI", "amx_tile": "AMX"}
    found = " ".join(word for flag, word in known.items() if flag in flags) or platform.machine()
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        return HealthCheck("cpu", "warn", found, "It works, slowly: without AVX2 expect a quarter of the usual speed.")
    return HealthCheck("cpu", "ok", found)


def check_threads() -> HealthCheck:
    """How many threads an engine started here and now would have."""
    return HealthCheck("threads", "ok", str(engine_threads()))


def check_engine() -> HealthCheck:
    """What runs models of BERT's kind in the tier exact here, and why."""
    try:
        engine, why = choose_engine()
    except SetupError as error:
        return HealthCheck("engine", "fail", str(error), "Correct it, or leave it unset.")
    return HealthCheck("engine", "ok", f"{ENGINE_NAMES[engine]}: {why}")


def check_tiers() -> HealthCheck:
    """Which precisions can be served here, and what the CPU lacks for the others: no fault, exact is always there."""
    lacking = [f"{tier} would need {missing}" for tier, missing in missing_here().items()]
    return HealthCheck("tiers", "ok", "; ".join([" ".join(tiers_here()), *lacking]))


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> HealthCheck:
    """What could be had now without swapping."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return HealthCheck("memory", "ok", "not known on this system")
    return _room(
        "memory",
        available,
        f"{available / 1e9:.1f} GB available",
        (MEMORY_FAIL_BYTES, "A gateway and a node need 0.5 GB. End other programs or add memory."),
        (MEMORY_WARN_BYTES, "Just enough for a gateway and a node; 1 GB is comfortable."),
    )


def check_disk(data_dir: Path) -> HealthCheck:
    """Room where the store is, or will be."""
    usage = shutil.disk_usage(_existing(data_dir))
    if usage.total == 0:  # no disk at all, such as /proc; the check of the data folder explains it
        return HealthCheck("disk", "ok", f"not known for {data_dir}")
    return _room(
        "disk",
        usage.free,
        f"{usage.free / 1e9:.1f} GB free at {data_dir}",
        (DISK_FAIL_BYTES, "Free some space, or choose --data-dir on another disk."),
        (DISK_WARN_BYTES, "The store grows with every request. Free some space soon."),
    )


def check_sqlite() -> HealthCheck:
    """The SQLite that the store uses: pysqlite3's, or Python's own where there is none."""
    found = f"{driver.sqlite_version} of {BRINGS}"
    try:
        check_version()
    except SetupError:
        return HealthCheck("sqlite", "fail", f"{found} may corrupt the store", REMEDIES[BRINGS])
    return HealthCheck("sqlite", "ok", found)


def check_assets() -> list[HealthCheck]:
    """What set-up fetches, every byte of it."""
    folder = assets_dir()
    checks = []
    for asset in ASSETS:
        wrong = wrong_files(asset, folder)
        if not wrong:
            checks.append(HealthCheck(asset.name, "ok", "present, hashes right"))
            continue
        there = [file.path for file in wrong if (folder / file.path).exists()]
        found = f"damaged: {', '.join(there)}" if there else "not fetched"
        todo = "Run `embedmesh setup`." if asset.needed else "Run `embedmesh setup`; until then token ids are refused."
        checks.append(HealthCheck(asset.name, "fail" if asset.needed else "warn", found, todo))
    return checks


def check_catalogue(file: Path) -> list[HealthCheck]:
    """The operator's catalogue, and each model's folder against the digest that is written there."""
    try:
        models = load_catalogue(file, assets=assets_dir()).models
    except SetupError as error:
        return [
            HealthCheck("catalogue", "fail", str(error), "Mend the file; docs/reference/catalogue.md describes it.")
        ]
    return [HealthCheck("catalogue", "ok", f"{len(models)} models"), *map(_check_model, models)]


def _check_model(model: Model) -> HealthCheck:
    name, folder = f"model {model.id}", Path(model.folder)
    if model.foreign:
        return HealthCheck(name, "ok", "foreign: run by other servers")
    if not folder.is_dir():
        return HealthCheck(name, "fail", f"no folder {folder}", "Put the model there or mend `folder`.")
    try:
        if digest(folder) == model.digest:
            check_scores(model, read_folder(folder).scores)
            return HealthCheck(name, "ok", "digest right")
    except SetupError as error:
        return HealthCheck(name, "fail", str(error), "Fetch the model again, or mend the catalogue.")
    todo = "Fetch the model again, or write down the digest if you meant to change it."
    return HealthCheck(name, "fail", "its files have another digest", todo)


def check_data_dir(data_dir: Path) -> HealthCheck:
    """Writable by us, and closed to others: keys and the ledger lie there."""
    place = _existing(data_dir)
    if not place.is_dir():
        return HealthCheck("data folder", "fail", f"{place} is a file, not a folder", "Choose another --data-dir.")
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"x")
    except OSError as error:
        todo = "Mend its owner and permissions, or choose another --data-dir."
        return HealthCheck("data folder", "fail", f"{place} is not writable ({error.strerror})", todo)
    if place != data_dir.absolute():
        return HealthCheck("data folder", "ok", f"{data_dir} will be made by the first `embedmesh serve`")
    private = (path for path in sorted(data_dir.iterdir()) if path.is_file() and path.suffix != PUBLIC_SUFFIX)
    files = [data_dir, *private]
    open_to_others = [path.name for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if not open_to_others:
        return HealthCheck("data folder", "ok", f"{data_dir}, private")
    has_secrets = (data_dir / "bootstrap.json").exists()
    return HealthCheck(
        "data folder",
        "fail" if has_secrets else "warn",
        f"other users may enter or read: {', '.join(open_to_others[:5])}",
        f"Run: chmod -R go= '{data_dir}'",
    )


def check_port(host: str, port: int, ours: bool) -> HealthCheck:
    """Whether `serve` can listen there; `ours` if our own gateway has answered on it."""
    where = f"{host} port {port}"
    if ours:
        return HealthCheck("port", "ok", f"{where}: our gateway listens")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        return HealthCheck(
            "port", "fail", f"{where}: {error.strerror}", "Choose another by --port, or end what uses it."
        )
    return HealthCheck("port", "ok", f"{where}: free")


def check_new_keys(new_keys: NewKeys, host: str | None) -> list[HealthCheck]:
    """Where strangers may get keys, a key without limits lets one of them take the whole gateway."""
    if new_keys.limits != Limits():
        words = in_words(msgspec.structs.asdict(new_keys.limits))
        return [HealthCheck("new keys", "ok", f"their limits: {words}")]
    if not (new_keys.open_to_others if host is None else beyond_loopback(host)):
        return []
    found = "they have no limits, and other machines reach the gateway"
    todo = f"Where strangers get keys: embedmesh serve --key-defaults {LIMITS_EXAMPLE}"
    return [HealthCheck("new keys", "warn", found, todo)]


def _room(name: str, free: int, found: str, fail: tuple[int, str], warn: tuple[int, str]) -> HealthCheck:
    """`fail` and `warn` each have the bytes below which they apply, and what to do then."""
    for state, (least, todo) in (("fail", fail), ("warn", warn)):
        if free < least:
            return HealthCheck(name, state, found, todo)  # type: ignore[arg-type]
    return HealthCheck(name, "ok", found)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
