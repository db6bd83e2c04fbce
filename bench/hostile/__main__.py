"""A gateway attacked in every way: `python -m bench.hostile [KIND …] [--seconds N] [--seed N] [--json]`.

A stranger, a key without money and a paying tenant attack at once, one kind after another and then all kinds together.
Meanwhile another tenant asks at a steady pace, and an operator revokes keys. Exit code 1 when a promise is broken.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.gateway.contenders import Contender, started
from bench.gateway.material import Material, build
from bench.gateway.measure import OTHER_CORE, family_of, rss_bytes
from bench.hostile.attacks import ATTACKS, HOST
from bench.live import Wire, http_request
from embedmesh.catalogue import load_catalogue
from embedmesh.provision.assets import assets_dir
from embedmesh.provision.bootstrap import bootstrap
from embedmesh.settings import Credentials

ALL = "all at once"
RATE = 100.0  # requests a second of the tenant who is not to notice
SETTLE_S = 3.0  # until what the attackers left is closed
REVOKE_EVERY_S = 0.25
MONEY = 10**13  # nano-USD: more than any attacker can spend
KEYS_REVOKED = 24  # of one kind, at most

P99_TIMES_MAX = 2.0
REVOKE_MAX_S = 1.0
PEAK_MB_MAX = 700.0  # above what the gateway has at its start: 512 MiB of bodies are its setting
LEFT_MB_MAX = 120.0  # of that, after the last attack: what its allocator keeps


class Kind(msgspec.Struct, frozen=True):
    """What one kind of attack did. Milliseconds, MB; `said` is what each attacker was answered."""

    name: str
    p50_ms: float
    p99_ms: float
    alone_p99_ms: float
    bad: int
    revoke_max_s: float
    revoked: int
    used_after: int  # revoked keys that were taken all the same
    peak_mb: float
    said: dict[str, dict[str, int]]

    @property
    def times(self) -> float:
        """The p99 of the others over what it was without an attack."""
        return self.p99_ms / self.alone_p99_ms

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        said = {
            f"p99 of others {self.times:.1f} times": self.times > P99_TIMES_MAX,
            f"{self.bad} of others' answers were not right": self.bad > 0,
            f"a key was revoked after {self.revoke_max_s:.2f} s": self.revoke_max_s > REVOKE_MAX_S,
            "no key was revoked": not self.revoked,
            f"{self.used_after} revoked keys were taken": self.used_after > 0,
            f"{self.peak_mb:.0f} MB more than at the start": self.peak_mb > PEAK_MB_MAX,
        }
        return [f"{self.name}: {words}" for words, broken in said.items() if broken]


class Figures(msgspec.Struct, frozen=True):
    """All that was found."""

    kinds: list[Kind]
    restarts: int
    left_mb: float
    ledger: str

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        said = {
            f"{self.restarts} gateways ended": self.restarts > 0,
            f"{self.left_mb:.0f} MB more after the last attack": self.left_mb > LEFT_MB_MAX,
            self.ledger: not self.ledger.startswith("The money adds up"),
        }
        return [words for kind in self.kinds for words in kind.broken] + [w for w, broken in said.items() if broken]


def measure(kinds: Sequence[str], seconds: float, seed: int, bar: Progress) -> Figures:
    """The whole run, in a folder that is removed in the end."""
    os.environ["ENDS_NAP_MS"] = "1"
    with tempfile.TemporaryDirectory(prefix="embedmesh-hostile-") as name:
        folder = Path(name)
        model = load_catalogue(None, assets=assets_dir()).models[0]
        material = Material(folder / "material", model)
        with started("hold", build(), material, folder / "gateway") as gateway:
            data_dir = folder / "gateway" / "data"
            operator = Operator(gateway.port, bootstrap(data_dir, f"http://{HOST}:{gateway.port}/v1"))
            keys = operator.attackers()
            doomed = {kind: [operator.key("local", "embeddings") for _ in range(KEYS_REVOKED)] for kind in kinds}
            gateway.ask(2.0, RATE)
            before_mb = _mb(gateway)
            shown = bar.add_task("hostile", total=len(kinds))
            found = []
            for kind in kinds:
                found.append(_kind(kind, gateway, operator, keys, doomed[kind], seconds, seed, before_mb))
                time.sleep(SETTLE_S)
                bar.advance(shown)
            restarts = sum(not Path(f"/proc/{pid}").exists() for pid in gateway.pids)
            left_mb = _mb(gateway) - before_mb
        return Figures(found, restarts, left_mb, _ledger(data_dir))


class Operator:
    """Whoever holds the admin key."""

    def __init__(self, port: int, credentials: Credentials) -> None:
        self._port = port
        self._credentials = credentials
        self._numbers = iter(range(10**9))

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer, on a connection of its own; it has to be a 200."""
        data = b"" if body is None else json.dumps(body).encode()
        with Wire((HOST, self._port)) as wire:
            reply = wire.ask(http_request(method, path, data, key=self._credentials.admin_key))
        if reply.status != 200:
            raise RuntimeError(f"{method} {path}: {reply.status} {reply.code}")
        return reply.json()

    def key(self, account: str, *scopes: str) -> tuple[str, str]:
        """A new key and its id."""
        made = self.ask("POST", "/v1/admin/keys", {"account": account, "name": "k", "scopes": list(scopes)})
        return made["key"], made["key_id"]

    def attackers(self) -> dict[str, str]:
        """The keys of a stranger, of one without money, and of one who pays."""
        for account in ("broke", "paying"):
            self.ask("POST", "/v1/admin/accounts", {"id": account})
        self.ask("POST", "/v1/admin/accounts/paying/credits", {"amount_nanousd": MONEY, "reference": "start"})
        keys = {name: self.key(name, "embeddings", "keys")[0] for name in ("broke", "paying")}
        return {"stranger": "em_" + "s" * 43, **keys}

    def revokes(
        self, keys: Sequence[tuple[str, str]], stop: threading.Event, took: list[float], used: list[str]
    ) -> None:
        """Revoke a key every so often, and then try it. Fills `took` with seconds, `used` with keys that were taken."""
        for key, key_id in keys:
            if stop.wait(REVOKE_EVERY_S):
                return
            begun = time.monotonic()
            try:
                self.ask("DELETE", f"/v1/admin/keys/{key_id}")
                took.append(time.monotonic() - begun)
                with Wire((HOST, self._port)) as wire:
                    if wire.ask(http_request("GET", "/v1/account", key=key)).status != 401:
                        used.append(key_id)
            except (OSError, EOFError, RuntimeError):
                took.append(time.monotonic() - begun + REVOKE_MAX_S)  # it was not


