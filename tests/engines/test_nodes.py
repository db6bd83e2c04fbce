"""Nodes on a Ray cluster's workers: they join, they serve, and they leave, also when their actor is killed."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from bench.rig.live import Live, serving
from tests.data import model_folder
from tests.engines.conftest import needs

pytestmark = [needs("ray"), pytest.mark.filterwarnings("ignore"), pytest.mark.model, pytest.mark.timeout(300)]


def said(live: Live, *arguments: str) -> Any:
    done = live.command(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_until(holds: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.2)


def node_processes(folder: str) -> list[str]:
    found = subprocess.run(["pgrep", "-f", folder], capture_output=True, text=True)
    return [pid for pid in found.stdout.split() if int(pid) != os.getpid()]


def test_nodes_last_as_long_as_the_block() -> None:
    import ray

    from embedmesh.ray import nodes

    model_folder()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        with serving() as live:
            root = live.base_url.removesuffix("/v1")
            invite = said(live, "nodes", "invite")["token"]
            with nodes(root, [invite], num_cpus=1):
                states = [node["state"] for node in said(live, "nodes", "list")]
                assert len(states) == 2 and "removed" not in states
                assert node_processes("embedmesh-node-")
            wait_until(lambda: not node_processes("embedmesh-node-"))
            with pytest.raises(Exception, match="did not join"), nodes(root, [invite], ready_within_s=30):
                pass  # the token was good once
    finally:
        ray.shutdown()
