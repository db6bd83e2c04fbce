"""How much faster is a text that is known already? `python -m bench.cached [--rounds N] [--json]`.

Three accounts send one text at a time, in turns, to the public endpoint with a real model: one whose vectors are not
remembered, one that pays for known vectors, one that does not. Every vector of the latter two must be, bit for bit, the
one that its account got first. Exit code 1 where a promise is broken.
"""

from statistics import median
from typing import Any

import msgspec

from bench.rig.command import CannotRun, bench, model_folder, track, wrong
from bench.rig.corpus import Name, corpus
from bench.rig.http import embedding_request
from bench.rig.live import Live, serving
from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.caching import CachePolicy

TEXTS: dict[Name, int] = {"Q": 28, "L": 250}  # of about that many tokens
KNOWN = 20  # of each length
CREDIT = 10**12

FASTER_MIN = 10.0  # p50 of a forward over that of a hit


class LengthRow(msgspec.Struct, frozen=True):
    """Medians in milliseconds, of texts of about that many tokens."""

    tokens: int
    forward_ms: float
    charged_ms: float
    free_ms: float


class Figures(msgspec.Struct, frozen=True):
    """What was found."""

    rows: list[LengthRow]
    known: int  # requests for texts that were known
    hits: int
    differing: int  # replies to what was known that were not the first one's vector

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        conditions: dict[str, bool] = {
            f"{self.differing} of {self.hits} vectors differ": self.differing > 0,
            f"{self.known - self.hits} of {self.known} were not known": self.hits != self.known,
        }
        for row in self.rows:
            for policy, hit_ms in (("charged", row.charged_ms), ("free", row.free_ms)):
                times = row.forward_ms / hit_ms
                conditions[f"{row.tokens} tokens, {policy}: {times:.1f} times as fast"] = times < FASTER_MIN
        return wrong(conditions)


def keys(live: Live) -> dict[CachePolicy, str]:
    """A key of a new account with each policy."""
    made = {}
    with open_books(live.data_dir, live.store) as books:
        for policy in CachePolicy:
            account = f"cache-{policy}"
            books.accounts.create(account, cache=policy)
            books.accounts.credit(account, CREDIT, account)
            _, made[policy] = books.keys.create(account, ["embeddings"])
    return made


def measure(rounds: int = 20) -> Figures:
    """The whole run."""
    model_folder()
    rows = []
    known = hits = differing = 0
    with serving() as live, live.wire() as wire:
        key_of = keys(live)
        for name, tokens in TEXTS.items():
            texts = corpus(name, KNOWN)
            took: dict[CachePolicy, list[float]] = {policy: [] for policy in CachePolicy}
            first: dict[tuple[CachePolicy, str], Any] = {}
            for number in track(range(len(texts) * (rounds + 1)), f"{tokens} tokens"):
                text = texts[number % len(texts)]
                for policy, key in key_of.items():
                    seconds, reply = wire.timed(embedding_request(text, key=key))
                    if reply.status != 200:
                        raise CannotRun(f"{reply.status} {reply.body[:200]!r}")
                    data = reply.json()["data"]
                    right = first.setdefault((policy, text), data)
                    if number < len(texts):
                        continue
                    took[policy].append(1000 * seconds)
                    if policy is not CachePolicy.OFF:
                        known += 1
                        hits += reply.headers["x-embedmesh-cached"] == "1"
                        differing += data != right
            forward, charged, free = (median(took[policy]) for policy in CachePolicy)
            rows.append(LengthRow(tokens, forward, charged, free))
    return Figures(rows, known, hits, differing)


if __name__ == "__main__":
    bench(measure, rounds="requests for each known text")
