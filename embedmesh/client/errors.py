"""What a call can end with besides an answer. Every message says what is wrong and what to do, and holds no text."""

from typing import Any

from embedmesh.client.refusals import Problem


class EmbedmeshError(Exception):
    """The base of all that this package raises."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> "tuple[Any, ...]":
        """Whole, from a worker process to its driver: by itself an exception is made anew of its message alone."""
        return _made_again, (type(self), self.args, self.__dict__)


class WrongPins(EmbedmeshError, ValueError):
    """Pins that cannot be used: which line, and why."""


class WrongCall(EmbedmeshError, ValueError):
    """The arguments cannot be sent: nothing was."""


class CallRefused(EmbedmeshError):
    """The gateway, or a node through it, refused the request; nothing is charged.

    `status` is HTTP's; `code` and `param` are those of the error's envelope. `sealed`: it is the word of the node that
    was trusted, which only the caller could read; else it is the gateway's.
    """

    def __init__(self, problem: Problem, *, request_id: str | None = None, sealed: bool = False) -> None:
        who = "The node" if sealed else "The gateway"
        super().__init__(f"{who} refused: {problem.message.rstrip('.')} ({problem.code}, HTTP {problem.status}).")
        self.problem = problem
        self.status = problem.status
        self.code = problem.code
        self.param = problem.param
        self.request_id = request_id
        self.sealed = sealed


class InputRefused(CallRefused):
    """One of many texts was refused: that with this index, from 0."""

    def __init__(self, index: int, problem: Problem) -> None:
        super().__init__(problem)
        self.index = index
        self.message = f"Text {index:,}: {self.message}"
        self.args = (self.message,)


class CallNotAnswered(EmbedmeshError):
    """No connection, or one that broke before the reply was whole."""


class CallTooSlow(EmbedmeshError, TimeoutError):
    """The call's own deadline passed; whether it was done is not known."""


class NotEmbeddings(EmbedmeshError):
    """The reply is not what an embeddings endpoint answers."""


class NotScores(EmbedmeshError):
    """The reply is not what a rerank endpoint answers."""


class NotTrusted(EmbedmeshError):
    """A check of a confidential request failed. `reason` is a word for programs."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NodeNotTrusted(NotTrusted):
    """The node that the gateway offers is not one to seal for. Nothing of the request has left this process."""


class ReplyNotTrusted(NotTrusted):
    """The reply is not what the node answered to this request. Nothing of it is returned."""


def _made_again(kind: type[EmbedmeshError], args: tuple[Any, ...], state: dict[str, Any]) -> EmbedmeshError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
