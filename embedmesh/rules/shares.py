"""Something that all accounts draw from, of which none gets so much that others find nothing."""

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
        """So much more for an account; False, and nothing is taken, where that is over its share."""
        mine = self._accounts.get(account_id, 0) + number
        free = self._free - number
        if mine > ACCOUNT_SHARE * free:
            return False
        self._accounts[account_id] = mine
        self._free = free
        return True

    def give_back(self, account_id: str, number: int) -> None:
        """Of what it has taken."""
        self._free += number
        left = self._accounts[account_id] - number
        if left:
            self._accounts[account_id] = left
        else:
            del self._accounts[account_id]
