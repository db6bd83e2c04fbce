"""A node's life as a gateway sees it. Health is a verified embedding, not a ping."""

from enum import Enum


class NodeState(Enum):
    """Where a node stands with this gateway."""

    UNPROVEN = "unproven"  # known, and has not yet given a right answer
    READY = "ready"  # gets work
    EJECTED = "ejected"  # gets probes only


class NodeEvent(Enum):
    """What happened to a node."""

    RIGHT_ANSWER = "right_answer"
    UNREACHABLE = "unreachable"
    FAILURES = "failures"  # FAILURES_TO_EJECT attempts in a row failed


MOVES: dict[tuple[NodeState, NodeEvent], NodeState] = {
    (NodeState.UNPROVEN, NodeEvent.RIGHT_ANSWER): NodeState.READY,
    (NodeState.UNPROVEN, NodeEvent.UNREACHABLE): NodeState.UNPROVEN,
    (NodeState.UNPROVEN, NodeEvent.FAILURES): NodeState.UNPROVEN,
    (NodeState.READY, NodeEvent.RIGHT_ANSWER): NodeState.READY,
    (NodeState.READY, NodeEvent.UNREACHABLE): NodeState.EJECTED,
    (NodeState.READY, NodeEvent.FAILURES): NodeState.EJECTED,
    (NodeState.EJECTED, NodeEvent.RIGHT_ANSWER): NodeState.READY,
    (NodeState.EJECTED, NodeEvent.UNREACHABLE): NodeState.EJECTED,
    (NodeState.EJECTED, NodeEvent.FAILURES): NodeState.EJECTED,
}

FAILURES_TO_EJECT = 3  # one slow answer is noise, two may be; three in a row are the node
