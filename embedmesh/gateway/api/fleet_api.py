"""`/v1/admin/nodes`: the nodes of this gateway, and what operators decide about them."""

import asyncio
import re
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from embedmesh.fleet.pace import REFUSALS
from embedmesh.fleet.probe import PACED_PROBE_S
from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.gateway.api.fleet_replies import NodeReply, node_reply
from embedmesh.gateway.api.replies import ReplyList, doc
from embedmesh.gateway.api.routes import ADMIN_KEY, READ_KEY, Api, ApiCall, ApiReply, RawHandler, Route, actor_of
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.http.bodies import decoded, json_reply, small_body
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import PATH_REMAINDER
from embedmesh.rules import errors
from embedmesh.rules.acts import Act, Verb
from embedmesh.rules.limits import (
    MODEL_ID_CHARS_MAX,
    NODE_NAME_CHARS_MAX,
    NODE_WEIGHT_MAX,
    OFFERS_MAX,
    REQUEST_INPUTS_MAX,
    UPSTREAM_GENERATING,
    UPSTREAM_IN_FLIGHT,
    UPSTREAM_IN_FLIGHT_MAX,
    UPSTREAM_PREFIX_CHARS_MAX,
    UPSTREAM_TOKEN_CHARS_MAX,
    UPSTREAM_URL_CHARS_MAX,
)
from embedmesh.rules.membership import Offer, Standing
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Catalogue, Clock
from embedmesh.storage.nodes import NodeRecord
from embedmesh.upstream.server import parse_url

LOCAL = "local"
ADDING_S, ADDING_LOOK_S = 5.0, 0.1  # a server that is there embeds within a second
ADDING_S_MAX = PACED_PROBE_S + 2.0  # until the first probe of a silent server has ended
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
"""Action -> what changes in the node's record. `weight` has a body besides."""

LOCAL_NODE_ACTIONS = ("drain", "resume")  # until the gateway restarts: the rest is in the settings


class WeightRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of the action `weight`."""

    weight: float


class UpstreamModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A catalogue model that a server runs: its name there, the prefix of each text, and its price."""

    id: str
    name: Annotated[str, Meta(max_length=MODEL_ID_CHARS_MAX)] = ""
    prefix: Annotated[str, Meta(max_length=UPSTREAM_PREFIX_CHARS_MAX)] = ""
    price: Annotated[int, Meta(ge=0, le=10**15)] = 0


class UpstreamRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server of another make. `name` is its node id."""

    address: Annotated[str, Meta(max_length=UPSTREAM_URL_CHARS_MAX)]
    models: Annotated[tuple[UpstreamModel, ...], Meta(min_length=1, max_length=OFFERS_MAX)]
    name: Annotated[str, Meta(max_length=NODE_NAME_CHARS_MAX)] = ""
    token: Annotated[str, Meta(max_length=UPSTREAM_TOKEN_CHARS_MAX)] = ""
    inputs_max: Annotated[int, Meta(ge=1, le=REQUEST_INPUTS_MAX)] = 32
    in_flight_max: Annotated[
        Annotated[int, Meta(ge=1, le=UPSTREAM_IN_FLIGHT_MAX)] | None,
        doc(
            "How many requests it works on at one time. Default: "
            f"{UPSTREAM_GENERATING} if it has a model that generates, else {UPSTREAM_IN_FLIGHT}."
        ),
    ] = None
    trusted: bool = False


class FleetApi(Api):
    TAG = "Administration"

    def __init__(
        self,
        roster: Roster,
        registry: Registry,
        bodies: BodyBudget,
        clock: Clock,
        catalogue: Catalogue,
        adding_s: float = ADDING_S,
    ) -> None:
        """`adding_s` bounds how long the reply about a new server waits for its first right answer."""
        self._adding_s = adding_s
        self._catalogue = catalogue
        self._roster = roster
        self._registry = registry
        self.bodies = bodies
        self._clock = clock

    async def list_nodes(self, call: ApiCall[None, None]) -> ReplyList[NodeReply]:
        """List nodes. All nodes: what is kept of them, and what this gateway observes now."""
        kept = {record.node_id: record for record in self._roster.records()}
        own = [self._reply(None, node) for node in self._registry if node.node_id not in kept]
        return ReplyList("list", own + [self._reply(record) for record in kept.values()])

    async def add_upstream(self, call: ApiCall[UpstreamRequest, None]) -> NodeReply:
        """Use another server as a node.

        A server of another make with OpenAI's API for the models that it runs, or changes of such a node. It gets work
        once it has answered a probe correctly; the reply waits for that, or says what failed.
        """
        record = self._upstream(call.body)
        await self._roster.add_upstream(record, call.by)
        for look in range(int(ADDING_S_MAX / ADDING_LOOK_S)):  # so that the reply says whether it works
            if not _undecided(self._registry.find(record.node_id), look * ADDING_LOOK_S, self._adding_s):
                break
            await asyncio.sleep(ADDING_LOOK_S)
        return self._one(record.node_id)

    async def get_node(self, call: ApiCall[None, None]) -> NodeReply:
        """Get a node. By its id or its number."""
        return self._one(call.parameter)

    async def act_on_node(self, request: web.BaseRequest) -> web.StreamResponse:
        """Decide about a node. The decision takes effect at once, and is kept. Only `weight` has a body."""
        name, _, action = request[PATH_REMAINDER].rpartition("/")
        body, by = await small_body(request, self.bodies), actor_of(request)
        node = self._registry.find(name)
        if node is not None and node.kind == LOCAL:
            if action not in LOCAL_NODE_ACTIONS:
                raise errors.InvalidValue("This machine's own node can only be drained and resumed.")
            change_to = [node.draining, action == "drain"]
            await self._roster.note(Act(Verb(f"node.{action}"), name, {"draining": change_to}), by)
            self._registry.drain(node, action == "drain")
            return json_reply(self._one(name))
        record = self._find(name)
        if action == "weight":
            weight = decoded(body, WeightRequest).weight
            if not 0 < weight <= NODE_WEIGHT_MAX:
                raise errors.InvalidValue(f"A weight is above 0 and at most {NODE_WEIGHT_MAX:g}.", param="weight")
            change: dict[str, object] = {"weight": weight}
        elif action in ACTIONS:
            change = ACTIONS[action]
        else:
            raise errors.NotFound(f"The actions on a node are {', '.join(ACTIONS)} and weight.")
        if action == "approve" and record.standing is Standing.REMOVED:
            raise errors.InvalidValue("A removed node stays removed. Let it join with a new identity.")
        await self._roster.change(record.node_id, (by, Verb(f"node.{action}")), **change)
        return json_reply(self._one(record.node_id))

    def _upstream(self, new: UpstreamRequest) -> NodeRecord:
        """The record of a server. Raises InvalidValue."""
        url = parse_url(new.address)
        name = new.name or f"{url.host}:{url.port}"
        known = next((record for record in self._roster.records() if record.node_id == name), None)
        if not UPSTREAM_NAME.fullmatch(name) or (known is not None and known.kind != UPSTREAM):
            raise errors.InvalidValue(
                "A server's name has 1 to 64 of A-Z a-z 0-9 . _ : -, and no node has it.", param="name"
            )
        if known is None and self._registry.find(name) is not None:
            raise errors.InvalidValue("A node has that name already.", param="name")
        models = [self._model(model.id) for model in new.models]
        in_flight = UPSTREAM_IN_FLIGHT if all(model.encodes for model in models) else UPSTREAM_GENERATING
        if not new.token.isascii() or not new.token.isprintable() or " " in new.token:
            raise errors.InvalidValue("The token has characters that no bearer token has.", param="token")
        return NodeRecord(
            node_id=name,
            kind=UPSTREAM,
            standing=Standing.ADMITTED,
            address=new.address,
            offers=tuple(map(_offer, models, new.models)),
            inputs_max=new.inputs_max,
            in_flight_max=new.in_flight_max or in_flight,
            secret=new.token.encode("ascii"),
            trusted=new.trusted,
            created_ms=known.created_ms if known is not None else self._clock.unix_ms(),
            registered_ms=self._clock.unix_ms(),
        )

    def _model(self, name: str) -> Model:
        model = self._catalogue.find(name)
        if model is None:
            raise errors.InvalidValue(f"The catalogue has no model {name[:200]}.", param="models")
        return model

    def _one(self, name: str) -> NodeReply:
        node = self._registry.find(name)
        if node is not None and node.kind == LOCAL:
            return self._reply(None, node)
        return self._reply(self._find(name))

    def _find(self, name: str) -> NodeRecord:
        if SMALL_ID.fullmatch(name):
            for record in self._roster.records():
                if record.small_id == int(name):
                    return record
        return self._roster.record(name)

    def _reply(self, record: NodeRecord | None, node: Node | None = None) -> NodeReply:
        member = None
        if record is not None:
            node, member = self._registry.find(record.node_id), self._roster.connected(record.node_id)
        return node_reply(record, node, member, self._registry, self._clock)

    ROUTES = (
        Route("GET", "/v1/admin/nodes", READ_KEY, list_nodes),
        Route("POST", "/v1/admin/nodes", ADMIN_KEY, add_upstream),
        Route("GET", "/v1/admin/nodes/{node_id}", READ_KEY, get_node),
        Route(
            "POST",
            "/v1/admin/nodes/{node_id}/{action}",
            ADMIN_KEY,
            act_on_node,
            body_optional=True,
            details=f"This machine's own node only takes {' and '.join(f'`{name}`' for name in LOCAL_NODE_ACTIONS)}.",
            raw=RawHandler({200: ApiReply("The node.", NodeReply)}, WeightRequest),
        ),
    )


def _offer(model: Model, served: UpstreamModel) -> Offer:
    return Offer(
        model.id, model.width, model.max_tokens, model.digest, model.tier, served.price, served.name, served.prefix
    )


def _undecided(node: Node | None, waited_s: float, adding_s: float) -> bool:
    """Whether a server that was just added may still turn out to work or to fail."""
    if node is None or node.state is not NodeState.UNPROVEN:
        return False
    if node.last_failure is None:
        return True
    return node.last_failure.check not in REFUSALS and waited_s < adding_s
