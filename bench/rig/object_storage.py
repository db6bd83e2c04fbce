"""A real server that speaks S3: SeaweedFS, from its wheel in `.bench/seaweedfs`, or the system's `weed`."""

import importlib.util
import json
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.rig.install import HOME, NotInstalled, install
from bench.rig.processes import HOST, Process, free_port, wait_for

START_S = 60.0
BUCKET = "embedmesh-test"


def cannot_serve() -> str:
    """Why there can be no server here, in words; empty where there can."""
    if importlib.util.find_spec("s3fs") is None:
        return "s3fs is not installed"
    if _program() is None:
        return "no SeaweedFS: `python -m bench.batches --files s3` installs it into .bench"
    return ""


class S3Server:
    """`environment` is what a client needs to reach it: as AWS's SDKs and s3fs read it."""

    bucket = BUCKET

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = [free_port() for _ in range(8)]
        self.port = self._ports[0]
        key, secret = secrets.token_hex(10), secrets.token_hex(20)
        self.environment = {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        identity = {
            "name": "test",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.process = self._start()

    @staticmethod
    @contextmanager
    def started() -> Iterator["S3Server"]:
        """A server with an empty bucket, on the disk. Raises NotInstalled."""
        with tempfile.TemporaryDirectory(prefix="embedmesh-s3-") as folder:
            server = S3Server(Path(folder))
            try:
                server.wait()
                yield server
            finally:
                server.process.kill()

    def new_address(self, set_variable: Callable[[str, str], object]) -> str:
        """A prefix of its own, for whoever has its variables."""
        for name, value in self.environment.items():
            set_variable(name, value)
        return f"s3://{BUCKET}/{secrets.token_hex(8)}"

    def system(self) -> Any:
        """fsspec's file system of it, of its own."""
        import s3fs

        environment = self.environment
        return s3fs.S3FileSystem(
            key=environment["AWS_ACCESS_KEY_ID"],
            secret=environment["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def kill_and_start(self) -> None:
        """kill -9, then again on the same ports."""
        self.process.kill()
        self.process = self._start()
        self.wait()

    def wait(self) -> None:
        """Until it answers. Raises NotInstalled."""

        def answers() -> bool:
            with suppress(Exception):  # of the driver: nobody listens yet, or its parts have not found each other
                socket.create_connection((HOST, self.port), 1.0).close()
                system = self.system()
                if not system.exists(BUCKET):
                    system.mkdir(BUCKET)
                system.pipe_file(f"{BUCKET}/started", b"x")
                system.rm_file(f"{BUCKET}/started")
                return True
            return False

        if not wait_for(answers, START_S, lambda: self.process.lives):
            raise NotInstalled(f"SeaweedFS does not start: {self.process.log_tail()}")

    def _start(self) -> Process:
        program = _program()
        if program is None:
            install("seaweedfs")
            program = _program()
        if program is None:
            raise NotInstalled("the wheel of SeaweedFS has no program `weed`")
        _, master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc = self._ports
        command = [str(program), "server", f"-dir={self._folder}", f"-ip={HOST}", "-s3", "-filer"]
        command += [f"-master.port={master}", f"-master.port.grpc={master_grpc}"]
        command += [
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            "-volume.max=50",
            "-master.telemetry=false",
        ]
        command += [f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}", "-master.volumeSizeLimitMB=100"]
        command += [f"-s3.port={self.port}", f"-s3.port.grpc={s3_grpc}", f"-s3.config={self._folder / 's3.json'}"]
        command += [
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-master.electionTimeout=1s",
        ]
        return Process(command, self._folder / "log")


def _program() -> Path | None:
    """SeaweedFS's program, if it is here."""
    here = HOME / "seaweedfs" / "bin" / "weed"
    found = str(here) if here.exists() else shutil.which("weed")
    return Path(found) if found else None
