"""kill -9 of each part: it comes back by itself, nobody is overcharged, and the books add up."""

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.story.endpoint import Endpoint, wait_until

BACK_S = 60.0  # seconds when quiet; `test_seconds.py` has the promise
TEXTS = [f"number {at}" for at in range(10)]
ANSWER_NANOUSD = 60  # what `Endpoint.answers` costs: 6 tokens at 10 nano-USD


def kill_now(one: Endpoint, role: str) -> None:
    """Of a process that may come and go. Never 0: that is our own group."""
    pid = wait_until(f"there is a {role}", lambda: one.pid(role), BACK_S)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("role", "ends", "paid"),
    [
        ("gateway", "broken", False),  # nobody is left to deliver, so nobody pays
        ("node", "503", False),  # there is no second node here
        ("worker", "200", True),  # the node starts another and does it again
    ],
)
def test_in_the_middle_of_a_request(victim: Endpoint, role: str, ends: str, paid: bool) -> None:
    """The caller gets the whole answer and pays once, or gets none and pays nothing.

    The engine is held still until the part is killed: the request cannot end before.
    """
    wait_until("an answer", victim.answers, BACK_S)
    before = victim.account().balance_nanousd
    recovered_before = len(victim.check_ledger().recovered)
    pid, worker = victim.pid(role), victim.pid("worker")
    assert pid is not None and worker is not None
    with ThreadPoolExecutor(1) as pool:
        os.kill(worker, signal.SIGSTOP)
        asked = pool.submit(end_of, victim, TEXTS)
        victim.wait_held()
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)
        end, cost = asked.result()
    assert end == ends
    wait_until("all of it is back", victim.answers, BACK_S)
    spent = before - victim.account().balance_nanousd
    assert spent == ANSWER_NANOUSD + (cost if paid else 0)
    recovered = len(victim.check_ledger().recovered) - recovered_before
    assert recovered == (1 if role == "gateway" else 0)


def end_of(one: Endpoint, texts: list[str]) -> tuple[str, int]:
    """How a request ended, and what it cost."""
    try:
        reply = one.ask(input=texts)
    except httpx.TransportError:
        return "broken", 0
    return str(reply.status_code), int(reply.headers.get("x-embedmesh-cost-nanousd", 0))


def test_an_engine_that_is_killed_while_it_starts_is_started_again(victim: Endpoint) -> None:
    """A set-up that has worked is not given up, whatever stands in its way just now."""
    wait_until("an answer", victim.answers, BACK_S)
    kill_now(victim, "node")
    wait_until("the new node is there", lambda: victim.pid("node") is not None, BACK_S)
    wait_until("its engine starts", lambda: victim.pid("worker") is not None, BACK_S)
    kill_now(victim, "worker")
    wait_until("an answer", victim.answers, BACK_S)
    assert "was ended by signal 9 (Killed); it is being restarted" in victim.log.read_text()
    victim.check_ledger()


def test_without_its_node_it_says_so(victim: Endpoint) -> None:
    """While no node can come back: 503 with a time to wait, not ready, but alive. Then all is well by itself."""
    wait_until("an answer", victim.answers, BACK_S)
    victim.process.send_signal(signal.SIGSTOP)  # nobody restarts the node
    try:
        pid = victim.pid("node")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until("it notices", lambda: not victim.answers(), BACK_S)
        refused = victim.ask(input="anybody?")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_node_available")
        assert int(refused.headers["retry-after-ms"]) > 0
        ready = victim.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert ready.json()["reasons"]
        assert victim.get("/health").status_code == 200
        assert victim.get("/v1/models", victim.api_key).json()["data"] == []
    finally:
        victim.process.send_signal(signal.SIGCONT)
    wait_until("an answer", victim.answers, BACK_S)
    assert victim.get("/readyz").status_code == 200


def test_it_ends_well_after_all_that(victim: Endpoint) -> None:
    """Nothing is held, no bug is in the log of any of its processes, and it stops as it should."""
    victim.account()
    victim.check_ledger()
    assert victim.stop() == 0
