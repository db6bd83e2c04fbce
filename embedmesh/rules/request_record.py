"""What log lines say of a request: filled in while it runs, read by its lines. Nothing is decided by it."""

from contextvars import ContextVar
from typing import Protocol

import msgspec


class RequestRecord(msgspec.Struct):
    """One request at a server of ours. Ids, numbers, and names of routes and of the catalogue: never a text or a key.

    `seconds` from its head to its end; `bytes_in` and `bytes_out` of the bodies; a `status` of 0 means: none was sent.
    """

    request_id: str  # as its caller sees it, who may have chosen it
    own_id: str = ""  # the ledger's, where it is another
    account: str = ""
    node: str = ""
    model: str = ""
    method: str = ""
    route: str = ""  # as in the table of routes, not as it was sent
    status: int = 0
    outcome: str = ""  # as the metrics say it: `ok`, `broken_off`, `dropped`, or the code of the failure
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    tokens: int = 0  # charged, as `nanousd`
    nanousd: int = 0
    client: str = ""  # its address, where addresses are logged
    ended_at: float = 0.0  # Unix seconds
    over: bool = False  # what its tasks have started, and goes on, is not about it any more


CURRENT: ContextVar[RequestRecord | None] = ContextVar("request record", default=None)
"""Of the request that this task works on."""


class AccessLog(Protocol):
    """Where requests go that have ended."""

    def client_of(self, peer: object, forwarded: str | None) -> str:
        """What a record says of the client's address: nothing, unless addresses are logged."""
        ...

    def ended(self, record: RequestRecord) -> None:
        """Note it, without waiting: its line is written later, or counted only."""
        ...
