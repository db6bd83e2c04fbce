"""One process that attacks: `python -m bench.hostile.attacker PORT SEED SECONDS KIND… < KEYS`.

KEYS is a JSON object: the key of each attacker by its name. Prints what each was answered, as JSON.
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

TOGETHER = 3.0  # times what one kind asks is what all kinds ask together: more is load, and no attack
NICENESS = 10  # those who ask and the node share its core, and are not to wait for it


async def attack(
    port: int, seed: int, seconds: float, kinds: list[str], keys: dict[str, str]
) -> dict[str, Counter[str]]:
    """All kinds at once by each attacker, for so long."""
    said: dict[str, Counter[str]] = {name: Counter() for name in keys}
    calm = max(1.0, len(kinds) / TOGETHER)
    tasks = [
        asyncio.ensure_future(
            ATTACKS[kind](Attacker(name, key, port, Random(f"{seed} {name} {kind}"), said[name], calm))
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
    return said


if __name__ == "__main__":
    os.nice(NICENESS)
    port, seed, seconds, *kinds = sys.argv[1:]
    found = uvloop.run(attack(int(port), int(seed), float(seconds), kinds, json.load(sys.stdin)))
    print(json.dumps(found))
