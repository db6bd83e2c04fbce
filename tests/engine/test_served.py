"""How many threads the engine gets when nobody says."""

import os

import pytest

from embedmesh.engine.served import usable_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to cores")
def test_only_the_cores_that_we_may_run_on_count() -> None:
    """A process bound to one core has one, whatever the machine has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)
