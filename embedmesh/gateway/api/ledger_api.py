"""`/v1/admin`: requests with their money, what nodes earned and were paid, and the check of the ledger."""

import time
from typing import Annotated

import msgspec
from msgspec import Meta

from embedmesh.gateway.api.accounts_api import Reference
from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.explained_replies import (
    BoughtReply,
    ExplainedBatchReply,
    ExplainedReply,
    LockReply,
    MeteredReply,
    MoveReply,
    NoteReply,
    TabReply,
)
from embedmesh.gateway.api.key_bodies import Id
from embedmesh.gateway.api.replies import LedgerReport, Moved, PayableReply, ReplyList, reply_of
from embedmesh.gateway.api.routes import ADMIN_KEY, READ_KEY, Api, ApiCall, Route
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import NotFound
from embedmesh.rules.metrics import MetricReadings
from embedmesh.storage.books import Books
from embedmesh.storage.books.reports import Bought


class CheckQuery(msgspec.Struct, frozen=True):
    head: (
        Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="A head of the chain that was noted before.")] | None
    ) = None


class RefundRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much to give back: null is all that was not given back yet; once for each reference."""

    reference: Reference
    amount_nanousd: int | None = None


class PayoutRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Money that a node's operator was paid; once for each reference."""

    node: Id
    amount_nanousd: int
    reference: Reference


class LedgerApi(Api):
    """Handlers for operators. `checks` are books for the long check of the ledger, so that no other call waits."""

    TAG = "Administration"

    def __init__(self, books: BooksThread, checks: BooksThread, bodies: BodyBudget) -> None:
        self._books = books
        self._checks = checks
        self.bodies = bodies
        self._checked: dict[tuple[str, ...], float] = {("right",): 0, ("broken",): 0}
        self._checked_s: dict[tuple[str, ...], float] = {}  # when, in Unix seconds

    def readings(self) -> MetricReadings:
        return {"ledger_checks": self._checked, "ledger_checked_timestamp_seconds": self._checked_s}

    async def explain_request(self, call: ApiCall[None, None]) -> ExplainedReply:
        """Explain a request.

        What was held for it, how that ended, what was bought, and all money that was moved. For the number of a lock:
        the request that has used it.
        """
        found = await self._books.ask(lambda books: books.reports.explain(call.parameter), viewer=call.viewer)
        bought = None if found.bought is None else _bought_reply(found.bought)
        moves = tuple(reply_of(MoveReply, move) for move in found.moves)
        lock = None if found.lock is None else reply_of(LockReply, found.lock)
        note = None if found.note is None else reply_of(NoteReply, found.note)
        return reply_of(ExplainedReply, found, bought=bought, moves=moves, lock=lock, note=note)

    async def explain_tab(self, call: ApiCall[None, None]) -> TabReply:
        """Explain a tab.

        What it was opened for, how it ended, and the latest money that was moved for it. A batch has a tab of its own,
        with its own id.
        """
        found = await self._books.ask(lambda books: books.reports.explain_tab(call.parameter), viewer=call.viewer)
        batch = None if found.batch is None else reply_of(ExplainedBatchReply, found.batch)
        return reply_of(TabReply, found, moves=tuple(reply_of(MoveReply, move) for move in found.moves), batch=batch)

    async def refund_request(self, call: ApiCall[RefundRequest, None]) -> Moved:
        """Refund a request.

        All of its cost, or a part. Its nodes keep what they earned. Once for each reference: `applied` is false if that
        was done before.
        """
        amount, reference = call.body.amount_nanousd, call.body.reference
        applied, refunded = await self._books.ask(
            lambda books: books.accounts.refund(call.parameter, amount, reference), by=call.by
        )
        return Moved(applied, refunded, reference)

    async def list_payables(self, call: ApiCall[None, None]) -> ReplyList[PayableReply]:
        """List what nodes earned and were not paid."""
        found = await self._books.ask(lambda books: books.accounts.payables(), viewer=call.viewer)
        return ReplyList("list", [reply_of(PayableReply, row) for row in found])

    async def pay_out(self, call: ApiCall[PayoutRequest, None]) -> Moved:
        """Record that a node's operator was paid.

        Once for each reference: `applied` is false if that was done before.
        """
        node, amount, reference = call.body.node, call.body.amount_nanousd, call.body.reference
        applied = await self._books.ask(lambda books: books.accounts.pay_out(node, amount, reference), by=call.by)
        return Moved(applied, amount, reference)

    async def check_ledger(self, call: ApiCall[None, CheckQuery]) -> LedgerReport:
        """Check that all money adds up.

        A large store takes longer than a request may: use `embedmesh ledger check --offline` then.
        """
        head = call.query.head

        def read(books: Books) -> LedgerReport:
            report = books.check()
            known = None if head is None else books.knew_head(head)
            return reply_of(LedgerReport, report, ok=report.ok and known is not False, head_known=known)

        report = await self._checks.ask(read, viewer=call.viewer)
        result = "right" if report.ok else "broken"
        self._checked[result,] += 1
        self._checked_s[result,] = time.time()
        return report

    ROUTES = (
        Route("GET", "/v1/admin/requests/{request_id}", READ_KEY, explain_request),
        Route("GET", "/v1/admin/tabs/{tab_id}", READ_KEY, explain_tab),
        Route("POST", "/v1/admin/requests/{request_id}/refund", ADMIN_KEY, refund_request),
        Route("GET", "/v1/admin/payables", READ_KEY, list_payables),
        Route("POST", "/v1/admin/payouts", ADMIN_KEY, pay_out, failures=(NotFound,)),
        Route("GET", "/v1/admin/ledger", READ_KEY, check_ledger),
    )


def _bought_reply(bought: Bought) -> BoughtReply:
    return reply_of(BoughtReply, bought, meters=[reply_of(MeteredReply, each) for each in bought.meters])
