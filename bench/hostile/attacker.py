"""One process that attacks: `python -m bench.hostile.attacker PORT SEED SECONDS KIND… < KEYS`.

KEYS is a JSON object: the key of each attacker by its name. Prints how often each got which answer, as JSON.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from random import Random

import uvloop

from bench.hostile.attacks import ATTACKS, Attacker

TOGETHER = 3.0  # all kinds together send this many times as much as one kind: more is load, and no attack
NICENESS = 10  # the clients and the node share its core, and must not wait for it


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
