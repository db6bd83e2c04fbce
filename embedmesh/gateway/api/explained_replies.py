"""What routes reply about one request or tab, as the ledger explains it. As in `replies`."""

from typing import Annotated, Literal

import msgspec

from embedmesh.gateway.api.replies import JSON_NAMES, Amount, Count, TokenPrice, doc
from embedmesh.rules.holds import Meter


class MoveReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """Money that was moved for a request, or for several that were settled together."""

    transfer_id: Count
    kind: str
    amount: Amount
    source_id: str
    target_id: str
    reference: str | None
    created_ms: Count
    requests: Annotated[Count, doc("For how many requests; of a tab, 0 for a node's part of a settlement.")]


class MeteredReply(msgspec.Struct, frozen=True):
    """A quantity of what is charged."""

    meter: Meter
    quantity: Annotated[Count, doc("Tokens, images or searches.")]
    price: Annotated[Count, doc("Nano-USD per million of them.")]
    estimated: Annotated[bool, doc("Whether it is the gateway's own count, because the node told none that can be.")]


class BoughtReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """What a request bought; known as long as usage is kept."""

    key_id: str
    model: str
    node_id: str
    tokens: Count
    price: TokenPrice | None
    cost: Count
    payable: Annotated[Count, doc("What its nodes earned.")]
    user_hash: str | None
    meters: Annotated[
        list[MeteredReply], doc("What was generated, or searched, meter by meter; such a request has no one `price`.")
    ]


class LockReply(msgspec.Struct, frozen=True):
    """The lock that money was set aside for."""

    lock_id: Count
    node_id: str
    scheme: str
    model: str
    units: Annotated[Count, doc("Tokens that it covers.")]
    price: TokenPrice
    expires_ms: Count
    used_ms: Annotated[Count | None, doc("When a request has used it; null: none has.")]


class NoteReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """What a stream that runs had cost by then: so much is charged if its gateway dies."""

    cost: Count
    noted_ms: Count


class ExplainedReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """A request, as the ledger knows it."""

    request_id: str
    account_id: str
    key_id: str | None
    held: Annotated[Count | None, doc("Null for a request under a tab.")]
    state: Literal["open", "captured", "released"]
    ended_by: str | None
    captured: Count | None
    gateway: str
    created_ms: Count
    deadline_ms: Count
    ended_ms: Count | None
    bought: BoughtReply | None
    moves: tuple[MoveReply, ...]
    tab_id: Annotated[str | None, doc("The tab under which it was settled.")]
    lock: Annotated[LockReply | None, doc("The lock that its money was set aside for, as long as locks are kept.")]
    note: Annotated[NoteReply | None, doc("What was last noted of a stream that runs.")]
    line: Annotated[Count | None, doc("Of a line of a batch: its number, from 1 on. The batch is the tab's id.")]


class ExplainedBatchReply(msgspec.Struct, frozen=True):
    """The batch whose money a tab has."""

    state: str
    endpoint: str
    model: str | None
    lines: Count
    completed: Count
    failed: Count


class TabReply(msgspec.Struct, frozen=True, rename=JSON_NAMES):
    """A tab: money that was set aside for several requests of a key. The latest moves come first.

    That of a batch has the batch's id, and no gateway: whichever works on the batch settles it.
    """

    tab_id: str
    account_id: str
    key_id: str
    amount: Annotated[Count, doc("Nano-USD that it was opened for.")]
    captured: Count
    requests: Count
    settlements: Count
    state: Literal["open", "closing", "closed", "expired", "recovered"]
    gateway: str
    opened_ms: Count
    deadline_ms: Count
    ended_ms: Count | None
    moves: tuple[MoveReply, ...]
    batch: Annotated[ExplainedBatchReply | None, doc("The batch that it is for, as long as that is kept.")]
