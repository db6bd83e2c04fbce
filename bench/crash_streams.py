"""kill -9 of gateways in the middle of streams: `python -m bench.crash_streams [--kills N] [--store postgres]`.

Each stream lasts longer than a hold does, and its caller notes when it got what. After each kill, and in the end, the
ledger must say of every stream that was cut:

* it was charged what its gateway had noted last: what its caller had at some moment of the last NOTED_S, and nothing
  else; or nothing, where it was younger than that, and had no note;
* no hold is left open, none is charged twice, and the ledger adds up. Streams that came to their end are charged whole.
"""

import random
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Literal

import msgspec

from bench.crash import GIVE_UP_S, settle
from bench.rig import ledger, processes
from bench.rig.command import bench, model_folder, track, wrong
from bench.rig.live import Live, serving
from bench.rig.postgres import serving_if
from bench.rig.processes import wait_for
from bench.rig.speakers import speakers
from bench.rig.streams import DONE, Caller, CutOff, event_of, text_of
from embedmesh.flow.leases import LEASE_EVERY_S
from embedmesh.flow.usage import tokens_of
from embedmesh.rules.exchange import REQUEST_HEADER

CALLERS = 16
EVENTS, PACE_S = 300, 0.1  # half a minute: holds are extended, and noted twice or thrice
STAGGER_S = 0.5  # between two callers' beginnings: some are young when they are cut
LIVES_S = (15.0, 30.0)  # of a gateway, before it is killed
NOTED_S = LEASE_EVERY_S + 2.0  # the oldest that a note is, and a slow commit
INPUT_PRICE, OUTPUT_PRICE = 1, 3  # nano-USD a token
PROMPT = "Tell me a long story."
INPUT_TOKENS = tokens_of(len(PROMPT)) + 2 * 4  # as the gateway counts them: see `flow.generate`
CATALOGUE = """
[[models]]
id = "sentence-transformers/all-MiniLM-L6-v2"
aliases = ["all-MiniLM-L6-v2"]
folder = "{folder}"
width = 384
max_tokens = 256
price = 10_000_000
digest = "8b15441b4c169b78dcc3f86d491663fade918ca0772dae0b58d0eba4f681d569"

[[models]]
id = "acme/chat"
modalities = ["chat"]
max_tokens = 10_000
output_max = {events}
price = {input_price}_000_000
output_price = {output_price}_000_000
token_ids = "native"
"""
ASK = {"model": "acme/chat", "messages": [{"role": "user", "content": PROMPT}], "stream": True}
ENDS = "SELECT hold_id, state, coalesce(ended_by, ''), coalesce(captured, 0) FROM holds"


class Read(msgspec.Struct):
    """One stream as its caller had it: when, and how many bytes of text by then."""

    hold_id: str
    had: list[tuple[float, int]] = []
    whole: bool = False
    ended: float = 0.0


class Figures(msgspec.Struct):
    """What was found. Money in nano-USD."""

    kills: int
    streams: int
    whole: int
    cut: int
    charged_at_their_note: int
    charged_nothing: int
    delivered_nanousd: int
    charged_nanousd: int
    oldest_note_s: float
    wrong: list[str]
    ledger_check_ok: bool

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        return self.wrong[:5] + wrong(
            {
                "`ledger check` found something": not self.ledger_check_ok,
                "no stream was cut, or none came to its end": not (self.cut and self.whole),
                "no stream was charged at its note": not self.charged_at_their_note,
            }
        )


class StreamCaller(threading.Thread):
    """Reads one stream after another until it is stopped; the last one to its end."""

    def __init__(self, live: Live, number: int, stop: threading.Event) -> None:
        super().__init__(name=f"caller{number}", daemon=True)
        self._live, self._number, self._stopping = live, number, stop
        self.read: list[Read] = []

    def run(self) -> None:
        self._stopping.wait(self._number * STAGGER_S)
        while not self._stopping.is_set():
            try:
                with Caller(self._live.address, self._live.api_key, "/v1/chat/completions", ASK) as caller:
                    status, headers = caller.head()
                    if status == 200:
                        self._listen(caller, headers[REQUEST_HEADER])
                        continue
            except (OSError, CutOff):
                pass
            time.sleep(0.2)  # it is away, or its node is not known to be well yet

    def _listen(self, caller: Caller, hold_id: str) -> None:
        self.read.append(read := Read(hold_id))
        text_bytes = 0
        try:
            for chunk in caller.chunks():
                read.whole = chunk == DONE
                if chunk.startswith(b"data: {"):
                    text_bytes += len(text_of([event_of(chunk)]).encode())
                    read.had.append((time.monotonic(), text_bytes))
        finally:
            read.ended = time.monotonic()


