"""What a sealed chat sends, reads and waits for: as `steps`, and with a reader where the reply is a stream."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from embedmesh.client.chat_answer import ChatCompletion
from embedmesh.client.errors import CallRefused
from embedmesh.client.steps import (
    FOR_A_NEW_LOCK,
    NOT_NOW,
    HttpAnswer,
    NoAnswer,
    Patience,
    Pause,
    Steps,
    ToSend,
    _not_answered,
    _request_id,
    _sealed,
)
from embedmesh.client.wanted import Wanted

if TYPE_CHECKING:
    from embedmesh.client.chat_core import ChatReader
    from embedmesh.client.core import LockStep


class OpensStream(ToSend):
    """A POST whose reply of status 200 is read as it comes: it is answered with a `StreamBegan`."""


class StreamBegan(HttpAnswer):
    """The head of a stream is there: its reader has the rest."""


BEGAN = StreamBegan(200, {}, b"")


def sealed_chat(
    wanted: Wanted, lock_step: "LockStep", patience: Patience, now_ms: Callable[[], int]
) -> Steps["ChatCompletion | ChatReader"]:
    """The completion; for a stream what reads it.

    Raises NodeNotTrusted before anything of the request has left, ReplyNotTrusted, CallRefused or CallNotAnswered. What
    was sent is sent again only where it was refused: an answer may be dear.
    """
    from embedmesh.client.chat_core import CHAT_PATH, ChatReader

    while True:
        sealed = yield from _sealed(lock_step, None, patience, now_ms)
        reader = ChatReader(sealed, wanted)
        kind = OpensStream if wanted.stream else ToSend
        answer = yield kind(CHAT_PATH, sealed.body)
        if isinstance(answer, StreamBegan):
            return reader
        if not isinstance(answer, HttpAnswer):
            raise _not_answered(answer if isinstance(answer, NoAnswer) else None)
        if answer.status == 200:
            completion = reader.whole(answer.body)
            return msgspec.structs.replace(completion, request_id=_request_id(answer), node_id=sealed.node_id)
        problem, by_node = reader.read_refusal(answer.status, answer.body)
        renewable = problem.code in FOR_A_NEW_LOCK
        again = patience.wait_s({} if renewable else answer.headers) if renewable or answer.status in NOT_NOW else None
        if again is None:
            raise CallRefused(problem, request_id=_request_id(answer), sealed=by_node)
        yield Pause(again)
