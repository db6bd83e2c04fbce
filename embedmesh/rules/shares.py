"""Resources that many share, of which nobody gets so much that others find none.

The caller names the owner of a share: an account, a node, an address.
"""

from embedmesh.rules.errors import Overloaded
from embedmesh.rules.ports import Clock

ACCOUNT_SHARE = 4  # times what is free is the most of one account: alone four fifths, of two each four ninths


class Shares:
    """A number of bytes, or of anything else that is counted. However much one account takes, others find some.

    Dynamic thresholds (Choudhury and Hahne, 1998). What was taken must be given back.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.alone = total * ACCOUNT_SHARE // (ACCOUNT_SHARE + 1)  # the most of one account that has no rival
        self._free = total
        self._accounts: dict[str, int] = {}

    @property
    def taken(self) -> int:
        """Taken by all accounts together."""
        return self.total - self._free

    def take(self, account_id: str, number: int = 1) -> bool:
        """Take more for an account. Returns False, and takes nothing, if that is over its share.

        The rule is applied as if they were taken one after another, so that the last one can be had, too.
        """
        if not number:
            return True
        mine, free = self._accounts.get(account_id, 0) + number, self._free - number
        if mine > ACCOUNT_SHARE * (free + 1):
            return False
        self._accounts[account_id], self._free = mine, free
        return True

    def resize(self, total: int) -> None:
        """Have another number. What is taken stays; where that is more, nothing is taken until enough came back."""
        self._free += total - self.total
        self.total, self.alone = total, total * ACCOUNT_SHARE // (ACCOUNT_SHARE + 1)

    def full(self) -> list[str]:
        """The accounts that may not take one more now."""
        return [each for each, mine in self._accounts.items() if mine + 1 > ACCOUNT_SHARE * self._free]

    def give_back(self, account_id: str, number: int = 1) -> None:
        """Return some of what the account has taken."""
        if not number:
            return
        self._free += number
        left = self._accounts[account_id] - number
        if left:
            self._accounts[account_id] = left
        else:
            del self._accounts[account_id]


class Room:
    """Shares that raise Overloaded when there is no room."""

    def __init__(self, total: int, full: str) -> None:
        """`full` is the message of the failure."""
        self.shares = Shares(total)
        self._full = full

    def resize(self, total: int, full: str) -> None:
        """Have another number; see `Shares.resize`. `full` is the message of the failure from now on."""
        self.shares.resize(total)
        self._full = full

    @property
    def taken(self) -> int:
        """Taken by all together."""
        return self.shares.taken

    def take(self, whose: str, number: int = 1) -> None:
        """Raises Overloaded if there is no room; then nothing is taken."""
        if not self.shares.take(whose, number):
            raise Overloaded(self._full)

    def give_back(self, whose: str, number: int = 1) -> None:
        """Return some of what was taken."""
        self.shares.give_back(whose, number)


class Pace:
    """A room that is emptied after each span of time."""

    def __init__(self, total: int, span_s: float, clock: Clock, full: str) -> None:
        """`full` is the message when nothing is left of a span."""
        self._size = total, full
        self._span_s = span_s
        self._clock = clock
        self._began = clock.monotonic()
        self._room = Room(total, full)

    def take(self, whose: str) -> None:
        """Raises Overloaded if nothing is left of this span."""
        now = self._clock.monotonic()
        if now - self._began >= self._span_s:
            self._began, self._room = now, Room(*self._size)
        self._room.take(whose)