def cost(text_bytes: int) -> int:
    """Of what a caller has had, as its gateway counts it."""
    return INPUT_TOKENS * INPUT_PRICE + tokens_of(text_bytes) * OUTPUT_PRICE


def judge(streams: Sequence[Read], store: str | Path, kills: int, ok: bool) -> Figures:
    """Compare what callers had with what the ledger says."""
    (rows,) = ledger.read(store, ENDS)
    holds = {hold_id: (str(state), str(by), int(captured)) for hold_id, state, by, captured in rows}
    found = Figures(kills, len(streams), 0, 0, 0, 0, 0, 0, 0.0, [], ok)
    found.wrong += [f"{hold_id} is still open" for hold_id, (state, *_) in holds.items() if state == "open"]
    for each in streams:
        state, ended_by, captured = holds[each.hold_id]
        had = each.had[-1][1] if each.had else 0
        found.charged_nanousd += captured
        found.delivered_nanousd += cost(had) if had else 0
        if each.whole:
            found.whole += 1
            if (state, ended_by) != ("captured", "capture"):
                found.wrong.append(f"{each.hold_id} was read whole, and {state} by {ended_by}")
            continue
        found.cut += 1
        noted = [at for at, text_bytes in each.had if cost(text_bytes) == captured]
        age_s = each.ended - each.had[0][0] if each.had else 0.0
        if not captured:
            found.charged_nothing += 1
            if age_s > NOTED_S:
                found.wrong.append(f"{each.hold_id} was cut after {age_s:.1f} s, and {state} by {ended_by} for nothing")
            continue
        found.charged_at_their_note += 1
        if not ended_by.endswith("_noted") or not noted:
            found.wrong.append(f"{each.hold_id} was charged {captured} by {ended_by}; its caller had {cost(had)}")
            continue
        note_s = each.ended - max(noted)
        found.oldest_note_s = max(found.oldest_note_s, note_s)
        if note_s > NOTED_S:
            found.wrong.append(f"{each.hold_id} was charged what was noted {note_s:.1f} s before it was cut")
    return found


def measure(kills: int = 4, seed: int = 1, store: Literal["sqlite", "postgres"] = "sqlite") -> Figures:
    """The whole run."""
    dice = random.Random(seed)
    with ExitStack() as stack:
        server = stack.enter_context(serving_if(store))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-crash-")))
        (folder / "models.toml").write_text(
            CATALOGUE.format(
                folder=model_folder(), events=2 * EVENTS, input_price=INPUT_PRICE, output_price=OUTPUT_PRICE
            )
        )
        (speaker,) = stack.enter_context(speakers(1))
        stack.enter_context(speaker.ordered("honest", tokens=EVENTS, pace_s=PACE_S))
        arguments = ["--catalogue", str(folder / "models.toml"), "--workers", "1" if server is None else "2"]
        environment = {} if server is None else {"EMBEDMESH_STORE": server.new()}
        live = stack.enter_context(serving(arguments, environment))
        added = live.command("nodes", "add", speaker.url, "--model", "acme/chat=scripted", "--name", "n0")
        assert added.returncode == 0, added.stderr
        stop = threading.Event()
        callers = [StreamCaller(live, number, stop) for number in range(CALLERS)]
        for caller in callers:
            caller.start()
        for _ in track(range(kills), "kill -9"):
            time.sleep(dice.uniform(*LIVES_S))
            processes.kill(dice.choice(live.gateways()))
            assert wait_for(lambda: bool(live.gateways()), GIVE_UP_S)
        time.sleep(LIVES_S[0])  # then streams are under way that nothing cuts
        stop.set()
        for caller in callers:
            caller.join(ceil(EVENTS * PACE_S) * 2)
        settle(live)
        live.stop()
        ok = ledger.check(live.data_dir, environment)
        streams = [read for caller in callers for read in caller.read]
        return judge(streams, live.store, kills, ok)


if __name__ == "__main__":
    bench(measure, kills="of gateways", seed="of moments", store="of the ledger; PostgreSQL has two gateways")
