"""One endpoint for all stories that only ask it things, and a way to start others for those that break it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.data import find_model_folder
from tests.story.endpoint import Endpoint
from tests.story.generating import Generating, generating
from tests.story.npm import why_no_native, why_no_packages

HERE = Path(__file__).parent
Serve = Callable[..., Endpoint]
Note = Callable[[str, float, str], None]

measured: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is a story with the real model."""
    absent = pytest.mark.skip(reason="the default model's files are not here; run `embedmesh setup`")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.story)
            item.add_marker(pytest.mark.model)
            if find_model_folder() is None:
                item.add_marker(absent)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the stories measured on their way."""
    for line in measured:
        terminalreporter.write_line(f"measured: {line}")


@pytest.fixture(scope="session")
def note() -> Note:
    """Keep a number for the end of the run."""
    return lambda what, value, unit: measured.append(f"{what} {value:.2f} {unit}")


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory, note: Note) -> Iterator[Endpoint]:
    """A running endpoint, shared. At the end its ledger adds up, no bug was met, it exits with 0 and leaves nothing."""
    running = Endpoint(tmp_path_factory.mktemp("shared") / "data").wait_ready()
    note("cold start, spawn to ready", running.ready_s, "s")
    try:
        yield running
        running.account()
        running.check_ledger()
        assert "embedmesh_internal_errors_total 0.0" in running.get("/metrics", running.admin_key).text
        for role in ("serve", "gateway", "node", "worker"):
            note(f"resident after the stories, {role}", running.resident_mb(role), "MB")
        assert running.stop() == 0
    finally:
        running.kill_all()


@pytest.fixture(scope="session")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generating]:
    """A running endpoint whose nodes generate, shared."""
    with generating(tmp_path_factory.mktemp("speaking")) as running:
        yield running


@pytest.fixture(scope="session")
def packages() -> None:
    """The packages of Node's clients; skips where they cannot be had."""
    if (why := why_no_packages()) is not None:
        pytest.skip(why)


@pytest.fixture(scope="session")
def native(packages: None) -> None:
    """The native part of atoma-sdk, too."""
    if (why := why_no_native()) is not None:
        pytest.skip(why)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start an endpoint of one's own, in `tmp_path / "data"` unless told otherwise. Whatever is left is killed."""
    started: list[Endpoint] = []

    def start(*arguments: object, data_dir: Path | None = None, as_json: bool = True, **environment: str) -> Endpoint:
        one = Endpoint(data_dir or tmp_path / "data", *arguments, as_json=as_json, **environment)
        started.append(one)
        return one

    yield start
    for one in started:
        one.kill_all()


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One for a module whose tests kill its parts."""
    one = Endpoint(tmp_path_factory.mktemp("victim") / "data").wait_ready()
    yield one
    one.kill_all()
