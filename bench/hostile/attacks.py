"""Ways to attack a gateway, each as a coroutine that goes on until it is cancelled.

Three attackers do each at once: a stranger without a valid key; a key whose account has no money; and a paying tenant.
Paces are bounded: the question is what one attacker's request costs others, not how many packets a machine can take.

As a process: `python -m bench.hostile.attacks PORT SEED SECONDS KIND… < KEYS`, where KEYS is a JSON object: the key of
each attacker by its name. It prints how often each got which answer, as JSON.
"""

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

import msgspec
import uvloop

from bench.rig.http import MODEL, http_request
from bench.rig.processes import HOST
from embedmesh.rules.membership import STATEMENT, Offer, Registration, Statement
from embedmesh.signing.identity import Identity

TOGETHER = 3.0  # all kinds together send this many times as much as one kind: more is load, and no attack
NICENESS = 10  # the clients and the node share its core, and must not wait for it
ANSWER_S = 10.0  # an attacker waits no longer for an answer
BODY_BYTES = 4 * 1024 * 1024 - 1024  # nearly the most that is taken
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


class Attacker(NamedTuple):
    """An attacker: its name, its key, and where. `answers` counts them by status.

    `calm` is how many times slower it is than it might be.
    """

    name: str
    key: str
    port: int
    dice: Random
    answers: Counter[str]
    calm: float = 1.0


Attack = Callable[[Attacker], Awaitable[None]]


async def tokenise(one: Attacker) -> None:
    """Bodies whose tokens are expensive to count."""
    words = ["".join(one.dice.choices(ascii_lowercase, k=99)) for _ in range(2_000)]
    bodies = [
        json.dumps({"model": MODEL, "input": text}).encode()
        for text in (
            "!" * 1_000_000,
            " ".join(words),
            " ".join(words[:41]),
            "a" * BODY_BYTES,
            "\u4e2d" * 300_000,
            "é" * 500_000,
            ["!" * 2_000] * 2_000,
        )
    ]
    bodies.append(json.dumps({"model": MODEL, "input": [one.dice.randrange(100_000) for _ in range(500_000)]}).encode())
    bodies.append(b"[" * 1_000_000)
    await _paced(one, 0.1, lambda: _ask(one, _embed(one, one.dice.choice(bodies))))


