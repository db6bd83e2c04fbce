"""The ledger, once the gateway has stopped: each served request has its one charge, and nothing else has any."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from bench.fault.figures import Row, Whole
from bench.fault.load import Record
from bench.rig import ledger
from bench.rig.fleet import Fleet
from embedmesh.settings import secret_path, store_path
from embedmesh.storage.secrets.secret import hash_user, read_secret


def join(fleet: Fleet, found: Iterable[Row | Whole], records: Sequence[Record]) -> int:
    """Put into each figure how many of its requests were charged, and how many wrongly. Returns how many holds are
    still open."""
    usage, opened = ledger.read(
        store_path(fleet.data_dir),
        "SELECT user_hash, cost FROM usage",
        "SELECT hold_id FROM holds WHERE ended_by IS NULL",
    )
    charges: defaultdict[str, list[int]] = defaultdict(list)
    for user_hash, cost in usage:
        charges[user_hash].append(cost)
    secret = read_secret(secret_path(fleet.data_dir))
    by_user = {each.user: each for each in records}
    for one in found:
        for user in one.users:
            costs = charges[hash_user(secret, user)]
            one.charged += len(costs)
            one.charged_wrongly += costs != ([by_user[user].cost] if by_user[user].served else [])
    return len(opened)
