"""What is said when a check of a confidential request fails: what is wrong, what has left, what to do."""

from embedmesh.client.errors import NodeNotTrusted, ReplyNotTrusted

ASK = (
    "Somebody between you and the node may want to read along. Ask the node's operator, by another way than this"
    " gateway, which identity the node has."
)
AGAIN = "Use none of it. Try again; if it happens again, tell the node's operator."

NODE_WORDS = {
    "form": ("the gateway's lock is not of a form that is understood here", "Does the gateway run this version?"),
    "scheme": ("the gateway offers another scheme than the one asked for", ASK),
    "signature": ("the node's keys are not signed by its identity", ASK),
    "node": ("the node's keys are of another node than they say", ASK),
    "validity": ("the node's keys are never valid", ASK),
    "evidence": ("the evidence for the node's keys is wrong", ASK),
    "key": ("the key that the gateway names is not the one that the node has signed", ASK),
    "clock": (
        "the node's keys are not valid now",
        "Is the clock of this machine right? If so, the gateway gives old keys.",
    ),
    "model": (
        "the node does not say that it serves the model that was locked",
        "Name another model, or ask the gateway's operator.",
    ),
    "units": ("the lock is for another number of tokens than was asked for", "Ask the gateway's operator."),
    "expiry": ("the lock ends at a time at which no lock ends", "Is the clock of this machine right?"),
}
REPLY_WORDS = {
    "form": "it is not of the form of a sealed reply",
    "signature": "the node's statement is not signed by the node",
    "node": "the node's statement is of another node",
    "lock": "the node's statement is about another lock",
    "request": "the node's statement is about another request",
    "reply": "the node's statement is about another reply",
    "status": "the node's statement says another status than the gateway",
    "seal": "the seal of it is broken",
    "tokens": "the node counts more tokens than were locked, or none",
    "usage": "the numbers of tokens in it differ",
    "model": "it is of another model than was asked for",
    "count": "it has another number of vectors than the request has inputs",
    "order": "its parts are not those that must follow, in their order",
    "width": "its vectors are not as wide as they must be",
    "finite": "a vector in it has a component that is no number",
    "zero": "a vector in it is all zeros",
    "operation": "the node's statement is about something else than was asked for",
    "cut": "it ends before the node's last event",
    "after": "something comes after the node's last event",
}


def node_not_trusted(reason: str, *, offered: str = "", pinned: str = "") -> NodeNotTrusted:
    """The error for a lock that is not sealed for."""
    if reason == "not_pinned":
        what = f"the gateway offers the node {offered}, and pinned is: {pinned}"
        todo = "Pin that node if its operator confirms its identity to you, by another way than this gateway."
    else:
        what, todo = NODE_WORDS.get(reason, NODE_WORDS["form"])
    return NodeNotTrusted(reason, f"Nothing was sent: {what}. {todo}")


def reply_not_trusted(reason: str) -> ReplyNotTrusted:
    """The error for a reply that is not returned."""
    return ReplyNotTrusted(
        reason, f"The reply was thrown away: {REPLY_WORDS.get(reason, REPLY_WORDS['form'])}. {AGAIN}"
    )