async def half_bodies(one: Attacker) -> None:
    """A body of 4 MiB that never ends, on many connections."""
    whole = _embed(one, b" " * BODY_BYTES)
    await _many(one, 50, lambda: _hold(one, whole[: len(whole) // 2]))


async def connections(one: Attacker) -> None:
    """Connections that send nothing, or half a head."""
    await _many(one, 400, lambda: _hold(one, one.dice.choice([b"", b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nX: "])))


async def unknown_keys(one: Attacker) -> None:
    """Keys that do not exist, a new one each time."""

    def guess() -> Awaitable[None]:
        key = "em_" + "".join(one.dice.choices(ascii_lowercase, k=43))
        return _ask(one, http_request("POST", "/v1/embeddings", b'{"model":"m","input":"x"}', key=key))

    await _paced(one, 0.005, guess)


async def registrations(one: Attacker) -> None:
    """New nodes that register, one after another, each with as large a statement as it may send."""
    offers = tuple(Offer(f"model-{number}" * 10, 384, 512, "0" * 64, "exact") for number in range(64))

    async def join() -> None:
        greeting = await _exchange(one, http_request("GET", "/v1/nodes"))
        if not greeting.startswith(b"HTTP/1.1 200"):
            one.answers[_status(greeting)] += 1
            return
        nonce = base64.b64decode(json.loads(greeting.partition(b"\r\n\r\n")[2])["nonce"])
        identity = Identity(one.dice.randbytes(32))
        statement = msgspec.json.encode(
            Statement(
                version=1,
                public_key=identity.public_key,
                address="https://198.51.100.7:8443",
                certificate=b"c" * 8_000,
                country="",
                offers=offers,
                inputs_max=2_048,
                ephemeral=one.dice.randbytes(32),
                nonce=nonce,
                time_ms=time.time_ns() // 1_000_000,
            )
        )
        registration = Registration(statement, identity.sign(STATEMENT, statement))
        await _ask(one, http_request("POST", "/v1/nodes", msgspec.json.encode(registration)))

    await _paced(one, 0.02, join)


async def heartbeats(one: Attacker) -> None:
    """Large reports of nodes that do not exist, with invalid signatures."""
    body = b'{"tokens_waiting":0,"tokens_per_s":1,"receipts":[' + b" " * 500_000
    fields = {"Signature": "sig=:" + "A" * 44 + ":", "Signature-Input": 'sig=("@method")', "Content-Digest": "x"}

    def beat() -> Awaitable[None]:
        node = "node_" + one.dice.randbytes(16).hex()
        return _ask(one, http_request("POST", f"/v1/nodes/{node}/heartbeat", body, headers=fields))

    await _paced(one, 0.02, beat)


async def account_pages(one: Attacker) -> None:
    """The account's own pages, again and again."""
    paths = ("/v1/account", "/v1/account/usage", "/v1/account/entries", "/v1/account/keys", "/v1/models", "/metrics")
    await _paced(one, 0.01, lambda: _ask(one, http_request("GET", one.dice.choice(paths), key=one.key)))


async def new_keys(one: Attacker) -> None:
    """Keys without end."""
    body = json.dumps({"name": "x" * 60, "scopes": ["embeddings"]}).encode()
    await _paced(one, 0.05, lambda: _ask(one, http_request("POST", "/v1/account/keys", body, key=one.key)))


async def deaf_readers(one: Attacker) -> None:
    """Large replies that are not read."""
    body = json.dumps({"model": MODEL, "input": [f"{one.name} {number}" for number in range(1_000)]}).encode()
    await _many(one, 16, lambda: _hold(one, _embed(one, body), small_buffer=True))


async def hang_ups(one: Attacker) -> None:
    """Requests whose caller is gone before the answer, with and without an SDK's header that counts its retries."""

    async def leave() -> None:
        body = json.dumps({"model": MODEL, "input": f"{one.dice.random()} is not waited for"}).encode()
        tries = one.dice.choice([{}, {"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "1"}])
        _, writer = await asyncio.open_connection(HOST, one.port)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.write(_embed(one, body, **tries))
        await writer.drain()
        await asyncio.sleep(one.dice.random() * 0.005)
        writer.close()
        one.answers["left"] += 1

    await _paced(one, 0.01, leave)


async def same_key_twice(one: Attacker) -> None:
    """One Idempotency-Key on many connections at one time, with the same body and with others."""

    async def ask() -> None:
        body = json.dumps({"model": MODEL, "input": [f"{one.dice.randrange(3)} again"] * 64}).encode()
        await _ask(one, _embed(one, body, **{"Idempotency-Key": f"attack-{one.dice.randrange(4)}"}))

    await _paced(one, 0.01, ask)


async def broken_http(one: Attacker) -> None:
    """Bytes that are not HTTP, too long, or read differently by different parsers."""
    messages = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 5_000 + b"\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 4_000,
    ]
    await _paced(one, 0.01, lambda: _ask(one, one.dice.choice(messages)))


ATTACKS: dict[str, Attack] = {
    attack.__name__.replace("_", " "): attack
    for attack in (
        tokenise,
        half_bodies,
        connections,
        unknown_keys,
        registrations,
        heartbeats,
        account_pages,
        new_keys,
        deaf_readers,
        hang_ups,
        same_key_twice,
        broken_http,
    )
}


def _embed(one: Attacker, body: bytes, **headers: str) -> bytes:
    return http_request("POST", "/v1/embeddings", body, key=one.key, headers=headers)


async def _paced(one: Attacker, every_s: float, act: Callable[[], Awaitable[None]]) -> None:
    """Act about every `every_s`, whatever became of the acts before; at most 64 at one time."""
    running: set[asyncio.Task[None]] = set()
    try:
        while True:
            if len(running) < 64:
                task = asyncio.create_task(_guarded(one, act))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.sleep(one.calm * every_s * (0.5 + one.dice.random()))
    finally:
        for task in running:
            task.cancel()


async def _many(one: Attacker, count: int, act: Callable[[], Awaitable[None]]) -> None:
    """`count` acts at one time, each begun again when it ends; not more than some twenty a second."""

    async def again() -> None:
        while True:
            await _guarded(one, act)
            await asyncio.sleep(one.dice.random() * count / 20)

    await asyncio.gather(*(again() for _ in range(max(1, round(count / one.calm)))))


async def _guarded(one: Attacker, act: Callable[[], Awaitable[None]]) -> None:
    try:
        await act()
    except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
        one.answers[type(error).__name__] += 1


async def _ask(one: Attacker, request: bytes) -> None:
    one.answers[_status(await _exchange(one, request))] += 1


async def _exchange(one: Attacker, request: bytes) -> bytes:
    """The reply's first bytes within ANSWER_S: its head and what came with it."""
    reader, writer = await asyncio.open_connection(HOST, one.port)
    try:
        async with asyncio.timeout(ANSWER_S):
            writer.write(request)
            with contextlib.suppress(ConnectionError):  # refused before it had all
                await writer.drain()
            return await reader.read(65_536)
    finally:
        writer.close()


async def _hold(one: Attacker, data: bytes, *, small_buffer: bool = False) -> None:
    """Send, then send and read nothing until the other side closes."""
    sock = socket.socket()
    if small_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(sock, (HOST, one.port))
        one.answers["held"] += 1
        async with asyncio.timeout(ANSWER_S):
            await loop.sock_sendall(sock, data)
            if small_buffer:
                await asyncio.sleep(ANSWER_S)
            else:
                one.answers[_status(await loop.sock_recv(sock, 4_096))] += 1
    finally:
        sock.close()


def _status(reply: bytes) -> str:
    return reply[9:12].decode("latin-1") if reply.startswith(b"HTTP/1.") else "closed" if not reply else "?"


async def attack(
    port: int, seed: int, seconds: float, kinds: list[str], keys: dict[str, str]
) -> dict[str, Counter[str]]:
    """All kinds at once by each attacker, for `seconds`."""
    answers: dict[str, Counter[str]] = {name: Counter() for name in keys}
    calm = max(1.0, len(kinds) / TOGETHER)
    tasks = [
        asyncio.ensure_future(
            ATTACKS[kind](Attacker(name, key, port, Random(f"{seed} {name} {kind}"), answers[name], calm))
        )
        for name, key in keys.items()
        for kind in kinds
    ]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return answers


if __name__ == "__main__":
    os.nice(NICENESS)
    port, seed, seconds, *kinds = sys.argv[1:]
    found = uvloop.run(attack(int(port), int(seed), float(seconds), kinds, json.load(sys.stdin)))
    print(json.dumps(found))
