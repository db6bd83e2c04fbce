"""What `bench.crash` found: the clients' logs joined, request by request, with the ledger."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from bench.crash_receipts import Joined, Member, join_receipts
from bench.rig import ledger
from bench.rig.command import wrong
from bench.rig.live import Live
from embedmesh.settings import secret_path
from embedmesh.storage.secrets.secret import hash_user, read_secret

KINDS = ("gateway", "node", "worker")
POSTGRES = "postgres"  # also killed, where the store is on a server
BACK_S_MAX = 3.0  # the promise: a killed service is back by then
UNCHARGED_A_DEATH = 12  # twice the clients: a reply each in flight, and one each of the last batch, a few milliseconds
APART = "apart"  # the user of requests that are not part of the load
ENDS = "SELECT coalesce(ended_by, 'open'), count(*) FROM holds GROUP BY 1"
TABS = """
    SELECT
        count(*), coalesce(sum(requests), 0), coalesce(sum(CASE state WHEN 'recovered' THEN 1 ELSE 0 END), 0),
        coalesce(sum(CASE state WHEN 'expired' THEN 1 ELSE 0 END), 0),
        coalesce(sum(CASE WHEN ended_ms IS NULL THEN 1 ELSE 0 END), 0)
    FROM tabs
"""
LEFT = """
    SELECT coalesce(sum(amount), 0) FROM holds WHERE ended_by = 'recover'
    UNION ALL SELECT coalesce(sum(amount - captured), 0) FROM tabs WHERE state = 'recovered'
"""
USAGE = "SELECT user_hash, cost, hold_id FROM usage"


class Delivered(NamedTuple):
    """A 200 that a client has read to its last byte."""

    user: str
    cost: int
    request_id: str  # the ledger's
    node_id: str  # that made most of it


class Back(NamedTuple):
    """Seconds from a kill to the first 200 of a request that was sent after it; None if it never came."""

    kind: str
    seconds: float | None


class Figures(msgspec.Struct):
    """What was found. Money in nano-USD, times in seconds."""

    kills: int
    seconds: float
    delivered: int
    refused: dict[str, int]
    wrong_replies: int
    back_s: dict[str, dict[str, float]]
    never_back: int
    delivered_nanousd: int
    captured_nanousd: int
    charged_not_delivered: int
    charged_twice: int
    charged_another_cost: int
    delivered_not_charged: int
    delivered_not_charged_nanousd: int
    released_at_a_start: int
    expired: int
    left_open: int
    tabs: int
    under_tabs: int  # requests
    tabs_recovered: int
    left_nanousd: int  # of holds and tabs that were released at a start
    ledger_check_ok: bool
    internal_errors_logged: int
    charged_another_request: int
    receipts: Joined | None = None

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        slowest = max((each["max"] for each in self.back_s.values()), default=0.0)
        conditions: dict[str, object] = {
            f"{self.charged_not_delivered} charges for replies that no client got": self.charged_not_delivered,
            f"{self.charged_twice} replies were charged twice": self.charged_twice,
            f"{self.charged_another_cost} charges differ from what the reply said": self.charged_another_cost,
            "what went uncharged is more than what dead gateways had left": self.delivered_not_charged_nanousd
            > self.left_nanousd,
            f"{self.delivered_not_charged} replies went uncharged": self.delivered_not_charged
            > UNCHARGED_A_DEATH * self.back_s.get("gateway", {}).get("kills", 0)
            + UNCHARGED_A_DEATH * self.back_s.get(POSTGRES, {}).get("kills", 0),
            "the sums do not agree": self.captured_nanousd + self.delivered_not_charged_nanousd
            != self.delivered_nanousd,
            f"{self.wrong_replies} replies were wrong": self.wrong_replies,
            f"after {self.never_back} kills the service did not come back": self.never_back,
            f"the service was away for {slowest:.2f} s": slowest > BACK_S_MAX,
            "`ledger check` found something": not self.ledger_check_ok,
            f"{self.left_open} holds or tabs are still open": self.left_open,
            f"{self.expired} holds or tabs had to expire": self.expired,
            f"{self.internal_errors_logged} internal errors were logged": self.internal_errors_logged,
            "nothing was delivered": not self.delivered,
            f"{self.charged_another_request} replies name another request": self.charged_another_request,
        }
        if self.receipts is not None:
            conditions |= {f"{count} {words}": count for words, count in self.receipts.broken().items()}
        return wrong(conditions)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """How many, their median and their maximum."""
    return {"kills": len(seconds), "median": statistics.median(seconds), "max": max(seconds)}


def join(
    live: Live,
    delivered: Sequence[Delivered],
    refused: Counter[str],
    wrong_replies: int,
    backs: Sequence[Back],
    seconds: float,
    member: Member | None,
) -> Figures:
    """Clients' logs against the ledger, and a node's, if any. Requests of the user APART are no part of it."""
    ends_rows, usage, [tabs], left = ledger.read(live.store, ENDS, USAGE, TABS, LEFT)
    ends = dict(ends_rows)
    secret = read_secret(secret_path(live.data_dir))
    apart = hash_user(secret, APART)
    charges = [(user, cost) for user, cost, _ in usage if user != apart]
    charged = {user: request_id for user, _, request_id in usage if user != apart}
    read = {hash_user(secret, each.user): each.cost for each in delivered}
    unpaid = [cost for user, cost in read.items() if user not in charged]
    kinds = (*KINDS, POSTGRES)
    took = {kind: [b.seconds for b in backs if b.kind == kind and b.seconds is not None] for kind in kinds}
    return Figures(
        kills=len(backs),
        seconds=seconds,
        delivered=len(read),
        refused=dict(refused.most_common()),
        wrong_replies=wrong_replies,
        back_s={kind: summary(each) for kind, each in took.items() if each},
        never_back=sum(back.seconds is None for back in backs),
        delivered_nanousd=sum(read.values()),
        captured_nanousd=sum(cost for _, cost in charges),
        charged_not_delivered=len(charged.keys() - read.keys()),
        charged_twice=len(charges) - len(charged),
        charged_another_cost=sum(read.get(user, cost) != cost for user, cost in charges),
        delivered_not_charged=len(unpaid),
        delivered_not_charged_nanousd=sum(unpaid),
        released_at_a_start=ends.get("recover", 0),
        expired=ends.get("expire", 0) + tabs[3],
        left_open=ends.get("open", 0) + tabs[4],
        tabs=tabs[0],
        under_tabs=tabs[1],
        tabs_recovered=tabs[2],
        left_nanousd=sum(int(row[0]) for row in left),
        ledger_check_ok=ledger.check(live.data_dir, live.environment),
        internal_errors_logged=live.process.log.read_text(errors="replace").count("internal error"),
        charged_another_request=sum(
            charged.get(hash_user(secret, each.user), each.request_id) != each.request_id for each in delivered
        ),
        receipts=None
        if member is None
        else join_receipts(live, member, [(each.request_id, each.node_id) for each in delivered]),
    )
