"""The routes for nodes, which sign what they say, and for operators, whose key has the scope `admin`."""

from embedmesh.gateway.api.admin_api import ACTIONS, OF_THE_LOCAL_NODE
from embedmesh.gateway.api.openapi.operations import ANY_ROUTE, SCOPED_KEY, body, operation, parameter
from embedmesh.gateway.api.openapi.replies import Failures, json_reply, reply
from embedmesh.gateway.api.openapi.shapes import Json, ref
from embedmesh.rules import errors
from embedmesh.rules.membership import HEARTBEAT_S

NODES, ADMINISTRATION = "Nodes", "Administration"
ADMIN = ("admin",)
NODE_ID = "node_5d41402abc4b2a76b9719d911017c592"
SIGNATURE = ("Content-Digest", "Embedmesh-Receipt", "Signature-Input", "Signature")

WITH_BODY: Failures = (
    errors.InvalidValue,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
    errors.Overloaded,
    errors.StoreUnavailable,
)
FROM_A_NODE: Failures = (errors.InvalidApiKey, errors.NotFound, *WITH_BODY, *ANY_ROUTE)
BY_AN_OPERATOR: Failures = (*WITH_BODY, *SCOPED_KEY)
OF_ONE_THING: Failures = (errors.NotFound, *SCOPED_KEY)


def node_paths() -> Json:
    """What nodes ask; docs/reference/node-protocol.md tells the story of it."""
    return {
        "/v1/nodes": {
            "get": operation(
                "greetNode",
                NODES,
                "Who is this gateway?",
                "Its key, and a nonce for a registration, good for a minute.",
                {200: json_reply("The greeting.", "Greeting")},
                ANY_ROUTE,
            ),
            "post": operation(
                "registerNode",
                NODES,
                "Register a node, or move it",
                "A node joins, or comes back with what has changed: a statement, signed by its identity. An operator "
                "has said yes to it by an invite, or by name; until then it is pending, and asks again. The gateway "
                "visits the address before it uses it. A node that is admitted may also send the three fields of "
                "`atoma-sdk`.",
                {
                    200: reply(
                        "Its session, or that it has to wait; to the form of `atoma-sdk` a message.",
                        "application/json",
                        {"anyOf": [ref("Welcome"), ref("Message")]},
                    )
                },
                (errors.InvalidApiKey, errors.InsufficientScope, *WITH_BODY, *ANY_ROUTE),
            )
            | body({"anyOf": [ref("Registration"), ref("AtomaRegistration")]}),
        },
        "/v1/nodes/{node_id}/heartbeat": {
            "post": signed(
                "reportNode",
                "Report",
                f"How a node is, every {HEARTBEAT_S:g} seconds, with receipts of what it answered.",
                {200: json_reply("Which receipts are wanted next.", "HeartbeatReply", SIGNATURE)},
            )
            | body(ref("Heartbeat"))
        },
        "/v1/nodes/{node_id}/drain": {
            "post": signed(
                "drainNode",
                "Leave",
                "A node is about to stop: it is given no more work until it registers again.",
                {200: reply("It is so.", "application/json", {"type": "object"}, SIGNATURE)},
            )
            | body({"type": "object"})
        },
        "/v1/nodes/{node_id}/dial": {
            "get": signed(
                "dialIn",
                "Dial in",
                "A node that nobody can reach opens a connection, with `Upgrade: embedmesh-node`; the gateway then "
                "sends its requests over it.",
                {101: {"description": "The connection is the gateway's to ask over.", "headers": {}}},
            )
        },
    }


def admin_paths() -> Json:
    """What operators ask."""
    actions = [*ACTIONS, "weight"]
    return {
        "/v1/admin/nodes": {
            "get": by_operator(
                "listNodes",
                "List nodes",
                "All nodes: what is kept of them, and how this gateway sees them now.",
                {200: json_reply("The nodes.", "NodeList")},
                SCOPED_KEY,
            ),
            "post": by_operator(
                "addUpstream",
                "Use another server as a node",
                "A server of another make, with an OpenAI-compatible `/v1/embeddings`, or what has changed about it. "
                "It gets work once it has embedded something rightly; the answer waits for it, or says what it failed.",
                {200: json_reply("The node.", "Node")},
                BY_AN_OPERATOR,
            )
            | body(ref("UpstreamRequest")),
        },
        "/v1/admin/nodes/{node_id}": {
            "get": by_operator(
                "getNode",
                "Get a node",
                "One node, by its id or its number.",
                {200: json_reply("The node.", "Node")},
                OF_ONE_THING,
            )
            | {"parameters": [which_node()]}
        },
        "/v1/admin/nodes/{node_id}/{action}": {
            "post": by_operator(
                "actOnNode",
                "Say something of a node",
                "It is done, and kept. Only `weight` has a body. This machine's own node takes "
                f"{' and '.join(f'`{action}`' for action in OF_THE_LOCAL_NODE)} only.",
                {200: json_reply("The node as it is now.", "Node")},
                (errors.NotFound, *BY_AN_OPERATOR),
            )
            | body(ref("WeightRequest"), required=False)
            | {"parameters": [which_node(), which_action(actions)]}
        },
        "/v1/admin/invites": {
            "get": by_operator(
                "listInvites",
                "List invites",
                "The newest first, without their tokens.",
                {200: json_reply("The invites.", "InviteList")},
                SCOPED_KEY,
            ),
            "post": by_operator(
                "createInvite",
                "Invite a node",
                "A join token, good for one node. It is shown once.",
                {200: json_reply("The token.", "NewInvite")},
                BY_AN_OPERATOR,
            )
            | body(ref("InviteRequest"), required=False),
        },
        "/v1/admin/invites/{invite_id}": {
            "delete": by_operator(
                "revokeInvite",
                "End an invite",
                "One that no node has used yet.",
                {200: json_reply("It is ended.", "RevokedInvite")},
                OF_ONE_THING,
            )
            | {"parameters": [parameter("invite_id", "The invite's id.", "Gd0kZ5wQ1xYb")]}
        },
    }


def signed(name: str, summary: str, description: str, replies: dict[int, Json]) -> Json:
    """Of a node, under the session that was agreed when it registered."""
    one = operation(name, NODES, summary, description, replies, FROM_A_NODE)
    one["responses"]["401"]["description"] = "It is not signed under a session of this node. Register anew."
    return one | {"security": [{"nodeSignature": []}], "parameters": [which_node()]}


def by_operator(name: str, summary: str, description: str, replies: dict[int, Json], failures: Failures) -> Json:
    """With a key that has the scope `admin`."""
    return operation(name, ADMINISTRATION, summary, description, replies, failures, scopes=ADMIN)


def which_node() -> Json:
    """The parameter `node_id`."""
    return parameter("node_id", "The node's id; for operators also its number.", NODE_ID)


def which_action(actions: list[str]) -> Json:
    """The parameter `action`."""
    one = parameter("action", "What is said of it.", "drain")
    return one | {"schema": {"enum": actions}}
