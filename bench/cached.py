"""How much faster is a text that is known already? `python -m bench.cached [--rounds N] [--json]`.

The public endpoint with a real model, asked one text at a time by three accounts in turns: one whose vectors are not
remembered, one who pays for what is known, one who does not. Every vector of the latter two must be, bit for bit, the
one that its account got first. Exit code 1 where a promise is broken.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.corpus import Name, corpus
from bench.live import MODEL, Live, http_request, serving
from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.caching import CachePolicy
from tests.data import find_model_folder

TEXTS: dict[Name, int] = {"Q": 28, "L": 250}  # of about so many tokens
KNOWN = 20  # of each length
CREDIT = 10**12

FASTER_MIN = 10.0  # p50 of a forward over that of a hit


class Row(msgspec.Struct, frozen=True):
    """Medians in milliseconds, of texts of about so many tokens."""

    tokens: int
    forward_ms: float
    charged_ms: float
    free_ms: float


class Figures(msgspec.Struct, frozen=True):
    """What was found."""

    rows: list[Row]
    asked: int  # for what was known
    hits: int
    differing: int  # replies to what was known that were not the first one's vector

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        said = {
            f"{self.differing} of {self.hits} vectors differ": self.differing > 0,
            f"{self.asked - self.hits} of {self.asked} were not known": self.hits != self.asked,
        }
        for row in self.rows:
            for policy, hit_ms in (("charged", row.charged_ms), ("free", row.free_ms)):
                times = row.forward_ms / hit_ms
                said[f"{row.tokens} tokens, {policy}: {times:.1f} times as fast"] = times < FASTER_MIN
        return [words for words, broken in said.items() if broken]


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


def measure(rounds: int, console: Console) -> Figures:
    """The whole run."""
    rows = []
    known_asked = hits = differing = 0
    with serving() as live, live.wire() as wire:
        tokens_of = keys(live)
        for name, tokens in TEXTS.items():
            texts = corpus(name, KNOWN)
            took: dict[CachePolicy, list[float]] = {policy: [] for policy in CachePolicy}
            first: dict[tuple[CachePolicy, str], Any] = {}
            for number in track(range(len(texts) * (rounds + 1)), f"{tokens} tokens", console=console):
                text = texts[number % len(texts)]
                for policy, key in tokens_of.items():
                    asked = {"model": MODEL, "input": text, "encoding_format": "base64"}
                    request = http_request("POST", "/v1/embeddings", msgspec.json.encode(asked), key=key)
                    begun = time.perf_counter()
                    reply = wire.ask(request)
                    seconds = time.perf_counter() - begun
                    if reply.status != 200:
                        raise RuntimeError(f"{reply.status} {reply.body[:200]!r}")
                    data = reply.json()["data"]
                    known = first.setdefault((policy, text), data)
                    if number < len(texts):
                        continue
                    took[policy].append(1000 * seconds)
                    if policy is not CachePolicy.OFF:
                        known_asked += 1
                        hits += reply.headers["x-embedmesh-cached"] == "1"
                        differing += data != known
            forward, charged, free = (median(took[policy]) for policy in CachePolicy)
            rows.append(Row(tokens, forward, charged, free))
    return Figures(rows, known_asked, hits, differing)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.cached", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="times that each known text is asked for")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    asked: Any = parser.parse_args(arguments)
    if find_model_folder() is None:
        print("the default model's files are not here; run `embedmesh setup` first", file=sys.stderr)
        return 1
    figures = measure(asked.rounds, Console(stderr=True))
    if asked.json:
        print(msgspec.json.encode({"ok": not figures.broken, "broken": figures.broken, "figures": figures}).decode())
    else:
        table = Table("tokens", "embedded, p50 ms", "known, charged", "known, free")
        for row in figures.rows:
            table.add_row(str(row.tokens), *(f"{ms:.2f}" for ms in (row.forward_ms, row.charged_ms, row.free_ms)))
        Console().print(table)
        print("BROKEN: " + "; ".join(figures.broken) if figures.broken else "All promises kept.")
    return 1 if figures.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
