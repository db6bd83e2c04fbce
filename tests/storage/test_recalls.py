"""How often the store is asked for tabs while holds wait for them."""

import asyncio
from collections import Counter
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from embedmesh.rules.clock import SystemClock
from embedmesh.storage.ledger.recalls import Recalls
from embedmesh.storage.ledger.room import Recall

WAIT_S = 0.6
KEYS = 200


async def test_an_account_with_many_keys_makes_hardly_more_recalls_than_one_with_few() -> None:
    """Each key's budget lacks something, and a request keeps a tab open: others need the store, too."""
    asked: Counter[str] = Counter()

    async def recall(what: Recall) -> int:
        asked[what.account_id] += 1
        return 1

    async def own_tabs(which: str) -> Collection[str]:
        return ()

    keeper: Any = SimpleNamespace(close_recalled=None)  # there is nothing of ours to close
    clock = SystemClock()
    recalls = Recalls(recall, own_tabs, keeper, clock)
    until_s = clock.monotonic() + WAIT_S
    waiting = [recalls.wait(Recall("many", f"key_{number}"), until_s) for number in range(KEYS)]
    assert not any(await asyncio.gather(*waiting, recalls.wait(Recall("few", None), until_s)))
    assert asked["many"] < 2 * KEYS
    assert asked["few"] > 5
    await recalls.end()
