"""A node's life as a gateway sees it. Health is a verified embedding, not a ping."""

from enum import Enum
from typing import Literal, NamedTuple

Shortage = Literal["", "cpu", "quota"]
SHORTAGES: dict[str, str] = {"cpu": "other programs take the CPU", "quota": "the CPU quota of its group is used up"}
"""Why an engine gets too little CPU to run, in words for operators."""


class NodeState(Enum):
    """Where a node stands with this gateway."""

    UNPROVEN = "unproven"  # known, and has not yet given a right answer
    READY = "ready"  # gets work
    EJECTED = "ejected"  # gets probes only, until one is answered right
    QUARANTINED = "quarantined"  # answered wrongly: gets probes only, until an operator or a run of right ones readmits


class Check(Enum):
    """The check that a node failed. A closed list: these words label metrics and are shown to operators."""

    CONNECT = "connect"  # no connection, or one to somebody who shows another certificate
    CLOSED = "closed"  # the connection broke before the reply was whole
    TIMEOUT = "timeout"
    BUSY = "busy"  # 408, 429 or 503: load, not failure
    ACCESS = "access"  # 401 or 403
    STATUS_4XX = "status_4xx"  # any other of that class
    STATUS_5XX = "status_5xx"
    STATUS_OTHER = "status_other"  # one that is neither success nor one of the above
    HTTP = "http"  # the reply is not HTTP, or larger than any right one
    FORM = "form"  # its body is not of the protocol's form
    MODELS = "models"  # it serves none of the catalogue's
    COUNT = "count"  # as many vectors as inputs, as many answers as asked for, and no longer ones
    ORDER = "order"  # each input's index once
    WIDTH = "width"
    ENCODING = "encoding"  # strict base64, or numbers that are float32; sigmoids within 0 and 1
    FINITE = "finite"
    ZERO = "zero"  # no vector is all zeros
    TOKENS = "tokens"  # as many as we counted
    SIGNATURE = "signature"
    RECEIPTS = "receipts"
    CANARY = "canary"  # the vectors, or scores, are those of a trusted node


class Reason(NamedTuple):
    """Why a node was ejected or quarantined: the failed check, and more words for operators. Never a value."""

    check: Check | None  # None in what was written down by a version that had no such list
    words: str

    def __str__(self) -> str:
        return f"{self.check.value}: {self.words}" if self.check is not None else self.words

    @classmethod
    def read(cls, text: str) -> "Reason":
        """What `str` made of one."""
        name, colon, words = text.partition(": ")
        known = colon and name in {check.value for check in Check}
        return cls(Check(name), words) if known else cls(None, text)


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
EJECTED_SHARE_MAX = 0.5  # of all nodes, for errors and slowness: if all seem bad, it may be our fault
OUT_FIRST_S, OUT_MAX_S = 0.5, 30.0  # how long a second ejection lasts, and the longest one
FORGIVEN_S = 600.0  # without an ejection: then the next one counts as the first
TRIAL_ANSWERS = 3  # right answers, one part at a time, before an ejected node gets more at once
RECENT_ANSWERS = 20  # the attempts that count
RECENT_FAILURES_TO_EJECT = 10  # of these, the number of failures that ejects the node
WRONG_TO_QUARANTINE = 3  # answers that failed a check within the last RECENT_WRONG: one may be a broken cable
RECENT_WRONG = 100
PROBE_EVERY_S = 5.0  # of an idle node of our make: a third of the 15 s within which /readyz wants a real embedding
PROBE_GRACE_S = 2.0  # until a probe that is due has ended
