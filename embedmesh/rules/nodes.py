"""A node's life as a gateway sees it. Health is a verified embedding, not a ping."""

from enum import Enum
from typing import Literal

Shortage = Literal["", "cpu", "quota"]
SHORTAGES: dict[str, str] = {"cpu": "other programs take the CPU", "quota": "the CPU quota of its group is used up"}
"""Why an engine is starved: it could run, and gets too little CPU. In words for operators."""


class NodeState(Enum):
    """Where a node stands with this gateway."""

    UNPROVEN = "unproven"  # known, and has not yet given a right answer
    READY = "ready"  # gets work
    EJECTED = "ejected"  # gets probes only, until one is answered right
    QUARANTINED = "quarantined"  # answered wrongly: gets probes only, until an operator or a run of right ones readmits


class NodeEvent(Enum):
    """What happened to a node."""

    RIGHT_ANSWER = "right_answer"
    UNREACHABLE = "unreachable"
    FAILURES = "failures"  # too many attempts failed
    WRONG_ANSWERS = "wrong_answers"  # it was caught giving vectors that are not the model's
    READMITTED = "readmitted"  # by an operator, or by a run of right answers to probes


MOVES: dict[tuple[NodeState, NodeEvent], NodeState] = {
    (NodeState.UNPROVEN, NodeEvent.RIGHT_ANSWER): NodeState.READY,
    (NodeState.UNPROVEN, NodeEvent.UNREACHABLE): NodeState.UNPROVEN,
    (NodeState.UNPROVEN, NodeEvent.FAILURES): NodeState.UNPROVEN,
    (NodeState.UNPROVEN, NodeEvent.WRONG_ANSWERS): NodeState.QUARANTINED,
    (NodeState.UNPROVEN, NodeEvent.READMITTED): NodeState.UNPROVEN,
    (NodeState.READY, NodeEvent.RIGHT_ANSWER): NodeState.READY,
    (NodeState.READY, NodeEvent.UNREACHABLE): NodeState.EJECTED,
    (NodeState.READY, NodeEvent.FAILURES): NodeState.EJECTED,
    (NodeState.READY, NodeEvent.WRONG_ANSWERS): NodeState.QUARANTINED,
    (NodeState.READY, NodeEvent.READMITTED): NodeState.READY,
    (NodeState.EJECTED, NodeEvent.RIGHT_ANSWER): NodeState.READY,
    (NodeState.EJECTED, NodeEvent.UNREACHABLE): NodeState.EJECTED,
    (NodeState.EJECTED, NodeEvent.FAILURES): NodeState.EJECTED,
    (NodeState.EJECTED, NodeEvent.WRONG_ANSWERS): NodeState.QUARANTINED,
    (NodeState.EJECTED, NodeEvent.READMITTED): NodeState.EJECTED,
    (NodeState.QUARANTINED, NodeEvent.RIGHT_ANSWER): NodeState.QUARANTINED,
    (NodeState.QUARANTINED, NodeEvent.UNREACHABLE): NodeState.QUARANTINED,
    (NodeState.QUARANTINED, NodeEvent.FAILURES): NodeState.QUARANTINED,
    (NodeState.QUARANTINED, NodeEvent.WRONG_ANSWERS): NodeState.QUARANTINED,
    (NodeState.QUARANTINED, NodeEvent.READMITTED): NodeState.UNPROVEN,
}

FAILURES_TO_EJECT = 3  # one slow answer is noise, two may be; three in a row are the node
FAILURES_TO_EJECT_LAST = 6  # in a row, where half of the nodes are out already
RECENT_ANSWERS = 20  # attempts that are looked back at,
RECENT_FAILURES_TO_EJECT = 10  # of which so many may not have failed, in a row or not
WRONG_TO_QUARANTINE = 3  # answers that failed a check within the last RECENT_WRONG: one may be a broken cable
RECENT_WRONG = 100
