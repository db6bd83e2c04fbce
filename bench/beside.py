"""Interactive requests beside a batch that fills the fleet: `python -m bench.beside [--seconds N] [--json]`.

Short requests come by dice, whether the earlier ones are answered or not, on an endpoint that does nothing else; and
again while a batch runs that could keep the node busy for longer than that. What they took is compared in the same run,
round by round; the first second of each is left out.
"""

import threading
import time
from random import Random

import msgspec

from bench.batches import FINAL, Api, file_of
from bench.crash import WORDS
from bench.rig.command import bench, wrong
from bench.rig.figures import Spread, percentile
from bench.rig.live import Live, serving

RATIO_MAX = 1.5  # the promise: the 99th percentile beside a batch over the quiet one
EVERY_S = 0.05  # on average, between two requests
CLIENTS = 8  # as many may be under way: at this pace two are rare
SETTLE_S = 1.0
BATCH_LINES = 20_000


class Figures(msgspec.Struct):
    """Times in milliseconds, over the rounds."""

    requests: int
    quiet_p50_ms: Spread
    quiet_p99_ms: Spread
    beside_p50_ms: Spread
    beside_p99_ms: Spread
    ratio_p99: Spread
    lines_beside: int  # of the batch, done while others were there
    lines_a_second_beside: float
    lines_a_second_alone: float

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        return wrong(
            {
                f"the p99 beside a batch is {self.ratio_p99.median:.2f} times the quiet one": self.ratio_p99.median
                > RATIO_MAX,
                "the batch got nothing": not self.lines_beside,
            }
        )


def ask(live: Live, seconds: float, dice: Random) -> list[float]:
    """Short requests by dice; how long each took, in seconds, from when it was due."""
    took: list[float] = []
    due: list[float] = []
    at = time.monotonic()
    began, until = at, at + seconds
    while (at := at + dice.expovariate(1 / EVERY_S)) < until:
        due.append(at)
    due.reverse()
    lock = threading.Lock()

    def work() -> None:
        with live.wire() as wire:
            while True:
                with lock:
                    if not due:
                        return
                    mine, text = due.pop(), " ".join(dice.choices(WORDS, k=8))
                time.sleep(max(0.0, mine - time.monotonic()))
                reply = wire.ask(live.embed({"input": text, "encoding_format": "base64"}))
                if reply.status == 200 and mine - began > SETTLE_S:
                    took.append(time.monotonic() - mine)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def measure(seconds: int = 15, rounds: int = 3, seed: int = 1) -> Figures:
    """Quiet and beside a batch in turns."""
    dice = Random(seed)
    with serving() as live:
        api = Api(live)
        texts = [" ".join(dice.choices(WORDS, k=dice.choice((5, 10, 20, 40)))) for _ in range(500)]
        request = {
            "input_file_id": api.upload(file_of(dice, texts, BATCH_LINES)[0]),
            "endpoint": "/v1/embeddings",
            "completion_window": "24h",
        }
        ask(live, 2 * SETTLE_S, dice)
        quiet: list[list[float]] = []
        beside: list[list[float]] = []
        lines = 0
        for _ in range(rounds):
            quiet.append(ask(live, seconds, dice))
            batch_id = api.json("POST", "/v1/batches", request)["id"]
            while api.json("GET", f"/v1/batches/{batch_id}")["status"] == "validating":
                time.sleep(0.1)
            before = _done(api, batch_id)
            beside.append(ask(live, seconds, dice))
            lines += _done(api, batch_id) - before
            _cancel(api, batch_id)
        alone = _alone(api, request, seconds)
    p99 = [(percentile(q, 99), percentile(b, 99)) for q, b in zip(quiet, beside, strict=True)]
    return Figures(
        requests=sum(map(len, quiet)) + sum(map(len, beside)),
        quiet_p50_ms=Spread.of([1000 * percentile(each, 50) for each in quiet]),
        quiet_p99_ms=Spread.of([1000 * q for q, _ in p99]),
        beside_p50_ms=Spread.of([1000 * percentile(each, 50) for each in beside]),
        beside_p99_ms=Spread.of([1000 * b for _, b in p99]),
        ratio_p99=Spread.of([b / q for q, b in p99]),
        lines_beside=lines,
        lines_a_second_beside=lines / (rounds * seconds),
        lines_a_second_alone=alone,
    )


def _alone(api: Api, request: dict[str, str], seconds: float) -> float:
    """Lines a second of a batch that is alone."""
    time.sleep(11)  # until the others are forgotten
    batch_id = api.json("POST", "/v1/batches", request)["id"]
    while not (before := _done(api, batch_id)):
        time.sleep(0.1)
    time.sleep(seconds)
    done = _done(api, batch_id) - before
    _cancel(api, batch_id)
    return done / seconds


def _done(api: Api, batch_id: str) -> int:
    done: int = api.json("GET", f"/v1/batches/{batch_id}")["request_counts"]["completed"]
    return done


def _cancel(api: Api, batch_id: str) -> None:
    api.json("POST", f"/v1/batches/{batch_id}/cancel")
    while api.json("GET", f"/v1/batches/{batch_id}")["status"] not in FINAL:
        time.sleep(0.05)


if __name__ == "__main__":
    bench(measure, seconds="of each round", rounds="quiet and beside, each", seed="of texts and moments")
