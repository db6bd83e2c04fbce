"""Something that many draw from, of which none gets so much that others find nothing.

Whose a share is the caller says: an account's, a node's, an address's.
"""

from embedmesh.rules.errors import Overloaded
from embedmesh.rules.ports import Clock

ACCOUNT_SHARE = 4  # times what is free is the most of one account: alone four fifths, of two each four ninths


class Shares:
    """So many bytes, or anything else that is counted. However much one account takes, others find some.

    Dynamic thresholds (Choudhury and Hahne, 1998). What was taken must be given back.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.alone = total * ACCOUNT_SHARE // (ACCOUNT_SHARE + 1)  # the most of one account that has no rival
        self._free = total
        self._accounts: dict[str, int] = {}

    @property
    def taken(self) -> int:
        """By all accounts together."""
        return self.total - self._free

    def take(self, account_id: str, number: int) -> bool:
        """So much more for an account; False, and nothing is taken, where that is over its share.

        As if they were taken one after another, so that the last of a small number can be had, too.
        """
        if not number:
            return True
        mine, rest = self._accounts.get(account_id, 0), number - 1
        if mine + rest >= ACCOUNT_SHARE * (self._free - rest):
            return False
        self._accounts[account_id] = mine + number
        self._free -= number
        return True

    def give_back(self, account_id: str, number: int) -> None:
        """Of what it has taken."""
        if not number:
            return
        self._free += number
        left = self._accounts[account_id] - number
        if left:
            self._accounts[account_id] = left
        else:
            del self._accounts[account_id]


class Room:
    """The same for those who are told when they find none."""

    def __init__(self, total: int, full: str) -> None:
        """`full` is what they are told."""
        self.shares = Shares(total)
        self._full = full

    @property
    def taken(self) -> int:
        """By all together."""
        return self.shares.taken

    def take(self, whose: str, number: int = 1) -> None:
        """Raises Overloaded where there is no room; then nothing is taken."""
        if not self.shares.take(whose, number):
            raise Overloaded(self._full)

    def give_back(self, whose: str, number: int = 1) -> None:
        """Of what was taken."""
        self.shares.give_back(whose, number)


class Pace:
    """So many in a span of time: a room that is empty again after each."""

    def __init__(self, total: int, span_s: float, clock: Clock, full: str) -> None:
        """`full` is what they are told for whom none of a span is left."""
        self._size = total, full
        self._span_s = span_s
        self._clock = clock
        self._began = clock.monotonic()
        self._room = Room(total, full)

    def take(self, whose: str) -> None:
        """Raises Overloaded where there is none left of this span."""
        now = self._clock.monotonic()
        if now - self._began >= self._span_s:
            self._began, self._room = now, Room(*self._size)
        self._room.take(whose)
