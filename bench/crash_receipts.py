"""The third log of `bench.crash`: the receipts of a second node, joined by request id with the ledger and the clients.

The node belongs to the gateways as any other machine's does, asks 1 nano-USD a token, and is not killed: its log is
whole. So what the ledger owes it for a request is how many tokens of that request's reply it made.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from bench.live import STOP_S, Live
from embedmesh.rules.money import plain_usd
from embedmesh.signing.identity import Identity, node_id
from embedmesh.signing.receipt_log import ReceiptLog
from embedmesh.storage.engines import engine_of

NETWORKS = "127.0.0.0/8"  # where the gateways let nodes be
NANOUSD_A_TOKEN = 1
READY_S, POLL_S = 60.0, 0.1


class Member(NamedTuple):
    """The second node: how the gateways call it, where it keeps its things, its process."""

    node_id: str
    folder: Path
    process: "subprocess.Popen[bytes]"

    def stop(self) -> None:
        """It says farewell and writes its log through."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(STOP_S)


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
            "requests of which the ledger owes a node, without its receipt": self.owed_without_receipt,
            "requests of which the ledger owes a node more than its receipts say": self.owed_for_other_tokens,
            "replies that a client has read, without a receipt of the node that they name": self.read_without_receipt,
            "receipts of requests whose money is held still": self.of_open_holds,
            "no receipts of delivered replies at all": not self.of_delivered,
        }


@contextmanager
def joining(live: Live) -> Iterator[Member]:
    """A node that was invited, and gets work."""
    folder = live.data_dir.parent / "member"
    ours = [sys.executable, "-m", "embedmesh"]
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    invite = [*ours, "nodes", "invite", "--json", "--data-dir", str(live.data_dir)]
    invited = subprocess.run(invite, stdout=subprocess.PIPE, check=True, env=os.environ | live.environment)
    token = msgspec.json.decode(invited.stdout)["token"]
    place = ["--address", f"https://127.0.0.1:{port}", "--listen", f"127.0.0.1:{port}", "--threads", "1"]
    asks = ["--price", plain_usd(NANOUSD_A_TOKEN * 1_000_000)]
    gateway = ["--gateway", live.base_url.removesuffix("/v1"), "--join", token, "--data-dir", str(folder)]
    with folder.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([*ours, "node", *gateway, *place, *asks], stdin=subprocess.DEVNULL, stderr=log)
    try:
        name = _ready(live, folder)
        yield Member(name, folder, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(STOP_S)


def _ready(live: Live, folder: Path) -> str:
    """Wait until it gets work; how it is called."""
    url = f"{live.base_url}/admin/nodes"
    admin = {"Authorization": f"Bearer {live.credentials.admin_key}"}
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        if (folder / "node.identity").exists():
            name = node_id(Identity.load(folder / "node.identity").public_key)
            shown = httpx.get(f"{url}/{name}", headers=admin, timeout=READY_S)
            if shown.status_code == 200 and shown.json()["state"] == "ready":
                return name
        time.sleep(POLL_S)
    raise RuntimeError("the second node did not become ready")


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
    db = engine_of(live.store).connect(busy_s=5, read_only=True)
    try:
        ends = dict(db.execute("SELECT hold_id, state FROM holds").fetchall())
        payables = db.execute("SELECT hold_id, amount, target_id FROM transfers WHERE kind = 'payable'").fetchall()
    finally:
        db.close()
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
