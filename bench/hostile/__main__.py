"""A gateway attacked in every way: `python -m bench.hostile [KIND …] [--seconds N] [--seed N] [--json]`.

A stranger, a key without money and a paying tenant attack at once, one kind after another and then all kinds together.
Meanwhile another tenant sends requests at a steady pace, and an operator revokes keys. Exit code 1 when a promise is
broken.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import msgspec

from bench.gateway.contenders import Measurable, Setup, started
from bench.gateway.material import made_material
from bench.gateway.measure import OTHER_CORE
from bench.hostile.attacks import ATTACKS
from bench.rig import ledger
from bench.rig.command import bench, check_names, progress, wrong
from bench.rig.http import Wire, http_request
from bench.rig.processes import HOST, is_alive, meanwhile
from embedmesh.credentials import Credentials
from embedmesh.provision.bootstrap import bootstrap

ALL = "all at once"
KINDS = (*ATTACKS, ALL)
RATE = 100.0  # requests a second of the tenant that must not notice
SETTLE_S = 3.0  # until what the attackers left is closed
REVOKE_EVERY_S = 0.25
MONEY = 10**13  # nano-USD: more than any attacker can spend
KEYS_REVOKED = 24  # of one kind, at most

P99_TIMES_MAX = 2.0
REVOKE_MAX_S = 1.0
PEAK_MB_MAX = 700.0  # above what the gateway has at its start: 512 MiB of bodies are its setting
LEFT_MB_MAX = 120.0  # of that, after the last attack: what its allocator keeps


class AttackFigures(msgspec.Struct, frozen=True):
    """What one kind of attack did. Milliseconds, MB; `answers` counts each attacker's by status."""

    name: str
    p50_ms: float
    p99_ms: float
    alone_p99_ms: float
    bad: int
    revoke_max_s: float
    revoked: int
    used_after: int  # revoked keys that still worked
    peak_mb: float
    answers: dict[str, dict[str, int]]

    @property
    def times(self) -> float:
        """The p99 of the others over what it was without an attack."""
        return self.p99_ms / self.alone_p99_ms

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        conditions: dict[str, object] = {
            f"p99 of others {self.times:.1f} times": self.times > P99_TIMES_MAX,
            f"{self.bad} of others' answers were not right": self.bad > 0,
            f"a key was revoked after {self.revoke_max_s:.2f} s": self.revoke_max_s > REVOKE_MAX_S,
            "no key was revoked": not self.revoked,
            f"{self.used_after} revoked keys still worked": self.used_after > 0,
            f"{self.peak_mb:.0f} MB more than at the start": self.peak_mb > PEAK_MB_MAX,
        }
        return [f"{self.name}: {words}" for words in wrong(conditions)]


class Figures(msgspec.Struct, frozen=True):
    """All that was found."""

    kinds: list[AttackFigures]
    restarts: int
    left_mb: float
    ledger_ok: bool

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        conditions: dict[str, object] = {
            f"{self.restarts} gateways ended": self.restarts > 0,
            f"{self.left_mb:.0f} MB more after the last attack": self.left_mb > LEFT_MB_MAX,
            "the ledger does not add up": not self.ledger_ok,
        }
        return [words for kind in self.kinds for words in kind.broken] + wrong(conditions)


def measure(kinds: Sequence[str], seconds: float = 8.0, seed: int = 1) -> Figures:
    """The whole run."""
    check_names(kinds, KINDS)
    kinds = kinds or KINDS
    os.environ["ENDS_NAP_MS"] = "1"
    with made_material() as material, started(Setup("hold"), material) as gateway:
        data_dir = gateway.folder / "data"
        operator = AdminClient(gateway.port, bootstrap(data_dir, f"http://{HOST}:{gateway.port}/v1"))
        run = _Run(gateway, operator, operator.attackers(), seconds, seed)
        doomed = {kind: [operator.key("local", "embeddings") for _ in range(KEYS_REVOKED)] for kind in kinds}
        gateway.load(2.0, RATE)
        run.before_mb = gateway.resident_mb
        found = []
        with progress() as bar:
            for kind in bar.track(kinds, description="hostile"):
                found.append(run.attack(kind, doomed[kind]))
                time.sleep(SETTLE_S)
        restarts = sum(not is_alive(pid) for pid in gateway.pids)
        left_mb = gateway.resident_mb - run.before_mb
        return Figures(found, restarts, left_mb, ledger.check(data_dir))


