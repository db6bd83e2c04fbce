"""Nodes and invites in the store. Reads are plain; writes wait until they are durable."""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from embedmesh.rules.acts import Act, Actor, Verb, changed
from embedmesh.rules.errors import Failure, Overloaded
from embedmesh.rules.limits import PAGE_ROWS_MAX, PENDING_NODES_MAX
from embedmesh.rules.membership import Offer, Standing
from embedmesh.rules.ports import Clock
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.acts import WriteActs
from embedmesh.storage.reads import Reads
from embedmesh.storage.secrets.sealed import Seal
from embedmesh.storage.sql import NODES_SQL

PENDING_GONE_MS = 15 * 60_000  # a pending node that was not heard of for this long makes room for a new one
NO_RECEIPTS_HEAD = bytes(32)


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One node as it is kept, in the order of the columns. `secret` is the session keys, or a server's bearer token."""

    node_id: str
    small_id: int = 0  # given by the store
    kind: str = "own"
    standing: Standing
    public_key: bytes | None = None
    address: str = ""
    ip: str = ""  # what the address resolved to when it was registered: only this is connected to
    certificate: bytes = b""
    country: str = ""
    offers: tuple[Offer, ...] = ()
    inputs_max: int
    in_flight_max: int = 64
    secret: bytes = b""
    trusted: bool = False
    weight: float = 1.0
    draining: bool = False
    quarantined: str = ""  # why, where it is
    receipts_count: int = 0
    receipts_head: bytes = NO_RECEIPTS_HEAD
    created_ms: int = 0
    registered_ms: int = 0


class SavedNode(NamedTuple):
    """A node as it is kept now, and which pending node was forgotten to make room, if one was."""

    record: NodeRecord
    forgotten: str | None


class InviteRow(msgspec.Struct, frozen=True):
    """A join token without its secret."""

    invite_id: str
    note: str
    created_ms: int
    expires_ms: int
    used_ms: int | None
    node_id: str | None


