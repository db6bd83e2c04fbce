"""Accounts: how much money each has and may owe; credits, refunds and payouts."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from embedmesh.rules.acts import Verb, changed
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import InsufficientQuota, InvalidValue, NotFound
from embedmesh.rules.limits import PAGE_ROWS_MAX, REFERENCE_CHARS_MAX
from embedmesh.rules.money import AMOUNT_MAX_NANOUSD, format_usd
from embedmesh.storage.books.session import BooksSession
from embedmesh.storage.db import Row
from embedmesh.storage.ledger.charge_holds import REVENUE, node_account
from embedmesh.storage.sql import ACCOUNTS_SQL, REPORTS_SQL

ACCOUNT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a colon would name one of our own accounts
REFERENCE_USED = "That reference was used for something else."
CUSTOMER_KIND, CREDIT_SOURCE, PAYOUTS = "customer", "credit_source", "payouts"


class Account(msgspec.Struct, frozen=True):
    """Where money is. Amounts are nano-USD."""

    account_id: str
    kind: str
    balance_nanousd: int
    held_nanousd: int
    created_ms: int
    credit_limit_nanousd: int = 0
    cache: CachePolicy = CachePolicy.OFF

    @property
    def available_nanousd(self) -> int:
        """What may be held for further requests."""
        return self.balance_nanousd + self.credit_limit_nanousd - self.held_nanousd


class NodeBalance(msgspec.Struct, frozen=True):
    """What a node has earned and was not paid out, in nano-USD."""

    node_id: str
    balance_nanousd: int


class AccountBooks:
    """Accounts of one store. Every method raises StoreUnavailable, too."""

    def __init__(self, session: BooksSession) -> None:
        self._session = session

    def create(
        self, account_id: str, *, credit_limit_nanousd: int = 0, cache: CachePolicy = CachePolicy.OFF
    ) -> Account:
        """Make a customer's account, prepaid or postpaid. Raises InvalidValue: the id is taken, or none."""
        if not ACCOUNT_ID.fullmatch(account_id):
            raise InvalidValue("An account id has 1 to 64 letters, digits, dots, dashes or underscores.", param="id")
        with self._session.transaction():
            row = {"account_id": account_id, "kind": CUSTOMER_KIND, "cache": cache.value}
            now_ms = self._session.clock.unix_ms()
            if self._session.run(ACCOUNTS_SQL["insert_account"], row | {"now_ms": now_ms}) == 0:
                raise InvalidValue(f"There is an account {account_id} already.", param="id")
            if credit_limit_nanousd:
                self._set_limit(account_id, credit_limit_nanousd)
            made = self.find(account_id)
            self._session.note(Verb.ACCOUNT_CREATE, account_id, changed({}, _terms(made)))
            return made

    def find(self, account_id: str) -> Account:
        """One account. Raises NotFound."""
        row = self._session.row(ACCOUNTS_SQL["find_account"], {"account_id": account_id})
        if row is None:
            raise NotFound(f"There is no account {account_id[:64]}.")
        return _account(row)

    def list(self, *, after: Account | None = None, rows_max: int = PAGE_ROWS_MAX) -> Sequence[Account]:
        """Accounts, oldest first, our own and the nodes' among them; from `after` on."""
        page = {"after_ms": -1, "after_id": "", "rows_max": rows_max}
        if after is not None:
            page |= {"after_ms": after.created_ms, "after_id": after.account_id}
        return [_account(row) for row in self._session.rows(ACCOUNTS_SQL["list_accounts"], page)]

    def change(
        self, account_id: str, *, credit_limit_nanousd: int | None = None, cache: CachePolicy | None = None
    ) -> Account:
        """Change both, or nothing; None stays as it is. Raises NotFound, InvalidValue."""
        with self._session.transaction(account_id):
            before = self.customer(account_id)
            if credit_limit_nanousd is not None:
                self._set_limit(account_id, credit_limit_nanousd)
            if cache is not None:
                self._session.run(ACCOUNTS_SQL["set_cache"], {"account_id": account_id, "cache": cache.value})
            after = self.find(account_id)
            self._session.note(Verb.ACCOUNT_CHANGE, account_id, changed(_terms(before), _terms(after)))
            return after

    def credit(self, account_id: str, amount_nanousd: int, reference: str) -> bool:
        """Give (or, when negative, take back) money, once for each reference: False if that was applied before.

        Raises NotFound, InsufficientQuota (less is available than is to be taken back) and InvalidValue (the reference
        was used for something else; the account is no customer's; the amount is zero or too much).
        """
        if not 0 < abs(amount_nanousd) <= AMOUNT_MAX_NANOUSD:
            raise InvalidValue(
                f"A credit is an amount other than zero, at most {format_usd(AMOUNT_MAX_NANOUSD)}.",
                param="amount_nanousd",
            )
        source, target = (CREDIT_SOURCE, account_id) if amount_nanousd > 0 else (account_id, CREDIT_SOURCE)
        with self._session.transaction(account_id, CREDIT_SOURCE):
            account = self.customer(account_id)
            if self._applied("credit", source, target, abs(amount_nanousd), reference):
                return False
            if account.available_nanousd + amount_nanousd < 0:
                has = format_usd(account.available_nanousd)
                raise InsufficientQuota(
                    f"{account_id} has {has} available; {format_usd(-amount_nanousd)} cannot be taken back."
                )
            if account.balance_nanousd + amount_nanousd > AMOUNT_MAX_NANOUSD:
                raise InvalidValue(
                    f"{account_id} would have more than an account can: {format_usd(AMOUNT_MAX_NANOUSD)}."
                )
            self._move("credit", source, target, abs(amount_nanousd), None, reference)
            balances = [account.balance_nanousd, account.balance_nanousd + amount_nanousd]
            said = {"amount_nanousd": amount_nanousd, "reference": reference, "balance_nanousd": balances}
            self._session.note(Verb.ACCOUNT_CREDIT, account_id, said)
            return True

    def refund(self, hold_id: str, amount_nanousd: int | None, reference: str) -> tuple[bool, int]:
        """Give back what a request cost, or some of it, once for each reference; the nodes keep their shares.

        No amount is all that was not given back yet. Returns whether it was done now, and how much it was. Raises
        NotFound, InvalidValue.
        """
        account_id, captured, of_tab = self._charged(hold_id)
        with self._session.transaction(account_id, REVENUE):
            before = self._used(reference)
            if before is not None:
                if before[::4] == ("refund", hold_id) and amount_nanousd in (None, before[3]):
                    return False, int(before[3])
                raise InvalidValue(REFERENCE_USED, param="reference")
            moved = self._session.rows(REPORTS_SQL["transfers_of_request"], {"hold_id": hold_id} | of_tab)
            left = captured - sum(amount for _, kind, _, _, amount, *_ in moved if kind == "refund")
            amount = left if amount_nanousd is None else amount_nanousd
            if not 0 < amount <= left:
                raise InvalidValue(f"{format_usd(left)} of this request can be given back.", param="amount_nanousd")
            self._move("refund", REVENUE, account_id, amount, hold_id, reference, of_tab["tab_id"])
            said = {"amount_nanousd": amount, "reference": reference, "account": account_id}
            self._session.note(Verb.REQUEST_REFUND, hold_id, said)
            return True, amount

    def payables(self) -> Sequence[NodeBalance]:
        """What each node has earned and was not paid out."""
        rows = self._session.rows(REPORTS_SQL["payables"])
        return [NodeBalance(account_id.partition(":")[2], balance) for account_id, balance in rows]

    def pay_out(self, node_id: str, amount_nanousd: int, reference: str) -> bool:
        """Note that a node's operator was paid, once for each reference: False if that was noted before.

        Raises NotFound, InvalidValue.
        """
        account_id = node_account(node_id)
        with self._session.transaction(account_id, PAYOUTS):
            account = self.find(account_id)
            if self._applied("payout", account_id, PAYOUTS, amount_nanousd, reference):
                return False
            if not 0 < amount_nanousd <= account.balance_nanousd:
                raise InvalidValue(
                    f"{node_id[:64]} has earned {format_usd(account.balance_nanousd)} that was not paid out.",
                    param="amount",
                )
            self._move("payout", account_id, PAYOUTS, amount_nanousd, None, reference)
            said = {"amount_nanousd": amount_nanousd, "reference": reference}
            self._session.note(Verb.NODE_PAYOUT, node_id, said)
            return True

    def customer(self, account_id: str) -> Account:
        """One account, a customer's. Raises NotFound, InvalidValue."""
        account = self.find(account_id)
        if account.kind != CUSTOMER_KIND:
            raise InvalidValue(f"{account_id} is no customer's account.")
        return account

    def _set_limit(self, account_id: str, limit_nanousd: int) -> None:
        if not 0 <= limit_nanousd <= AMOUNT_MAX_NANOUSD:
            raise InvalidValue(
                f"A credit limit is $0.00 to {format_usd(AMOUNT_MAX_NANOUSD)}.", param="credit_limit_nanousd"
            )
        row = {"account_id": account_id, "credit_limit": limit_nanousd}
        if self._session.run(ACCOUNTS_SQL["set_credit_limit"], row) == 0:
            account = self.find(account_id)
            owed = format_usd(account.held_nanousd - account.balance_nanousd)
            raise InvalidValue(f"{account_id} owes {owed}, running requests included.", param="credit_limit_nanousd")

    def _used(self, reference: str) -> Row | None:
        """What was done under a reference. Raises InvalidValue where it is none."""
        if not 0 < len(reference) <= REFERENCE_CHARS_MAX:
            raise InvalidValue(f"A reference has 1 to {REFERENCE_CHARS_MAX} characters.", param="reference")
        return self._session.row(ACCOUNTS_SQL["find_reference"], {"reference": reference})

    def _applied(self, kind: str, source: str, target: str, amount: int, reference: str) -> bool:
        """Whether this very transfer was made under the reference. Raises InvalidValue where another was."""
        before = self._used(reference)
        if before is None:
            return False
        if tuple(before) != (kind, source, target, amount, None):
            raise InvalidValue(REFERENCE_USED, param="reference")
        return True

    def _charged(self, hold_id: str) -> tuple[str, int, dict[str, Any]]:
        """Who was charged for a request, how much, and with which settlement of which tab. Raises NotFound."""
        hold = self._session.row(REPORTS_SQL["one_hold"], {"hold_id": hold_id})
        if hold is not None and hold[4] == "captured":
            return hold[1], hold[6], {"tab_id": None, "settlement": None}
        settled = self._session.row(REPORTS_SQL["request_under_tab"], {"hold_id": hold_id})
        if settled is None:
            raise NotFound(f"No request {hold_id[:64]} was charged, as far as usage is kept.")
        account_id, _, cost, *_, tab_id, settlement = settled
        return account_id, cost, {"tab_id": tab_id, "settlement": settlement}

    def _move(
        self,
        kind: str,
        source: str,
        target: str,
        amount: int,
        hold_id: str | None,
        reference: str,
        tab_id: str | None = None,
    ) -> None:
        row = {"kind": kind, "source_id": source, "target_id": target, "amount": amount, "hold_id": hold_id}
        row |= {"reference": reference, "now_ms": self._session.clock.unix_ms(), "tab_id": tab_id}
        self._session.run(ACCOUNTS_SQL["insert_referenced"], row)


def _terms(account: Account) -> dict[str, Any]:
    return {"credit_limit_nanousd": account.credit_limit_nanousd, "cache": account.cache.value}


def _account(row: Row) -> Account:
    """The columns stand in the order of the fields."""
    fields = (*row[:-1], CachePolicy(row[-1]))
    return Account(*fields)
