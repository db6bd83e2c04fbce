"""`/v1/admin`: what an operator sees and says. Every route needs a key with the scope `admin`."""

import asyncio
import re
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from embedmesh.fleet.pace import REFUSALS
from embedmesh.fleet.probe import PACED_PROBE_S
from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.gateway.nodes.connected import ConnectedNode
from embedmesh.gateway.nodes.foreign import parse_url
from embedmesh.gateway.nodes.records import DIALLED, kind_of
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.http.bodies import decoded, json_reply, small_body
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import PATH_REMAINDER, Routes
from embedmesh.rules import errors
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.membership import Offer, Standing
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Catalogue, Clock
from embedmesh.signing.invites import make_invite, verifier
from embedmesh.storage.nodes import NodeBooks, NodeRecord

INVITE_S_MAX = 30 * 86_400
INVITE_S = 3_600
NOTE_CHARS_MAX = 128
WEIGHT_MAX = 1e6
LOCAL = "local"
ADDING_S, ADDING_LOOK_S = 5.0, 0.1  # a server that is there embeds within one
ADDING_S_MAX = PACED_PROBE_S + 2.0  # until the first probe of one that says nothing has ended
SMALL_ID = re.compile("[0-9]{1,15}")
UPSTREAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")

ACTIONS: dict[str, dict[str, object]] = {
    "approve": {"standing": Standing.ADMITTED},
    "drain": {"draining": True},
    "resume": {"draining": False},
    "readmit": {"quarantined": ""},
    "remove": {"standing": Standing.REMOVED, "secret": b""},
    "trust": {"trusted": True},
    "distrust": {"trusted": False},
}
"""`POST /v1/admin/nodes/{id}/ACTION` -> what changes in the node's record."""


OF_THE_LOCAL_NODE = ("drain", "resume")
"""What can be said of this machine's own node, until the gateway starts anew: the rest of it is in the settings."""


class InviteRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/invites`."""

    expires_in_s: int = INVITE_S
    note: str = ""


class WeightRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/nodes/{id}/weight`."""

    weight: float


class UpstreamModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A catalogue model that a server runs: what it calls it, wants before each text, and costs."""

    id: str
    name: Annotated[str, Meta(max_length=200)] = ""
    prefix: Annotated[str, Meta(max_length=1_024)] = ""
    price: Annotated[int, Meta(ge=0, le=10**15)] = 0


class UpstreamRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/nodes`: a server of another make. `name` is its node id."""

    address: Annotated[str, Meta(max_length=300)]
    models: Annotated[tuple[UpstreamModel, ...], Meta(min_length=1, max_length=64)]
    name: Annotated[str, Meta(max_length=64)] = ""
    token: Annotated[str, Meta(max_length=4_096)] = ""
    inputs_max: Annotated[int, Meta(ge=1, le=REQUEST_INPUTS_MAX)] = 32
    in_flight_max: Annotated[int, Meta(ge=1, le=64)] = 16
    trusted: bool = False


class AdminApi:
    """Handlers for operators. `public_key` is this gateway's, which invites pin."""

    def __init__(
        self,
        members: Roster,
        registry: Registry,
        books: NodeBooks,
        bodies: BodyBudget,
        clock: Clock,
        catalogue: Catalogue,
        public_key: bytes,
        adding_s: float = ADDING_S,
    ) -> None:
        """One who adds a server is told after `adding_s` that it does not work yet."""
        self._adding_s = adding_s
        self._catalogue = catalogue
        self._members = members
        self._registry = registry
        self._books = books
        self._bodies = bodies
        self._clock = clock
        self._public_key = public_key

    def routes(self) -> Routes:
        """The paths for operators."""
        return {
            "/v1/admin/nodes": {"GET": self.nodes, "POST": self.add},
            "/v1/admin/nodes/*": {"GET": self.node, "POST": self.act},
            "/v1/admin/invites": {"GET": self.invites, "POST": self.invite},
            "/v1/admin/invites/*": {"DELETE": self.revoke},
        }

    async def nodes(self, request: web.BaseRequest) -> web.StreamResponse:
        """All nodes: those of the store, and this machine's own."""
        return json_reply({"object": "list", "data": self._all()})

    async def add(self, request: web.BaseRequest) -> web.StreamResponse:
        """Use a server of another make as a node, or change what was said of it. It gets work once it embeds."""
        asked = decoded(await self._body(request), UpstreamRequest)
        record = self._upstream(asked)
        await self._members.add_upstream(record)
        for look in range(int(ADDING_S_MAX / ADDING_LOOK_S)):  # so that the answer says whether it works
            if not _open(self._registry.find(record.node_id), look * ADDING_LOOK_S, self._adding_s):
                break
            await asyncio.sleep(ADDING_LOOK_S)
        return json_reply(self._one(record.node_id))

    async def node(self, request: web.BaseRequest) -> web.StreamResponse:
        """One node, by its id or small id."""
        return json_reply(self._one(request[PATH_REMAINDER]))

    async def act(self, request: web.BaseRequest) -> web.StreamResponse:
        """Say something of a node: approve, drain, resume, readmit, remove, trust, distrust, weight."""
        name, _, action = request[PATH_REMAINDER].rpartition("/")
        body = await self._body(request)
        node = self._registry.find(name)
        if node is not None and node.kind == LOCAL:
            if action not in OF_THE_LOCAL_NODE:
                raise errors.InvalidValue("This machine's own node can be drained and resumed, no more.")
            self._registry.drain(node, action == "drain")
            return json_reply(self._one(name))
        record = self._find(name)
        if action == "weight":
            weight = decoded(body, WeightRequest).weight
            if not 0 < weight <= WEIGHT_MAX:
                raise errors.InvalidValue(f"A weight is above 0 and at most {WEIGHT_MAX:g}.", param="weight")
            change: dict[str, object] = {"weight": weight}
        elif action in ACTIONS:
            change = ACTIONS[action]
        else:
            raise errors.NotFound(f"One can say {', '.join(ACTIONS)} or weight of a node.")
        if action == "approve" and record.standing is Standing.REMOVED:
            raise errors.InvalidValue("A removed node stays removed. Let it join with a new identity.")
        await self._members.change(record.node_id, **change)
        return json_reply(self._one(record.node_id))

    async def invites(self, request: web.BaseRequest) -> web.StreamResponse:
        """Join tokens, without the tokens."""
        now_ms = self._clock.unix_ms()
        shown = []
        for row in await self._books.invites():
            state = "used" if row.used_ms is not None else "open" if row.expires_ms > now_ms else "expired"
            shown.append({**msgspec.structs.asdict(row), "state": state})
        return json_reply({"object": "list", "data": shown})

    async def invite(self, request: web.BaseRequest) -> web.StreamResponse:
        """A new join token. It is shown once."""
        body = await self._body(request)
        asked = decoded(body, InviteRequest) if body else InviteRequest()
        if not 0 < asked.expires_in_s <= INVITE_S_MAX:
            raise errors.InvalidValue(f"A token is good for 1 to {INVITE_S_MAX:,} seconds.", param="expires_in_s")
        if len(asked.note) > NOTE_CHARS_MAX:
            raise errors.InvalidValue(f"A note has at most {NOTE_CHARS_MAX} characters.", param="note")
        made = make_invite(self._public_key)
        expires_ms = self._clock.unix_ms() + asked.expires_in_s * 1000
        await self._books.add_invite(made.invite_id, verifier(made.secret), asked.note, expires_ms)
        return json_reply({"invite_id": made.invite_id, "token": made.text, "expires_ms": expires_ms})

    async def revoke(self, request: web.BaseRequest) -> web.StreamResponse:
        """End a join token that nobody has used."""
        if not await self._books.revoke_invite(request[PATH_REMAINDER]):
            raise errors.NotFound("There is no open invite of that id.")
        return json_reply({"invite_id": request[PATH_REMAINDER], "revoked": True})

    def _upstream(self, asked: UpstreamRequest) -> NodeRecord:
        """The record of what an operator says of a server. Raises InvalidValue."""
        place = parse_url(asked.address)
        name = asked.name or f"{place.host}:{place.port}"
        known = next((one for one in self._members.records() if one.node_id == name), None)
        if not UPSTREAM_NAME.fullmatch(name) or (known is not None and known.kind != UPSTREAM):
            raise errors.InvalidValue(
                "A server's name has 1 to 64 of A-Z a-z 0-9 . _ : -, and is no node's.", param="name"
            )
        if known is None and self._registry.find(name) is not None:
            raise errors.InvalidValue("There is a node of that name.", param="name")
        if not asked.token.isascii() or not asked.token.isprintable() or " " in asked.token:
            raise errors.InvalidValue("The token has characters that no bearer token has.", param="token")
        return NodeRecord(
            node_id=name,
            kind=UPSTREAM,
            standing=Standing.ADMITTED,
            address=asked.address,
            offers=tuple(self._offer(model) for model in asked.models),
            inputs_max=asked.inputs_max,
            in_flight_max=asked.in_flight_max,
            secret=asked.token.encode("ascii"),
            trusted=asked.trusted,
            created_ms=known.created_ms if known is not None else self._clock.unix_ms(),
            registered_ms=self._clock.unix_ms(),
        )

    def _offer(self, asked: UpstreamModel) -> Offer:
        model = self._catalogue.find(asked.id)
        if model is None:
            raise errors.InvalidValue(f"The catalogue has no model {asked.id[:200]}.", param="models")
        return Offer(
            model.id, model.width, model.max_tokens, model.digest, model.tier, asked.price, asked.name, asked.prefix
        )

    def _all(self) -> list[dict[str, Any]]:
        kept = {record.node_id: record for record in self._members.records()}
        own = [self._described(None, node) for node in self._registry if node.node_id not in kept]
        return own + [self._described(record, self._registry.find(record.node_id)) for record in kept.values()]

    def _one(self, name: str) -> dict[str, Any]:
        node = self._registry.find(name)
        if node is not None and node.kind == LOCAL:
            return self._described(None, node)
        record = self._find(name)
        return self._described(record, self._registry.find(record.node_id))

    def _find(self, name: str) -> NodeRecord:
        if SMALL_ID.fullmatch(name):
            for record in self._members.records():
                if record.small_id == int(name):
                    return record
        return self._members.record(name)

    def _described(self, record: NodeRecord | None, node: Node | None) -> dict[str, Any]:
        member = self._members.connected(record.node_id) if record is not None else None
        if node is None:
            return {**_kept(record), "state": None}
        return {**_kept(record), **_live(node, _state(node, self._registry.proven(node)), member, self._clock)}

    async def _body(self, request: web.BaseRequest) -> bytes:
        return await small_body(request, self._bodies)


def _kept(record: NodeRecord | None) -> dict[str, Any]:
    """What the store knows of a node."""
    if record is None:
        return {"small_id": None, "standing": "admitted"}
    return {
        "node_id": record.node_id,
        "small_id": record.small_id,
        "kind": kind_of(record),
        "standing": record.standing.value,
        "address": record.address or None,
        "country": record.country or None,
        "offers": msgspec.to_builtins(record.offers),
        "trusted": record.trusted,
        "weight": record.weight,
        "draining": record.draining,
        "quarantined": record.quarantined or None,
        "created_ms": record.created_ms,
        "registered_ms": record.registered_ms,
    }


def _live(node: Node, state: str, member: ConnectedNode | None, clock: Clock) -> dict[str, Any]:
    """What this gateway sees of a node now."""
    now = clock.monotonic()
    failure, load = node.last_failure, node.load

    def named(prefix: str, *names: str) -> dict[str, int]:
        return {name: node.counts[f"{prefix}_{name}"] for name in names}

    return {
        "node_id": node.node_id,
        "kind": node.kind,
        "address": node.address if node.kind != DIALLED else None,
        "state": state,
        "models": sorted(node.models),
        "trusted": node.trusted,
        "weight": node.weight,
        "draining": node.draining,
        "tokens_outstanding": load.tokens,
        "parts_outstanding": load.parts,
        "tokens_per_s": round(load.tokens_per_s) if load.measured else None,
        "fixed_ms": round(load.fixed_s * 1000, 2) if load.measured else None,
        "answers": node.counts["answers"],
        "tokens": node.counts["tokens"],
        "hedges": node.counts["hedges"],
        "canaries": named("canaries", "passed", "failed", "disputed"),
        "receipts_seen": named("receipts", "matched", "unmatched", "false", "refused"),
        "failures": {check.value: count for check, count in node.failed.items()},
        "last_check": failure.check.value if failure is not None and failure.check is not None else None,
        "last_failure": failure.words if failure is not None else None,
        "last_failed_s_ago": _ago(node.last_failed, now),
        "last_answer_s_ago": _ago(node.last_right_answer, now),
        "reported": _reported(member),
        "receipts": member.audit.count if member is not None else 0,
        "last_heartbeat_s_ago": _ago(member.seen if member is not None else None, now),
    }


def _state(node: Node, proven: bool) -> str:
    """Its state in one word: one whose last right answer is old is not called ready, though it may still get work."""
    if node.state is not NodeState.READY:
        return str(node.state.value)
    if node.draining:
        return "draining"
    return "ready" if proven else "unproven"


def _open(node: Node | None, waited_s: float, adding_s: float) -> bool:
    """Whether it is still open if a server that was just added works."""
    if node is None or node.state is not NodeState.UNPROVEN:
        return False
    if node.last_failure is None:
        return True
    return node.last_failure.check not in REFUSALS and waited_s < adding_s


def _reported(member: ConnectedNode | None) -> dict[str, Any] | None:
    """What the node said of itself in its last heartbeat."""
    beat = member.reported if member is not None else None
    return None if beat is None else {"tokens_waiting": beat.tokens_waiting, "tokens_per_s": round(beat.tokens_per_s)}


def _ago(when: float | None, now: float) -> float | None:
    return None if when is None else round(now - when, 1)
