"""What must be true after a world: the ledger compared with what callers got, and with itself.

A caller that was handed a part of a reply has paid for it; one that was handed nothing has not.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from bench.lives.journal import Attempt, DeliveryNote, Journal, SlotNote
from bench.lives.judge_streams import Ended, StreamJudge
from bench.lives.locking import LOCKS_OF_ACCOUNT, LOCKS_OF_KEY, SEALED
from bench.lives.talking import CHAT, STREAM, terms_of
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import IdempotencyConflict, InsufficientQuota
from embedmesh.rules.generation import TokenCounts
from embedmesh.rules.limits import UNREAD_S
from embedmesh.rules.lock_failures import KeyMismatch, LockExpired, LockNotFound, LockUsed
from embedmesh.rules.money import cost_nanousd
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import Key

RECALL_S = 1.4  # so long a hold waits at least for tabs of its account, if one stays open
IN_FLIGHT_S_MAX = 30.0  # a capture is durable in milliseconds, or after the disk's trouble
REVOKED_S = 1.0
NOTHING = {"prompt_tokens": 0, "completion_tokens": 0}
BALANCE = "The account's balance"
ENDED_BY_OTHERS = ("recovered", "expired")  # tabs whose gateway died


class Tab(NamedTuple):
    """A tab as the ledger has it."""

    account: str
    key_id: str
    amount: int
    captured: int
    state: str
    opened_ms: int
    ended_ms: int | None


class LockRow(NamedTuple):
    """A lock as the store has it."""

    hold_id: str
    account: str
    key_id: str
    created_ms: int
    expires_ms: int
    used_ms: int | None


class Judge:
    """Looks at one world that has ended. `limits` are the credit limits by account."""

    def __init__(
        self, books: Books, journal: Journal, start_ms: int, keys: dict[str, Key], limits: dict[str, int]
    ) -> None:
        self._books = books
        self._journal = journal
        self._start_ms = start_ms
        self._keys = keys
        self._limits = limits
        ask = "SELECT hold_id, account_id, key_id, amount, state, ended_by, captured, created_ms, ended_ms FROM holds"
        self._holds = {row[0]: row[1:] for row in books._db.execute(ask).fetchall()}
        ask = "SELECT tab_id, account_id, key_id, amount, captured, state, opened_ms, ended_ms FROM tabs"
        self._tabs = {row[0]: Tab(*row[1:]) for row in books._db.execute(ask).fetchall()}
        ask = "SELECT hold_id, tab_id, account_id, cost FROM usage WHERE tab_id IS NOT NULL"
        self._under_tabs = {row[0]: row[1:] for row in books._db.execute(ask).fetchall()}
        ask = "SELECT lock_id, hold_id, account_id, key_id, created_ms, expires_ms, used_ms FROM locks"
        self._locks = {f"lock {row[0]}": LockRow(*row[1:]) for row in books._db.execute(ask).fetchall()}
        self._unused = {lock.hold_id for lock in self._locks.values() if lock.used_ms is None}
        self._by_hold: dict[str, list[DeliveryNote]] = defaultdict(list)
        for each in journal.deliveries:
            if each.hold_id is not None:
                self._by_hold[each.hold_id].append(each)
        ended = {hold_id: Ended(row[3], row[4], row[5] or 0) for hold_id, row in self._holds.items()}
        self._streams = StreamJudge(journal, ended)
        self.lost = 0  # delivered, at least in part, and not charged: in flight at a crash
        self.seen = Counter(
            {
                "tabs": len(self._tabs),
                "requests under tabs": len(self._under_tabs),
                "tabs of dead gateways": sum(tab.state == "recovered" for tab in self._tabs.values()),
                "locks used": sum(lock.used_ms is not None for lock in self._locks.values()),
                "streams: charged at their note": self._streams.count("captured"),
                "streams: ended by another gateway": self._streams.count_by("expire_noted"),
                "streams: lost without a note": self._streams.count("released"),
                "tabs that expired": sum(tab.state == "expired" for tab in self._tabs.values()),
            }
        )

    def wrong(self) -> list[str]:
        """Everything that is not as it must be."""
        found = list(self._journal.wrong)
        found += [str(each) for each in self._books.check().broken]
        looks = (
            self._right,
            self._captured,
            self._under_a_tab,
            self._delivered,
            self._idempotent,
            self._streams.wrong,
            self._chatted,
            self._broken_off,
            self._free,
            self._money,
            self._locked,
            self._locked_at_once,
            self._refused_locks,
        )
        limits = self._counted, self._minutes, self._at_once, self._budgets, self._refusals, self._revoked
        for look in (*looks, *limits):
            found += look()
        return found

    def _right(self) -> Iterator[str]:
        for each in self._journal.deliveries:
            if each.errand.wants == CHAT:
                continue
            reply, body = orjson.loads(each.body), orjson.loads(each.errand.body)
            if each.errand.wants != SEALED:
                vectors = [one["embedding"] for one in reply["data"]]
                if len(vectors) != len(body["input"]) or not all(map(any, vectors)):
                    yield f"life {each.life} got vectors that no node made: {vectors}"
            if (counted := reply["usage"]["prompt_tokens"]) != each.errand.tokens:
                yield f"life {each.life} got a count of {counted} tokens, not {each.errand.tokens}"

    def _chatted(self) -> Iterator[str]:
        """Chats that were not streamed cost what their node has said, and their callers are told that."""
        for hold_id, got in self._by_hold.items():
            first = got[0]
            if first.errand.wants != CHAT:
                continue
            terms, told = terms_of(first.errand), orjson.loads(first.body).get("usage", NOTHING)
            cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            told_cost = terms.cost(TokenCounts(told["prompt_tokens"], told["completion_tokens"], cached))
            if not terms.owed(self._journal.speeches[hold_id][-1].said) == first.cost == told_cost:
                yield f"{hold_id} cost {first.cost}, of {self._journal.speeches[hold_id]}, and told {told}"

    def _captured(self) -> Iterator[str]:
        for hold_id, (_, _, _, state, _, captured, _, _) in self._holds.items():
            got = self._by_hold.get(hold_id, [])
            if state == "open":
                yield f"{hold_id} is still open"
            if hold_id in self._streams.holds:
                continue
            if state == "captured" and not got:
                yield f"{hold_id} was captured, and no caller got its reply"
            if state == "captured" and any(each.cost != captured for each in got):
                yield f"{hold_id} captured {captured}, its replies said {[each.cost for each in got]}"
            if len({each.body for each in got}) > 1:
                yield f"{hold_id} has replies that differ"

    def _under_a_tab(self) -> Iterator[str]:
        """What is charged under a tab is what its caller was told; what each tab has charged is what it says."""
        captured: Counter[str] = Counter()
        for hold_id, (tab_id, account, cost) in self._under_tabs.items():
            captured[tab_id] += cost
            got = self._by_hold.get(hold_id, [])
            if not got:
                yield f"{hold_id} was charged under {tab_id}, and no caller got its reply"
            if any((each.cost, each.errand.account) != (cost, account) for each in got):
                yield f"{hold_id} was charged {cost} to {account}, its replies said {[each.cost for each in got]}"
        for tab_id, tab in self._tabs.items():
            if tab.ended_ms is None:
                yield f"{tab_id} is still {tab.state}"
            if not captured[tab_id] == tab.captured <= tab.amount:
                yield f"{tab_id} has {tab}, its requests cost {captured[tab_id]}"

    def _delivered(self) -> Iterator[str]:
        used = [hold for hold_id, hold in self._holds.items() if hold_id not in self._unused]
        recovered = sum(hold[4] in ("recover", "expire") for hold in used)
        lost_holds = 0
        lost_under_tabs: Counter[str] = Counter()  # nano-USD by account
        for hold_id, got in self._by_hold.items():
            hold = self._holds.get(hold_id)
            if hold_id in self._under_tabs or (hold is not None and hold[3] == "captured"):
                continue
            self.lost += 1
            lost_holds += hold is not None
            first = min(got)
            died = max(self._journal.died.get(each.gateway, -1.0) for each in got)
            ended_by = "under a tab" if hold is None else hold[4]
            if ended_by not in ("recover", "expire", "under a tab"):
                yield f"{hold_id} was delivered by {first.gateway} at {first.at:.6f}, and ended by {ended_by}"
            elif not first.at <= died <= first.at + IN_FLIGHT_S_MAX:
                yield f"{hold_id} was delivered by {first.gateway} at {first.at:.6f}, and never charged ({ended_by})"
            elif hold is None:
                lost_under_tabs[first.errand.account] += first.cost
        if lost_holds > recovered:
            yield f"{lost_holds} were lost, of {recovered} that were in flight at a crash"
        for account, lost in lost_under_tabs.items():
            dead = [tab for tab in self._tabs.values() if tab.account == account and tab.state in ENDED_BY_OTHERS]
            left = sum(tab.amount - tab.captured for tab in dead)
            if lost > left:
                yield f"{account} was not charged {lost} under tabs of dead gateways, which had {left} left"

    def _idempotent(self) -> Iterator[str]:
        paid: dict[tuple[str, str], dict[str, DeliveryNote]] = defaultdict(dict)
        for hold_id, got in self._by_hold.items():
            errand = got[0].errand
            if errand.idem is not None and hold_id in self._holds and self._holds[hold_id][3] == "captured":
                paid[errand.account, errand.idem][hold_id] = got[0]
        for (account, idem), holds in paid.items():
            if len(holds) > 1:
                yield f"{account} paid more than once for {idem}: {sorted(holds)}"
        for each in self._journal.deliveries:
            if each.hold_id is not None or each.errand.idem is None:
                continue
            first = list(paid[each.errand.account, each.errand.idem].values())
            if [(one.body, one.cost, one.errand.body) for one in first] != [(each.body, each.cost, each.errand.body)]:
                yield f"life {each.life} got another reply than was paid for {each.errand.idem}"
        bodies: dict[tuple[str, str | None], set[bytes]] = defaultdict(set)
        for attempt in self._journal.attempts:
            bodies[attempt.errand.account, attempt.errand.idem].add(attempt.errand.body)
        for attempt in self._journal.attempts:
            sent = bodies[attempt.errand.account, attempt.errand.idem]
            if isinstance(attempt.failure, IdempotencyConflict) and len(sent) < 2:
                yield f"life {attempt.life} got a conflict without reason"

    def _broken_off(self) -> Iterator[str]:
        """A retry of what a caller had broken off is not charged a second time, in that gateway's life."""
        by_errand: dict[tuple[str, str, bytes], list[DeliveryNote]] = defaultdict(list)
        for each in self._journal.deliveries:
            if each.errand.idem is None:
                by_errand[each.gateway, each.errand.key_id, each.errand.body].append(each)
        for got in by_errand.values():
            for number, each in enumerate(got):
                before = [one for one in got[:number] if one.at < each.began]
                paid = [
                    one for one in got[:number] if not one.whole and one.hold_id and each.at - one.at <= 2 * UNREAD_S
                ]
                if each.hold_id is None and not any((one.body, one.cost) == (each.body, each.cost) for one in paid):
                    policy = self._books.accounts.find(each.errand.account).cache
                    if each.cost or policy is not CachePolicy.FREE:  # else it was known already, and is free
                        yield f"life {each.life} had to pay {each.cost} ({policy}); the ledger does not know it"
                unread = before and not before[-1].whole and each.began - before[-1].at < UNREAD_S
                others = {one.hold_id for one in before}
                if unread and each.again and each.hold_id is not None and each.hold_id not in others and each.cost:
                    yield f"life {each.life} paid again ({each.hold_id}) for what it had broken off ({others})"

    def _free(self) -> Iterator[str]:
        """What a cache gives for nothing was paid for before, at that gateway."""
        paid: dict[tuple[str, str], set[str]] = defaultdict(set)
        for each in sorted(self._journal.deliveries, key=lambda each: each.at):
            if each.errand.wants in (SEALED, CHAT):
                continue
            inputs = orjson.loads(each.errand.body)["input"]
            known = paid[each.gateway, each.errand.account]
            if each.hold_id is not None:
                known.update(inputs)
            elif each.errand.idem is None and not each.cost and not known.issuperset(inputs):
                yield f"life {each.life} got for nothing what was not paid for before"

    def _locked(self) -> Iterator[str]:
        """A lock that nobody has used lasts until its end, whatever becomes of its gateway, and no longer."""
        for name, lock in self._locks.items():
            _, _, _, state, ended_by, _, _, ended_ms = self._holds[lock.hold_id]
            if lock.used_ms is None and (state, ended_by) != ("released", "expire"):
                yield f"{name} was not used, and its hold was {state} by {ended_by}"
            if lock.used_ms is None and ended_ms < lock.expires_ms:
                yield f"{name} ended {lock.expires_ms - ended_ms} ms before its time"

    def _locked_at_once(self) -> Iterator[str]:
        """No key and no account has more unused locks than it may."""
        changes: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for lock in self._locks.values():
            until_ms = lock.expires_ms if lock.used_ms is None else lock.used_ms
            for whose in (lock.key_id, lock.account):
                changes[whose] += [(lock.created_ms, 1), (until_ms, -1)]
        for whose, times in changes.items():
            has, most = 0, LOCKS_OF_KEY if whose in self._keys else LOCKS_OF_ACCOUNT
            for at, change in sorted(times):  # within a millisecond what ends comes first
                has += change
                if has > most:
                    yield f"{whose} had {has} unused locks at {at}, of {most}"

    def _refused_locks(self) -> Iterator[str]:
        """A lock is refused for a reason that the store knows."""
        bodies: dict[str | None, set[bytes]] = defaultdict(set)
        for attempt in self._journal.attempts:
            if attempt.errand.wants == SEALED:
                bodies[attempt.errand.idem].add(attempt.errand.body)
        for attempt in self._journal.attempts:
            failure, name = attempt.failure, attempt.errand.idem
            if isinstance(failure, LockNotFound | KeyMismatch):
                yield f"life {attempt.life}: {failure.code} of {name}, which it had got"
            if not isinstance(failure, LockUsed | LockExpired) or attempt.ended is None:
                continue
            lock = self._locks.get(str(name))
            if lock is None:
                yield f"life {attempt.life} was told {failure.code} of {name}, which the store does not know"
            elif isinstance(failure, LockExpired):
                ended_ms = self._start_ms + attempt.ended * 1000
                if lock.used_ms is not None or ended_ms < lock.expires_ms:
                    yield f"life {attempt.life} was told that {name} has expired: {lock}, at {ended_ms}"
            elif lock.used_ms is None or (len(bodies[name]) < 2 and self._holds[lock.hold_id][3] != "released"):
                yield f"life {attempt.life} was told that {name} was used: {lock}"

    def _money(self) -> Iterator[str]:
        for account, limit in self._limits.items():
            spent = sum(hold[5] or 0 for hold in self._holds.values() if hold[0] == account)
            spent += sum(cost for _, payer, cost in self._under_tabs.values() if payer == account)
            should = self._journal.credited[account] + self._journal.refunded[account] - spent
            has = self._books.accounts.find(account)
            if has.balance_nanousd != should or has.balance_nanousd < -limit or has.held_nanousd:
                yield f"{account} has {has.balance_nanousd}, held {has.held_nanousd}; it should have {should}"

    def _counted(self) -> Iterator[str]:
        """No reply of a key with a limit goes past its count."""
        counted = Counter((each.key_id, each.what) for each in self._journal.taken)
        counted.update((each.place_id, "slots") for each in self._journal.slots if each.change > 0)
        replies = Counter(got[0].errand.key_id for got in self._by_hold.values())
        for key_id, key in self._keys.items():
            has = key.limits
            limits = {"requests": has.requests_a_minute, "tokens": has.tokens_a_minute, "slots": has.concurrency}
            for what, limit in limits.items():
                if limit is not None and replies[key_id] > counted[key_id, what]:
                    yield f"{key_id} had {replies[key_id]} replies, and took {what} {counted[key_id, what]} times"

    def _minutes(self) -> Iterator[str]:
        sums: dict[tuple[str, int, str, int], int] = defaultdict(int)
        for each in self._journal.taken:
            sums[each.key_id, each.minute, each.what, each.limit] += each.amount
        for (key_id, minute, what, limit), amount in sums.items():
            if amount > limit:
                yield f"{key_id} had {amount} {what} in minute {minute}, of {limit}"

    def _at_once(self) -> Iterator[str]:
        """Over all gateways; what a gateway had under way ends when it dies."""
        now: dict[str, Counter[str]] = defaultdict(Counter)  # by place and gateway
        died = self._journal.died
        deaths = [SlotNote(at, "", gateway, 0, 0) for gateway, at in died.items()]
        for at, place_id, gateway, change, limit in sorted([*self._journal.slots, *deaths], key=lambda note: note.at):
            if not change:
                for each in now.values():
                    each.pop(gateway, None)
            elif at <= died.get(gateway, at):
                now[place_id][gateway] += change
                if change > 0 and (has := now[place_id].total()) > limit:
                    yield f"{place_id} had {has} requests under way at {at:.6f}, of {limit}"

    def _budgets(self) -> Iterator[str]:
        ask = "SELECT key_id, day, sum(cost) FROM usage_days GROUP BY key_id, day"
        rows = self._books._db.execute(ask).fetchall()
        for key_id, day, cost in rows:
            budget = self._keys[key_id].limits.budget_day
            if budget is not None and cost > budget:
                yield f"{key_id} spent {cost} on day {day}, of {budget}"

    def _refusals(self) -> Iterator[str]:
        """No request is refused for lack of money that was there at every moment of the request."""
        for attempt in self._journal.attempts:
            failure = attempt.failure
            if not isinstance(failure, InsufficientQuota) or attempt.ended is None:
                continue
            yield from self._recalled(attempt, attempt.ended)
            if not failure.message.startswith(BALANCE):
                if not any(
                    limit is not None
                    for limit in (self._keys[attempt.errand.key_id].limits.budget_day,
                                  self._keys[attempt.errand.key_id].limits.budget_month)
                ):  # fmt: skip
                    yield f"life {attempt.life} met a budget that its key has not: {failure.message}"
                continue
            account = attempt.errand.account
            from_ms = self._start_ms + int(attempt.began * 1000) - 1
            to_ms = self._start_ms + int(attempt.ended * 1000) + 1
            cost = max(cost_nanousd(attempt.errand.tokens, price) for price in self._journal.prices)
            if attempt.errand.wants in (STREAM, CHAT):
                cost = terms_of(attempt.errand).held
            least = self._least_available(account, from_ms, to_ms)
            if least >= cost:
                yield (
                    f"life {attempt.life} was refused at {attempt.ended:.6f} by {attempt.gateway}: it needed at most "
                    f"{cost}, and {least} were available all the time ({failure.message})"
                )

    def _recalled(self, attempt: Attempt, ended: float) -> Iterator[str]:
        """No request is refused at once while a tab has some of what it lacks."""
        from_ms, to_ms = (self._start_ms + int(at * 1000) for at in (attempt.began, ended))
        money = attempt.failure is not None and attempt.failure.message.startswith(BALANCE)
        for tab_id, tab in self._tabs.items():
            has_some = tab.account == attempt.errand.account if money else tab.key_id == attempt.errand.key_id
            if has_some and tab.opened_ms < from_ms and (tab.ended_ms is None or tab.ended_ms > to_ms + 1):
                self.seen["refused although a tab was open"] += 1
                if ended - self._first_began(attempt) < RECALL_S:
                    yield f"life {attempt.life} was refused at {ended:.6f}, and {tab_id} was open all the time"

    def _first_began(self, attempt: Attempt) -> float:
        """When the first try began that it may have joined."""
        mine = attempt.gateway, attempt.errand.key_id, attempt.errand.body
        of_all = self._journal.attempts
        return min(one.began for one in of_all if (one.gateway, one.errand.key_id, one.errand.body) == mine)

    def _least_available(self, account: str, from_ms: int, to_ms: int) -> int:
        changes: list[tuple[int, int]] = []
        for owner, _, amount, _, _, captured, created_ms, ended_ms in self._holds.values():
            if owner == account:
                changes.append((created_ms, -amount))
                if ended_ms is not None:
                    changes.append((ended_ms, amount - (captured or 0)))
        for tab in self._tabs.values():
            if tab.account == account:
                changes.append((tab.opened_ms, -tab.amount))
                if tab.ended_ms is not None:
                    changes.append((tab.ended_ms, tab.amount - tab.captured))
        ask = """
            SELECT created_ms, source_id, amount FROM transfers
            WHERE :a IN (source_id, target_id) AND kind IN ('credit', 'payout', 'refund')
        """
        for created_ms, source, amount in self._books._db.execute(ask, {"a": account}).fetchall():
            changes.append((created_ms, -amount if source == account else amount))
        now = least = self._limits[account]
        changes.sort()  # within a millisecond what is taken comes first
        for at, change in changes:
            if at > to_ms:
                break
            now += change
            least = now if at < from_ms else min(least, now)
        return least

    def _revoked(self) -> Iterator[str]:
        """Nothing is delivered for a key a second after it was revoked."""
        for got in self._journal.deliveries:
            since = self._journal.revoked.get(got.errand.key_id)
            if since is not None and got.began >= since + REVOKED_S:
                yield f"life {got.life} used {got.errand.key_id} {got.began - since:.3f} s after it was revoked"
