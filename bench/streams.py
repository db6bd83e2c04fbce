"""Streams that are left, reset, cut, stalled and read slowly: what callers get, and what they pay.

    python -m bench.streams [--resets 1000] [--events 60] [--rounds 20] [--slow-s 60] [--json]

A real `embedmesh serve`, and nodes that speak by a script. `tests/story/test_generation.py` tries a part of this in
seconds; here are all examples, and the deadlines that take minutes.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec

from bench.faultnode import speech
from bench.faultnode.speech import Asked
from bench.rig.command import bench, say, track, wrong
from bench.rig.processes import HOST
from bench.rig.streams import DONE, Caller, CutOff, event_of, text_of
from tests.story.endpoint import wait_until
from tests.story.generating import CHARGED, FRAIL, SAID, Generating, estimated, generating, streaming

AT_ONCE = 8  # callers
PARALLEL, MONEY_FOR = 50, 3
SLOW_BYTES = 1_000  # a second
GROWTH_KB_MAX = 256.0  # of the whole gateway, by one slow reader of a stream of fifty megabytes
LONG_TOKENS = 200_000  # some fifty megabytes of events
LATE_S, COMMENTS = 25, (2, 3)  # comments come every ten seconds
BETWEEN_S = 60.0  # that a node may be silent in a stream
PACE_S, PACED_TOKENS = 55.0, 2  # just less
WRITE_S = 20.0  # that a caller has to read an event
SLACK_S = 5.0
DELAY_TOKENS, DELAY_PACE_S, DELAY_MS_MAX = 200, 0.02, 5.0
WAIT_S = 4 * BETWEEN_S
COMMENT = b": \n\n"
CUTS_IN_A_ROW = 2  # a third would eject the node
MENDED_S = 90.0  # an ejected node is probed again within a minute


class Found(msgspec.Struct):
    """What was seen."""

    resets: int = 0
    resets_paid: int = 0
    left_after: int = 0  # of that many events, each number once
    left_paid_right: int = 0
    cuts: int = 0  # one at each byte of a stream
    cuts_that_looked_whole: int = 0
    cuts_paid: int = 0
    rounds: int = 0
    rounds_right: int = 0
    growth_kb: float = 0.0
    node_slowed: bool = False
    added_ms: float = 0.0  # between two events, at the median, over the node itself
    deadlines: dict[str, str] = msgspec.field(default_factory=dict)  # by what was tried: what is wrong, or nothing

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        late = [f"{what}: {why}" for what, why in self.deadlines.items() if why]
        return [
            *wrong(
                {
                    f"{self.resets - self.resets_paid} of {self.resets} resets": self.resets_paid < self.resets,
                    "a caller that left paid wrongly": self.left_paid_right < self.left_after,
                    "a cut stream looked whole": self.cuts_that_looked_whole,
                    "a cut stream was paid": self.cuts_paid,
                    f"{self.rounds - self.rounds_right} of {self.rounds} rounds": self.rounds_right < self.rounds,
                    f"a slow reader took {self.growth_kb:.0f} kB": self.growth_kb > GROWTH_KB_MAX,
                    "a slow reader's node was not slowed": not self.node_slowed,
                    f"{self.added_ms:.1f} ms between events": self.added_ms > DELAY_MS_MAX,
                }
            ),
            *late,
        ]


def reset(mesh: Generating, found: Found, number: int) -> None:
    """A reset right after the last byte, each time another of the last three that a caller can wait for."""

    def once(at: int) -> str:
        caller = mesh.call(streaming())
        _, headers = caller.head()
        while caller.chunk() != DONE:
            pass
        if at % 2:
            caller.chunk()
        caller.reset()
        return headers["x-embedmesh-request"]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        ids = list(track(pool.map(once, range(number)), "resets"))
    found.resets = number
    for each in ids:
        with suppress(AssertionError):  # it was never charged
            charge = mesh.charge(each)
            found.resets_paid += charge is not None and charge.cost == CHARGED


def leave(mesh: Generating, found: Found, events: int) -> None:
    """After each number of events: exactly the input, and what was handed over."""
    for number in track(range(1, events + 1), "hang-ups"):
        body = streaming(f"stalls at={number} tokens={events}", max_tokens=events)
        with mesh.call(body) as caller:
            caller.head()
            read = [event_of(caller.chunk() or b"") for _ in range(number)]
        charge = mesh.charge(read[0]["id"])
        found.left_after += 1
        found.left_paid_right += charge is not None and charge.cost == estimated(body, text_of(read))


def cut(mesh: Generating, found: Found) -> None:
    """At each byte."""
    asked = {"model": "scripted", "stream": True, "stream_options": {"include_usage": True}}
    whole = sum(map(len, speech.frames(speech.events(Asked("chat/completions", asked)))))
    for at in track(range(whole), "cuts"):
        with mesh.call(streaming(f"cut at={at}", FRAIL)) as caller:
            status, headers = caller.head()
            last = list(caller.chunks())[-1] if status == 200 else b""
        found.cuts += 1
        found.cuts_that_looked_whole += last == DONE
        if status == 200:
            found.cuts_paid += mesh.charge(headers["x-embedmesh-request"]) is not None
        if at % CUTS_IN_A_ROW == 0:
            mesh.mend(mesh.frail, FRAIL, MENDED_S)


def spend(mesh: Generating, found: Found, rounds: int) -> None:
    """Fifty streams at one moment, with money for three."""
    body = streaming("stalls at=2")
    with mesh.call(body, key=mesh.account("rich", 10**9)) as caller:
        caller.head()
        held = mesh.books.accounts.find("rich").held_nanousd
    for number in track(range(rounds), "rounds"):
        key, start = mesh.account(f"poor-{number}", MONEY_FOR * held), threading.Barrier(PARALLEL)

        def once(_: int, key: str = key, start: threading.Barrier = start) -> tuple[int, Caller]:
            start.wait()
            caller = mesh.call(body, key=key)
            return caller.head()[0], caller

        with ThreadPoolExecutor(PARALLEL) as pool:
            seen = list(pool.map(once, range(PARALLEL)))
        for _, caller in seen:
            caller.close()
        statuses = Counter(status for status, _ in seen)
        found.rounds += 1
        found.rounds_right += statuses == Counter({200: MONEY_FOR, 429: PARALLEL - MONEY_FOR})


def read_slowly(mesh: Generating, found: Found, slow_s: float) -> None:
    """A kilobyte a second. What is between the two is in the kernel, and the node waits."""
    with mesh.call(streaming("honest tokens=2000", max_tokens=2_000)) as caller:
        caller.head()
        list(caller.chunks())
    before = mesh.endpoint.resident_mb("gateway")
    with mesh.call(streaming("endless", max_tokens=LONG_TOKENS), receive_bytes=4_096) as caller:
        caller.head()
        heard, written = mesh.sole.node.heard[-1], [0]
        for _ in track(range(int(slow_s)), "slow reader"):
            time.sleep(1.0)
            caller.sock.recv(SLOW_BYTES)
            written.append(heard.written)
            found.growth_kb = max(found.growth_kb, 1e3 * (mesh.endpoint.resident_mb("gateway") - before))
    found.node_slowed = written[-1] - written[len(written) // 2] < SLOW_BYTES * slow_s / 10


def delay(mesh: Generating, found: Found) -> None:
    """Between two events, through the gateway and from the node itself, at one time."""
    body = streaming(f"honest tokens={DELAY_TOKENS} pace={DELAY_PACE_S}", max_tokens=DELAY_TOKENS)

    def gaps(caller: Caller) -> list[float]:
        with caller:
            caller.head()
            came = [time.perf_counter() for _ in caller.chunks()]
        return [later - earlier for earlier, later in pairwise(came)]

    direct = (HOST, mesh.sole.port)
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(
            gaps, (mesh.call(body), Caller(direct, "", "/v1/chat/completions", body | {"model": "scripted"}))
        )
    found.added_ms = 1e3 * (median(ours) - median(theirs))


# -- deadlines: what is wrong, in words, or nothing ------------------------------------------------------------------


def comes_late(mesh: Generating) -> str:
    with mesh.call(streaming(f"late at={LATE_S}"), timeout_s=WAIT_S) as caller:
        caller.head()
        chunks = list(caller.chunks())
    comments = chunks.count(COMMENT)
    said = text_of([event_of(each) for each in chunks if each not in (COMMENT, DONE)])
    right = comments in COMMENTS and said == SAID and chunks[-1] == DONE
    return "" if right else f"{comments} comments, then {said!r}"


def is_paced(mesh: Generating) -> str:
    with mesh.call(streaming(f"honest tokens={PACED_TOKENS} pace={PACE_S}"), timeout_s=WAIT_S) as caller:
        caller.head()
        chunks = list(caller.chunks())
    return "" if chunks[-1] == DONE else f"it ended by {chunks[-1]!r}"


def stalls(mesh: Generating) -> str:
    with mesh.call(streaming("stalls at=3"), timeout_s=WAIT_S) as caller:
        caller.head()
        for _ in range(3):
            caller.chunk()
        since = time.monotonic()
        error = event_of(caller.chunk() or b"").get("error", {})
        took_s, end = time.monotonic() - since, caller.chunk()
    right = error.get("code") == "deadline_exceeded" and end is None and abs(took_s - BETWEEN_S) < SLACK_S
    return "" if right else f"{error} after {took_s:.1f} s"


def stops_reading(mesh: Generating) -> str:
    """It is cut off when an event has waited for WRITE_S, and pays for what was handed over."""
    with mesh.call(streaming("endless", max_tokens=LONG_TOKENS), receive_bytes=4_096, timeout_s=WAIT_S) as caller:
        _, headers = caller.head()
        heard = next(each for each in reversed(mesh.sole.node.heard) if "endless" in str(each.body))
        since = time.monotonic()
        with suppress(AssertionError):
            wait_until("it is cut off", lambda: heard.left, WRITE_S + SLACK_S)
        took_s = time.monotonic() - since
        with suppress(CutOff):
            list(caller.chunks())
            return "it ended as a whole one"
    charge = mesh.charge(headers["x-embedmesh-request"])
    right = heard.left and took_s > WRITE_S - 1 and charge is not None and charge.meters["output"] > 0
    return "" if right else f"cut off after {took_s:.1f} s, charged {charge}"


DEADLINES: dict[str, Callable[[Generating], str]] = {
    "a first event that comes late": comes_late,
    "events that are just less than the deadline apart": is_paced,
    "a node that stalls": stalls,
    "a caller that stops reading": stops_reading,
}


def keep_deadlines(mesh: Generating, found: Found) -> None:
    """All at one time: they wait."""
    say(f"deadlines: {PACED_TOKENS + 1} events {PACE_S:.0f} s apart, and others meanwhile")
    with ThreadPoolExecutor(len(DEADLINES)) as pool:
        waiting = {what: pool.submit(look, mesh) for what, look in DEADLINES.items()}
        for what, future in waiting.items():
            try:
                found.deadlines[what] = future.result()
            except Exception as error:  # noqa: BLE001 - the others are still worth knowing
                found.deadlines[what] = f"{type(error).__name__}: {error}"


def measure(resets: int = 1_000, events: int = 60, rounds: int = 20, slow_s: float = 60.0) -> Found:
    """All of it, at one endpoint."""
    found = Found()
    with tempfile.TemporaryDirectory(prefix="embedmesh-streams-") as folder, generating(Path(folder)) as mesh:
        read_slowly(mesh, found, slow_s)
        delay(mesh, found)
        reset(mesh, found, resets)
        leave(mesh, found, events)
        spend(mesh, found, rounds)
        cut(mesh, found)
        keep_deadlines(mesh, found)
    return found


if __name__ == "__main__":
    bench(
        measure,
        resets="after the last byte",
        events="of the streams that are left, after each number of them",
        rounds=f"of {PARALLEL} streams with money for {MONEY_FOR}",
        slow_s="seconds that the slow reader reads",
    )
