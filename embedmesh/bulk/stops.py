"""How a run over many texts ends early, each in one line for people. Workers in other processes raise these, too."""

from embedmesh.client.bulk.requests import NothingAtAddress
from embedmesh.client.errors import (
    CallNotAnswered,
    CallRefused,
    EmbedmeshError,
    NodeNotTrusted,
    NotEmbeddings,
    NotTrusted,
)

FINAL_STATUSES = frozenset({400, 404, 405, 422})  # no other key, credit or wait changes the reply
OPTIONS = {name: f"--{name.replace('_', '-')}" for name in ("model", "dimensions", "input_type", "truncate")}


class Stopped(Exception):
    """The run cannot continue. The message is one line that says why; what is written so far stays valid."""


class RequestRefused(Stopped):
    """The endpoint refuses any request with these fields: the command must change."""


class NothingListens(Stopped):
    """The very first connection was refused: there is no endpoint, so waiting for it is useless."""


def stopped_by(error: EmbedmeshError) -> Stopped:
    """The same in the words of a command."""
    if isinstance(error, CallRefused):
        problem = error.problem
        words = f"The endpoint refused: {problem.message.rstrip('.')} ({problem.code})."
        if problem.status in FINAL_STATUSES:
            return RequestRefused(f"{words} Change {OPTIONS.get(problem.param or '', 'the command')}.")
        return Stopped(words)
    if isinstance(error, NothingAtAddress):
        todo = "start it with: embedmesh serve" if error.is_refused else "check --url"
        return NothingListens(f"{error.words}; {todo}")
    if isinstance(error, NotEmbeddings):
        return Stopped("The endpoint's answer is not what an embeddings endpoint answers. Check --url.")
    if isinstance(error, NodeNotTrusted):
        return RequestRefused(error.message)
    assert isinstance(error, CallNotAnswered | NotTrusted)  # nothing else is raised of texts that are JSON
    return Stopped(error.message.rstrip("."))
