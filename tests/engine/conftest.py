"""An engine in the process of the tests."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """What was imported stays out of collections of garbage.

    A model that was loaded or unloaded looks for garbage in all of its process (`release_freed`): milliseconds in a
    worker, a second of CPU here, where everything is imported that any test needs. Real workers and nodes are let be.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
