"""Failures of locks and of confidential requests, besides those of `rules.errors`."""

from embedmesh.rules.confidential import Scheme, SealedAnswer
from embedmesh.rules.errors import CallerFailure


class LockNotFound(CallerFailure):
    """The account has no lock of that id."""

    code = "lock_not_found"


class LockUsed(CallerFailure):
    """Another request has used the lock: each is for one."""

    code = "lock_used"


class LockExpired(CallerFailure):
    """The lock was not used in time; its money is free again."""

    code = "lock_expired"


class KeyMismatch(CallerFailure):
    """The request is sealed for another node, key or model than was locked."""

    code = "key_mismatch"


class ConfidentialRefused(CallerFailure):
    """The node could not open the sealed request, or refused what is in it: the caller alone can read why.

    `answer` is the node's, with the request's scheme, for the dialect's envelope.
    """

    code = "confidential_refused"
    answer: "tuple[Scheme, SealedAnswer] | None" = None
