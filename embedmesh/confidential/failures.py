"""What can be wrong with what is sealed or signed. Neither failure says more than its reader may know."""


class SealBroken(Exception):
    """It was not sealed for this reader, or was changed on the way. What exactly is wrong is said to nobody."""

    def __init__(self) -> None:
        super().__init__("the seal is broken")


class Untrusted(Exception):
    """What somebody has signed is not worth trust. `reason` is one word: what of it is wrong."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not to be trusted: {reason}")
        self.reason = reason
