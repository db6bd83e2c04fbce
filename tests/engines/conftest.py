"""A gateway on a real socket for engines that are installed: `make bench-engines` runs these tests where they are."""

import importlib.util
import os
from collections.abc import Iterator

import pytest

from tests.client.gateway import ScriptedGateway

os.environ |= {"DO_NOT_TRACK": "true", "DAFT_ANALYTICS_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def needs(engine: str) -> pytest.MarkDecorator:
    """Skips the tests of a module where the engine is not installed."""
    installed = importlib.util.find_spec(engine) is not None
    return pytest.mark.skipif(not installed, reason=f"{engine} is not installed here: `make bench-engines` has it")


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway().running() as running:
        yield running