class AdminClient:
    """Holds the admin key."""

    def __init__(self, port: int, credentials: Credentials) -> None:
        self._port = port
        self._credentials = credentials

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The admin API, on a new connection. Raises RuntimeError for a refusal."""
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
        """The keys of a stranger, of an account without money, and of a paying one."""
        for account in ("broke", "paying"):
            self.ask("POST", "/v1/admin/accounts", {"id": account})
        self.ask("POST", "/v1/admin/accounts/paying/credits", {"amount_nanousd": MONEY, "reference": "start"})
        keys = {name: self.key(name, "embeddings", "keys")[0] for name in ("broke", "paying")}
        return {"stranger": "em_" + "s" * 43, **keys}

    def revokes(
        self, keys: Sequence[tuple[str, str]], stop: threading.Event, took: list[float], used: list[str]
    ) -> None:
        """Revoke a key now and then, and then try it. Fills `took` with seconds, `used` with keys that still worked."""
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
                took.append(time.monotonic() - begun + REVOKE_MAX_S)  # it was not revoked


class _Run:
    """What all attacks of a run share. `before_mb` is the gateway's memory at the start."""

    def __init__(
        self, gateway: Measurable, operator: AdminClient, keys: dict[str, str], seconds: float, seed: int
    ) -> None:
        self._gateway, self._operator, self._keys = gateway, operator, keys
        self._seconds, self._seed = seconds, seed
        self.before_mb = 0.0

    def attack(self, name: str, doomed: Sequence[tuple[str, str]]) -> AttackFigures:
        """One kind, or all. Meanwhile the keys `doomed` are revoked."""
        gateway, seconds = self._gateway, self._seconds
        alone = [gateway.load(seconds / 2, RATE)]
        took: list[float] = []
        used: list[str] = []
        peaks: list[float] = []

        def watch(stop: threading.Event) -> None:
            while not stop.wait(0.1):
                peaks.append(gateway.resident_mb)

        def revoke(stop: threading.Event) -> None:
            self._operator.revokes(doomed, stop, took, used)

        with self._attacking(list(ATTACKS) if name == ALL else [name]) as attacker, meanwhile(watch):
            with meanwhile(revoke):
                beside = gateway.load(seconds, RATE)
            answers, _ = attacker.communicate()
        time.sleep(SETTLE_S)
        alone.append(gateway.load(seconds / 2, RATE))
        return AttackFigures(
            name=name,
            p50_ms=beside.load.p50_us / 1e3,
            p99_ms=beside.load.p99_us / 1e3,
            alone_p99_ms=median(each.load.p99_us for each in alone) / 1e3,
            bad=beside.load.bad,
            revoke_max_s=max(took, default=0.0),
            revoked=len(took),
            used_after=len(used),
            peak_mb=max(peaks, default=0.0) - self.before_mb,
            answers=json.loads(answers),
        )

    @contextmanager
    def _attacking(self, kinds: Sequence[str]) -> "Iterator[subprocess.Popen[bytes]]":
        numbers = str(self._gateway.port), str(self._seed), str(self._seconds + 3.0)
        command = [sys.executable, "-m", "bench.hostile.attacks", *numbers, *kinds]
        pinned = ["taskset", "--cpu-list", str(OTHER_CORE), *command]
        with subprocess.Popen(pinned, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(self._keys).encode())
            process.stdin.close()
            process.stdin = None  # `communicate` is not to flush it
            try:
                yield process
            finally:
                process.kill()


if __name__ == "__main__":
    bench(measure, kinds=f"of {', '.join(KINDS)}; none is all of these", seconds="of each attack")
