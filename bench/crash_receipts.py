"""The third log of `bench.crash`: the receipts of a second node, joined by request id with the ledger and the clients.

The node belongs to the gateways as any other machine's does, costs 1 nano-USD a token, and is not killed: its log is
whole. So what the ledger owes it for a request is how many tokens of that request's reply it made.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from bench.rig import ledger
from bench.rig.live import Live
from bench.rig.processes import EMBEDMESH, HOST, Process, free_port, wait_for
from embedmesh.rules.money import plain_usd
from embedmesh.signing.identity import Identity, node_id
from embedmesh.signing.receipt_log import ReceiptLog

NETWORKS = "127.0.0.0/8"  # where the gateways let nodes be
NANOUSD_A_TOKEN = 1
READY_S = 60.0


class Member(NamedTuple):
    """The second node: its id, its folder, its process."""

    node_id: str
    folder: Path
    process: Process


class Joined(msgspec.Struct):
    """What the join of the three logs found."""

    receipts: int
    of_delivered: int
    of_released: int  # in flight when a gateway died, or made for a reply that came from elsewhere
    of_probes: int
    owed_without_receipt: int
    owed_for_other_tokens: int
    read_without_receipt: int
    of_open_holds: int

    def broken(self) -> dict[str, int]:
        """What must be 0, in words."""
        return {
            "requests for which the ledger owes a node, without its receipt": self.owed_without_receipt,
            "requests for which the ledger owes a node more than its receipts say": self.owed_for_other_tokens,
            "replies that a client has read, without a receipt of the node that they name": self.read_without_receipt,
            "receipts of requests whose money is held still": self.of_open_holds,
            "no receipts of delivered replies at all": not self.of_delivered,
        }


@contextmanager
def joining(live: Live) -> Iterator[Member]:
    """A node that was invited, and gets work."""
    folder, port = live.data_dir.parent / "member", free_port()
    token = msgspec.json.decode(live.command("nodes", "invite").stdout)["token"]
    command = [*EMBEDMESH, "node", "--gateway", live.base_url.removesuffix("/v1"), "--join", token, "--threads", "1"]
    command += ["--data-dir", str(folder), "--address", f"https://{HOST}:{port}", "--listen", f"{HOST}:{port}"]
    command += ["--price", plain_usd(NANOUSD_A_TOKEN * 1_000_000)]
    with Process(command, folder.with_suffix(".log")) as process:
        identity = folder / "node.identity"
        if not wait_for(identity.exists, READY_S, lambda: process.lives):
            raise RuntimeError(f"the second node did not start: {process.log_tail()}")
        name = node_id(Identity.load(identity).public_key)
        if not wait_for(lambda: _is_ready(live, name), READY_S, lambda: process.lives):
            raise RuntimeError(f"the second node did not become ready: {process.log_tail()}")
        yield Member(name, folder, process)


def _is_ready(live: Live, name: str) -> bool:
    admin = {"Authorization": f"Bearer {live.credentials.admin_key}"}
    reply = httpx.get(f"{live.base_url}/admin/nodes/{name}", headers=admin, timeout=READY_S)
    return reply.status_code == 200 and bool(reply.json()["state"] == "ready")


def receipts_of(folder: Path) -> dict[str, int]:
    """Tokens by request id, from the node's own file."""
    log = ReceiptLog(folder / "receipts.log")
    tokens: Counter[str] = Counter()
    seen = 0
    while seen < log.count:
        page = log.page(seen + 1)
        for receipt in page.receipts:
            tokens[receipt.request_id] += receipt.tokens
        seen = page.count
    log.close()
    return dict(tokens)


def join_receipts(live: Live, member: Member, read: Sequence[tuple[str, str]]) -> Joined:
    """`read` has request id and node of each 200 that a client has read to its end. All has stopped."""
    receipts = receipts_of(member.folder)
    holds, payables = ledger.read(
        live.store,
        "SELECT hold_id, state FROM holds",
        "SELECT hold_id, amount, target_id FROM transfers WHERE kind = 'payable'",
    )
    ends = dict(holds)
    owed = {hold_id: amount for hold_id, amount, target in payables if target == f"node:{member.node_id}"}
    states = Counter(ends.get(request_id, "probe") for request_id in receipts)
    return Joined(
        receipts=len(receipts),
        of_delivered=states["captured"],
        of_released=states["released"],
        of_probes=states["probe"],
        owed_without_receipt=len(owed.keys() - receipts.keys()),
        owed_for_other_tokens=sum(
            nanousd > NANOUSD_A_TOKEN * receipts.get(request_id, nanousd) for request_id, nanousd in owed.items()
        ),
        read_without_receipt=sum(node == member.node_id and request_id not in receipts for request_id, node in read),
        of_open_holds=states["open"],
    )
