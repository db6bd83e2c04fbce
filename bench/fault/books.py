"""The ledger, once the gateway has stopped: each served request has its one charge, and nothing else has any."""

import asyncio
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from bench.fault.figures import Row, Whole
from bench.fault.load import Asked
from bench.fault.rig import Rig
from embedmesh.settings import secret_path, store_path
from embedmesh.storage.secrets.secret import hash_user, read_secret
from embedmesh.storage.sqlite.database import SqliteEngine

CHECK_S = 120.0


class Checked(NamedTuple):
    """What `ledger check` says, and how many holds are still open."""

    ok: bool
    open: int


async def check(rig: Rig) -> Checked:
    """By the command, as an operator would."""
    command = ["-m", "embedmesh", "ledger", "check", "--offline", "--json", "--data-dir", str(rig.data_dir)]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(CHECK_S):
        said, _ = await process.communicate()
    db = SqliteEngine(store_path(rig.data_dir)).connect(busy_s=5, read_only=True)
    try:
        ((left,),) = db.execute("SELECT count(*) FROM holds WHERE ended_by IS NULL").fetchall()
    finally:
        db.close()
    return Checked(process.returncode == 0 and bool(msgspec.json.decode(said)["ok"]), left)


def join(rig: Rig, found: Iterable[Row | Whole], records: Sequence[Asked]) -> None:
    """Put into each figure how many of its requests were charged, and how many wrongly."""
    db = SqliteEngine(store_path(rig.data_dir)).connect(busy_s=5, read_only=True)
    try:
        rows = db.execute("SELECT user_hash, cost FROM usage").fetchall()
    finally:
        db.close()
    charges: defaultdict[str, list[int]] = defaultdict(list)
    for user_hash, cost in rows:
        charges[user_hash].append(cost)
    secret = read_secret(secret_path(rig.data_dir))
    asked = {each.user: each for each in records}
    for one in found:
        for user in one.users:
            costs = charges[hash_user(secret, user)]
            one.charged += len(costs)
            one.charged_wrongly += costs != ([asked[user].cost] if asked[user].served else [])
