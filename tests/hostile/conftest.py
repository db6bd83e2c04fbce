"""One real `embedmesh serve` for all hostile tests: whatever they send, it must end them well."""

from collections.abc import Iterator

import pytest

from bench.rig.http import http_request
from bench.rig.live import Live, serving
from tests.data import model_folder

NO_BUGS_MET = "embedmesh_internal_errors_total 0.0"


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A running endpoint. At the end it has met no bug of ours, is not restarted, and stops with exit code 0."""
    model_folder()
    with serving() as running:
        began = running.pids()
        yield running
        with running.wire() as wire:
            metrics = wire.ask(http_request("GET", "/metrics", key=running.credentials.admin_key)).body.decode()
        assert NO_BUGS_MET in metrics.splitlines()
        assert running.pids() == began
        assert running.stop() == 0
        log = running.process.log.read_text(errors="replace")
        assert "Traceback" not in log, log
