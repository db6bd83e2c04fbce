"""The life of `embedmesh serve`: first start, second start, refusals to start, and its end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedmesh.process import EXIT_SETUP
from tests.data import THOROUGH, model_folder
from tests.story.conftest import Serve
from tests.story.endpoint import WIDTH, Endpoint, run, wait_until

TEXTS = [f"number {at}" for at in range(10)]


def test_a_second_one_on_the_same_data_or_port_is_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    """One line that says what to do, and the first is not disturbed."""
    port = httpx.URL(endpoint.base_url).port
    refused("another `embedmesh serve` is using", "--port", "0", "--data-dir", endpoint.data_dir)
    refused(f"port {port} (Address already in use)", "--port", port, "--data-dir", tmp_path / "data")
    assert endpoint.embed("still here").shape == (1, WIDTH)


def refused(words: str, *arguments: object, **environment: Any) -> None:
    """`embedmesh serve ARGUMENTS` ends with 78 and one message with these words, without a traceback.

    Gateway and node may both find the fault before the supervisor ends them: then each says the message once.
    """
    done = run("serve", *arguments, **environment)
    said = done.stderr.decode()
    assert done.returncode == EXIT_SETUP, said
    lines = [line for line in said.splitlines() if line.startswith("embedmesh ")]  # the others are log and progress
    assert len({line.partition(": ")[2] for line in lines}) == 1, said  # gateway and node may say it in one moment
    assert words in lines[0]
    assert lines[0].endswith(".")
    assert "Traceback" not in said
    assert done.stdout == b""


def test_a_data_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A path under a file, and a file where the folder should be."""
    (tmp_path / "file").touch()
    refused("Choose another with --data-dir", "--port", "0", "--data-dir", "/dev/null/data")
    refused("Choose another with --data-dir", "--port", "0", "--data-dir", tmp_path / "file")


def test_a_read_only_disk(tmp_path: Path) -> None:
    """The same words where the disk is mounted read-only."""
    mount = f"mount -t tmpfs -o ro none {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("a read-only mount needs rights that this user does not have")
    serve = f"{sys.executable} -m embedmesh serve --port 0 --data-dir {tmp_path}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", f"{mount} && {serve}"], capture_output=True, check=False)
    assert done.returncode == EXIT_SETUP
    assert done.stderr.decode().count("\n") == 1
    assert b"Read-only file system" in done.stderr


def remove(file: Path) -> None:
    file.unlink()


def change_a_byte(file: Path) -> None:
    """In a file of its own: the one it was is linked to the real one."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (remove, "model.safetensors"),
        (change_a_byte, "model.safetensors"),
        (change_a_byte, "tokenizer.json"),
        (remove, "config.json"),
    ],
)
def test_missing_or_damaged_model(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    """It does not start on a model that is not the catalogue's, and says which command mends it."""
    folder = model_folder()
    shutil.copytree(folder.parent, tmp_path / "assets", copy_function=os.link)
    damage(tmp_path / "assets" / folder.name / name)
    arguments = ("--port", "0", "--data-dir", tmp_path / "data")
    refused("embedmesh setup", *arguments, EMBEDMESH_ASSETS_DIR=str(tmp_path / "assets"))


def test_damaged_bootstrap_file(tmp_path: Path) -> None:
    """A bootstrap.json that cannot be read is told, not overwritten: the keys in it may be the only ones."""
    file = tmp_path / "bootstrap.json"
    file.write_text('{"base_url": "http://127.0.0.1:8080/v1", "api_k')
    before = file.read_bytes()
    refused("bootstrap.json is damaged", "--port", "0", "--data-dir", tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_request_ends_well(number: signal.Signals, serve: Serve) -> None:
    """Told to stop in the middle of a request, it still delivers and charges it, then ends with nothing left behind.

    The engine is held still until the gateway drains: the request cannot end before.
    """
    one = serve().wait_ready()
    before = one.account().balance_nanousd
    worker = one.pid("worker")
    assert worker is not None
    with ThreadPoolExecutor(2) as pool:
        os.kill(worker, signal.SIGSTOP)
        reply = pool.submit(one.ask, input=TEXTS)
        one.wait_held()
        ended = pool.submit(one.stop, number)
        wait_until("it drains", lambda: "gateway drains" in one.log.read_text(), 10)
        with contextlib.suppress(ProcessLookupError):  # held still for so long that another has taken its place
            os.kill(worker, signal.SIGCONT)
        assert ended.result() == 0
        assert reply.result().status_code == 200
    assert len(reply.result().json()["data"]) == len(TEXTS)
    cost = int(reply.result().headers["x-embedmesh-cost-nanousd"])
    assert one.account().balance_nanousd == before - cost
    one.check_ledger()
    assert list((one.data_dir / "run").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] if THOROUGH else [signal.SIGINT])
def test_stopped_while_it_loads(number: signal.Signals, serve: Serve) -> None:
    """Told to stop before it is ready, it stops at once and leaves nothing."""
    one = serve()
    wait_until("its children are there", lambda: {"gateway", "worker"} <= {*one.processes().values()}, 10)
    assert one.stop(number) == 0
    assert one.said.read_text() == ""


def test_a_second_ctrl_c_does_not_wait(serve: Serve) -> None:
    """Whoever presses Ctrl-C twice wants it to end now: the request is lost, and was not charged."""
    one = serve().wait_ready()
    before = one.account().balance_nanousd
    worker = one.pid("worker")
    assert worker is not None
    with ThreadPoolExecutor(1) as pool:
        os.kill(worker, signal.SIGSTOP)  # the request cannot end before
        reply = pool.submit(one.ask, input=TEXTS)
        one.wait_held()
        one.process.send_signal(signal.SIGINT)
        wait_until("it says that it drains", lambda: "drains" in one.log.read_text(), 5)
        assert one.stop(signal.SIGINT) == 0
        assert isinstance(reply.exception(), httpx.TransportError)
    again = serve().wait_ready()
    assert again.account().balance_nanousd == before
    assert len(again.check_ledger().recovered) == 1
    assert again.stop() == 0


def test_no_process_leaves_a_core(serve: Serve) -> None:
    """Texts and keys are in their memory: no core file, and nothing in what the kernel hands to a program."""
    one = serve().wait_ready()
    found = one.processes()
    assert set(found.values()) == {"gateway", "node", "serve", "worker"}
    for pid in found:
        limits = Path(f"/proc/{pid}/limits").read_text()
        (core,) = [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size")]
        assert core == ["0", "0"]
        assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0
    assert one.stop() == 0