def _kind(
    name: str,
    gateway: Contender,
    operator: Operator,
    keys: dict[str, str],
    doomed: Sequence[tuple[str, str]],
    seconds: float,
    seed: int,
    before_mb: float,
) -> Kind:
    alone = [gateway.ask(seconds / 2, RATE)]
    kinds = list(ATTACKS) if name == ALL else [name]
    took: list[float] = []
    used: list[str] = []
    stop = threading.Event()
    revoking = threading.Thread(target=operator.revokes, args=(doomed, stop, took, used))
    with _attacking(gateway.port, seed, seconds + 3.0, kinds, keys) as attacker, _watching(gateway) as peaks:
        revoking.start()
        beside = gateway.ask(seconds, RATE)
        stop.set()
        revoking.join()
        said, _ = attacker.communicate()
    time.sleep(SETTLE_S)
    alone.append(gateway.ask(seconds / 2, RATE))
    return Kind(
        name=name,
        p50_ms=beside.load.p50_us / 1e3,
        p99_ms=beside.load.p99_us / 1e3,
        alone_p99_ms=median(each.load.p99_us for each in alone) / 1e3,
        bad=beside.load.bad,
        revoke_max_s=max(took, default=0.0),
        revoked=len(took),
        used_after=len(used),
        peak_mb=max(peaks, default=0.0) - before_mb,
        said=json.loads(said),
    )


@contextmanager
def _attacking(
    port: int, seed: int, seconds: float, kinds: Sequence[str], keys: dict[str, str]
) -> "Iterator[subprocess.Popen[bytes]]":
    command = [sys.executable, "-m", "bench.hostile.attacker", str(port), str(seed), str(seconds), *kinds]
    pinned = ["taskset", "--cpu-list", str(OTHER_CORE), *command]
    with subprocess.Popen(pinned, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(keys).encode())
        process.stdin.close()
        process.stdin = None  # `communicate` is not to flush it
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _watching(gateway: Contender) -> Iterator[list[float]]:
    """The gateway's resident MB, looked at ten times a second."""
    seen: list[float] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.1):
            seen.append(_mb(gateway))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _mb(gateway: Contender) -> float:
    return sum(rss_bytes(one) for pid in gateway.pids for one in family_of(pid)) / 1e6


def _ledger(data_dir: Path) -> str:
    command = [sys.executable, "-m", "embedmesh", "ledger", "check", "--data-dir", str(data_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def show(figures: Figures, console: Console) -> None:
    """The figures for a person."""
    table = Table("attack", "p50 ms", "p99 ms", "times", "revoke s", "peak MB")
    for kind in figures.kinds:
        numbers = (kind.p50_ms, kind.p99_ms, kind.times, kind.revoke_max_s)
        table.add_row(kind.name, *(f"{number:.2f}" for number in numbers), f"{kind.peak_mb:.0f}")
    console.print(table)
    for kind in figures.kinds:
        for who, said in kind.said.items():
            answers = ", ".join(f"{status}: {count:,}" for status, count in sorted(said.items()))
            console.print(f"{kind.name}, {who}: {answers or 'nothing'}")
    console.print(f"{figures.left_mb:.0f} MB more after all; {figures.restarts} restarts. {figures.ledger}")


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=(__doc__ or "").partition("\n")[0])
    known = [*ATTACKS, ALL]
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(known)}; none is all of these")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each attack")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    asked: Any = parser.parse_args(arguments)
    if unknown := [kind for kind in asked.kinds if kind not in known]:
        parser.error(f"there is no kind {', '.join(unknown)}")
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            figures = measure(asked.kinds or known, asked.seconds, asked.seed, bar)
    except KeyboardInterrupt:
        return 130
    broken = figures.broken
    if asked.json:
        print(msgspec.json.encode({"ok": not broken, "broken": broken, "figures": figures}).decode())
    else:
        show(figures, Console())
        print("BROKEN: " + "; ".join(broken) if broken else "All promises kept.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