class NodeBooks:
    """The nodes of one store. Every method raises StoreUnavailable. What has an actor makes a row of the audit."""

    def __init__(self, reads: Reads, act: WriteActs, clock: Clock, key_secret: bytes) -> None:
        self._reads = reads
        self._act = act
        self._clock = clock
        self._seal = Seal(key_secret)

    async def all(self) -> list[NodeRecord]:
        """Every node that is known, removed ones too."""
        return [self._record(row) for row in await self._reads.ask(NODES_SQL["list_nodes"], {})]

    async def invites(self) -> list[InviteRow]:
        """Join tokens, the newest first."""
        rows = await self._reads.ask(NODES_SQL["list_invites"], {"rows_max": PAGE_ROWS_MAX})
        return [InviteRow(*row) for row in rows]

    async def invite(self, invite_id: str, node_id: str) -> bytes | None:
        """What checks the proof of an invite that this node may use, or has used; None without one."""
        wanted = {"invite_id": invite_id, "node_id": node_id, "now_ms": self._clock.unix_ms()}
        rows = await self._reads.ask(NODES_SQL["find_invite"], wanted)
        return self._seal.open(rows[0][0], what="invite", whose=invite_id) if rows else None

    async def one(self, node_id: str) -> NodeRecord | None:
        """A node as it is kept now."""
        rows = await self._reads.ask(NODES_SQL["one_node"], {"node_id": node_id})
        return self._record(rows[0]) if rows else None

    async def save(self, record: NodeRecord) -> SavedNode:
        """Keep a node as it is now, its receipts apart (see note_receipts). Raises Overloaded."""
        return await self.update(record.node_id, lambda kept: record)

    async def update(
        self, node_id: str, change: Callable[[NodeRecord | None], NodeRecord], by: tuple[Actor, Verb] | None = None
    ) -> SavedNode:
        """Keep what `change` makes of a node as it is kept now; no other gateway's change comes in between.

        `by`: who decides that, and what it is. Without, it is the node itself, or the gateway.

        Raises what `change` raises, a Failure, and Overloaded where one more pending node is too many; then nothing has
        changed.
        """

        def write(db: Db, now_ms: int) -> tuple[SavedNode | Failure, Sequence[Act]]:
            db.execute(NODES_SQL["lock_node"], {"node_id": node_id})
            rows = db.execute(NODES_SQL["one_node"], {"node_id": node_id}).fetchall()
            kept = self._record(rows[0]) if rows else None
            try:
                record = change(kept)
                forgotten = self._make_room(db, now_ms) if record.standing is Standing.PENDING and not rows else None
            except Failure as failure:
                return failure, ()
            acts = () if by is None else (Act(by[1], node_id, _difference(kept, record)),)
            return SavedNode(self._keep(db, record), forgotten), acts

        saved = await self._act(node_id, write, None if by is None else by[0])
        if isinstance(saved, Failure):
            raise saved
        return saved

    async def touch(self, node_id: str, now_ms: int) -> None:
        """Note that a pending node still asks to join. Other gateways need not hear of it."""
        await self._run(node_id, "touch_node", {"node_id": node_id, "now_ms": now_ms})

    async def note_receipts(self, node_id: str, count: int, head: bytes) -> None:
        """Remember how far a node's log was checked."""
        values = {"node_id": node_id, "receipts_count": count, "receipts_head": head}
        await self._run(node_id, "note_receipts", values)

    async def note(self, act: Act, by: Actor) -> None:
        """An act that changes nothing in the store."""
        await self._act("", lambda db, now_ms: (None, (act,)), by)

    async def add_invite(self, invite_id: str, verifier: bytes, note: str, expires_ms: int, by: Actor) -> None:
        """Keep a new join token."""
        sealed = self._seal.close(verifier, what="invite", whose=invite_id)
        row = {"invite_id": invite_id, "sealed": sealed, "note": note, "expires_ms": expires_ms}
        act = Act(Verb.INVITE_CREATE, invite_id, {"expires_ms": expires_ms})
        await self._run(invite_id, "insert_invite", row, (by, act))

    async def use_invite(self, invite_id: str, node_id: str) -> bool:
        """Whether this node is the one that used it up: now, or before."""

        def write(db: Db, now_ms: int) -> tuple[int, Sequence[Act]]:
            row = {"invite_id": invite_id, "node_id": node_id, "now_ms": now_ms}
            used = int(db.execute(NODES_SQL["use_invite"], row).rowcount)
            return used or len(db.execute(NODES_SQL["find_invite"], row).fetchall()), ()

        return bool(await self._act(invite_id, write))

    async def revoke_invite(self, invite_id: str, by: Actor) -> bool:
        """End an invite; False where it is not open."""
        act = Act(Verb.INVITE_REVOKE, invite_id)
        return bool(await self._run(invite_id, "revoke_invite", {"invite_id": invite_id}, (by, act)))

    async def _run(
        self, row: str, statement: str, values: dict[str, Any], acted: tuple[Actor, Act] | None = None
    ) -> int:
        """Durably run one statement on a row, an act if it changes anything; how many rows it changed."""
        actor, acts = (None, ()) if acted is None else (acted[0], (acted[1],))

        def write(db: Db, now_ms: int) -> tuple[int, Sequence[Act]]:
            done = int(db.execute(NODES_SQL[statement], {"now_ms": now_ms} | values).rowcount)
            return done, acts if done else ()

        return await self._act(row, write, actor)

    def _make_room(self, db: Db, now_ms: int) -> str | None:
        """Make room for one more pending node; which one was forgotten, if one had to be. Raises Overloaded."""
        if db.execute(NODES_SQL["count_pending"]).fetchall()[0][0] < PENDING_NODES_MAX:
            return None
        gone = db.execute(NODES_SQL["forget_gone_pending"], {"before_ms": now_ms - PENDING_GONE_MS}).fetchall()
        if not gone:
            raise Overloaded(
                f"{PENDING_NODES_MAX} nodes wait to be approved, no more may. Try again once the operator has approved "
                "some, or join with an invite."
            )
        return str(gone[0][0])

    def _keep(self, db: Db, record: NodeRecord) -> NodeRecord:
        row = msgspec.structs.asdict(record)
        row["standing"] = record.standing.value
        row["trusted"], row["draining"] = int(record.trusted), int(record.draining)
        row["offers"] = msgspec.json.encode(record.offers).decode()
        row["sealed"] = self._seal.close(row.pop("secret"), what="node", whose=record.node_id)
        small_id = db.execute(NODES_SQL["save_node"], row).fetchall()[0][0]
        return msgspec.structs.replace(record, small_id=small_id)

    def _record(self, row: Sequence[Any]) -> NodeRecord:
        fields = dict(zip(NodeRecord.__struct_fields__, row, strict=True))
        fields["standing"] = Standing(fields["standing"])
        fields["offers"] = msgspec.json.decode(fields["offers"], type=tuple[Offer, ...])
        fields["secret"] = self._seal.open(fields["secret"], what="node", whose=fields["node_id"])
        fields["trusted"], fields["draining"] = bool(fields["trusted"]), bool(fields["draining"])
        return NodeRecord(**fields)


def _difference(before: NodeRecord | None, after: NodeRecord) -> dict[str, Any]:
    """What an operator has changed of a node. Of a secret only whether there was one, and is one."""
    difference = changed({} if before is None else _shown(before), _shown(after))
    secrets = [b"" if before is None else before.secret, after.secret]
    return difference if secrets[0] == secrets[1] else difference | {"secret": [bool(each) for each in secrets]}


def _shown(record: NodeRecord) -> dict[str, Any]:
    names = ("address", "inputs_max", "in_flight_max", "trusted", "weight", "draining", "quarantined")
    shown: dict[str, Any] = {name: getattr(record, name) for name in names}
    return shown | {"standing": record.standing.value, "models": {each.id: _offered(each) for each in record.offers}}


def _offered(offer: Offer) -> dict[str, Any]:
    """What a server's model costs and is called there. Of the words before every text their hash: they are free."""
    prefix = {"prefix_hash": blake2b(offer.prefix.encode(), digest_size=8).hexdigest()} if offer.prefix else {}
    return {"price": offer.price, "name": offer.name} | prefix
