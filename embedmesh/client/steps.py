"""What a call sends, reads and waits for, one after another, whatever carries it: both clients run these steps.

A step is yielded; a `ToSend` is answered with a `HttpAnswer` or a `NoAnswer`, a `Pause` with None. What is sent again,
and when, is decided here:

- after 429 or 503, unless `x-should-retry` says no, and where there is no connection: after what `Retry-After` says;
- where the lock has expired, or the node cannot open what was sealed, maybe as it was started anew and has other keys:
  sealed anew, for another lock;
- after a connection that broke: the same bytes once more, which the gateway knows and charges once. A confidential
  request is never sealed again for a lock that it may have used;
- where a lock that came with an earlier reply is refused: sealed anew at once, for one that is asked for.
"""

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from embedmesh.client.answer import CreateEmbeddingResponse, read_rows, to_response
from embedmesh.client.errors import CallNotAnswered, CallRefused, NodeNotTrusted, NotEmbeddings
from embedmesh.client.refusals import Problem, read_problem, retry_after_s
from embedmesh.client.wanted import Wanted
from embedmesh.rules.ports import Dice

if TYPE_CHECKING:
    from embedmesh.client.core import LockStep, SealedStep
    from embedmesh.client.reserves import Reserve, Reserves

OTHER_LOCKS_MAX = 3  # that are asked for where a node is not pinned: each sets money aside until it expires
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0  # where nobody says how long
NOT_NOW = frozenset({429, 503})
FOR_A_NEW_LOCK = frozenset({"lock_expired", "confidential_refused"})  # a slow line; a node that was started anew
OF_NO_USE = FOR_A_NEW_LOCK | {"lock_not_found", "key_mismatch"}  # a lock that came with an earlier reply
SEALED_PATH = "/confidential/embeddings"


class ToSend(NamedTuple):
    """A POST: `path` is below `/v1`."""

    path: str
    body: bytes
    headers: Mapping[str, str] = {}


class Pause(NamedTuple):
    """Wait for that long."""

    seconds: float


class HttpAnswer(NamedTuple):
    """A whole reply. Names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class NoAnswer(NamedTuple):
    """`connect`: nothing was sent. `tls`: nor will it be. `broken`: the request may have been read."""

    kind: Literal["connect", "tls", "broken"]
    words: str


T = TypeVar("T")
Steps = Generator[ToSend | Pause, HttpAnswer | NoAnswer | None, T]


class Patience:
    """How often a call tries again, and how long it waits before."""

    def __init__(self, retries: int, left_s: Callable[[], float], dice: Dice) -> None:
        """`left_s` is the time until the call's deadline."""
        self._retries = retries
        self._tried = 0
        self._left_s = left_s
        self._dice = dice

    def wait_s(self, headers: Mapping[str, str]) -> float | None:
        """Seconds before the next try; None where there is none."""
        if self._tried >= self._retries or headers.get("x-should-retry") == "false":
            return None
        own_s = min(FIRST_WAIT_S * 2**self._tried, LONGEST_WAIT_S) * (0.5 + self._dice.random() / 2)
        self._tried += 1
        told_s = retry_after_s(headers)
        wait_s = own_s if told_s is None else told_s
        return wait_s if wait_s < self._left_s() else None


def plain(wanted: Wanted, patience: Patience, headers: Mapping[str, str]) -> Steps[CreateEmbeddingResponse]:
    """An ordinary call. Raises CallRefused, CallNotAnswered or NotEmbeddings."""
    answer = yield from _answered(ToSend("/embeddings", wanted.body, headers), patience)
    if answer.status != 200:
        raise _refused(answer)
    try:
        rows = read_rows(answer.body, wanted)
    except ValueError as error:
        raise NotEmbeddings(
            f"The reply is not what an embeddings endpoint answers ({error}). Is the base URL that of one?"
        ) from None
    return to_response(rows, wanted, request_id=_request_id(answer))


def confidential(
    wanted: Wanted,
    lock_step: "LockStep",
    patience: Patience,
    now_ms: Callable[[], int],
    reserves: "Reserves | None" = None,
) -> Steps[CreateEmbeddingResponse]:
    """A sealed call. Raises NodeNotTrusted before anything of the request has left, ReplyNotTrusted, or as `plain`.

    A lock that came with an earlier reply saves the call one exchange. Where that is of no use, another is asked for.
    """
    turn = None if reserves is None else reserves.begin(wanted.model, lock_step.units, now_ms())
    reserve = None if turn is None else turn.reserve
    headers = lock_step.ahead if turn is not None and turn.asks else {}
    try:
        while True:
            sealed = yield from _sealed(lock_step, reserve, patience, now_ms)
            asked_ms = now_ms()
            answer, broke = yield from _carried(ToSend(SEALED_PATH, sealed.body, headers), patience)
            if answer.status == 200:
                rows = sealed.read(answer.body)
                if turn is not None and rows.next_lock is not None:
                    turn.keep(rows.next_lock, lock_step.units, asked_ms)
                return to_response(rows, wanted, request_id=_request_id(answer), node_id=sealed.node_id)
            told = sealed.read_refusal(answer.status, answer.body)
            problem = told or _problem(answer)
            if turn is not None and reserve is not None and _is_of_no_use(problem, broke=broke):
                turn.refused()
                reserve = None
                continue
            renewable = problem.code in FOR_A_NEW_LOCK
            waits = renewable or answer.status in NOT_NOW
            again = patience.wait_s({} if renewable else answer.headers) if waits else None
            if again is None:
                raise CallRefused(problem, request_id=_request_id(answer), sealed=told is not None)
            reserve = None
            yield Pause(again)
    finally:
        if turn is not None:
            turn.end()


def _is_of_no_use(problem: Problem, *, broke: bool) -> bool:
    """Whether a request was refused for its lock, and has not used it. `broke`: it may have, when it was sent first."""
    return problem.code in OF_NO_USE or (not broke and (problem.status == 503 or problem.code == "lock_used"))


def _carried(send: ToSend, patience: Patience) -> Steps[tuple[HttpAnswer, bool]]:
    """The answer to a sealed request, and whether it may have been read before: it is sent again byte for byte."""
    answer = yield send
    broke = isinstance(answer, NoAnswer) and answer.kind == "broken"
    if isinstance(answer, NoAnswer):
        answer = yield send
    while isinstance(answer, NoAnswer) and answer.kind == "connect":
        if (wait_s := patience.wait_s({})) is None:
            break
        yield Pause(wait_s)
        answer = yield send
    if not isinstance(answer, HttpAnswer):
        raise _not_answered(answer)
    return answer, broke


def _sealed(
    lock_step: "LockStep", reserve: "Reserve | None", patience: Patience, now_ms: Callable[[], int]
) -> Steps["SealedStep"]:
    """The request, sealed for a node that is trusted. A lock that is not used is released at its expiry."""
    others = 0
    if reserve is not None:
        try:
            return lock_step.read(reserve.lock, now_ms(), reserve.units)
        except NodeNotTrusted as error:
            if error.reason != "not_pinned":
                raise
    while True:
        answer = yield from _answered(ToSend("/nodes/lock", lock_step.body), patience)
        if answer.status != 200:
            raise _refused(answer)
        try:
            return lock_step.read(answer.body, now_ms())
        except NodeNotTrusted as error:
            if error.reason != "not_pinned" or others == OTHER_LOCKS_MAX:
                raise
        others += 1


def _answered(send: ToSend, patience: Patience) -> Steps[HttpAnswer]:
    """The answer, after as many tries as are worth while."""
    broken = 0
    while True:
        answer = yield send
        if isinstance(answer, HttpAnswer):
            wait_s = patience.wait_s(answer.headers) if answer.status in NOT_NOW else None
            if wait_s is None:
                return answer
        elif isinstance(answer, NoAnswer) and answer.kind == "broken" and broken == 0:
            broken, wait_s = 1, 0.0
        else:
            wait_s = patience.wait_s({}) if isinstance(answer, NoAnswer) and answer.kind == "connect" else None
            if wait_s is None:
                raise _not_answered(answer)
        if wait_s:
            yield Pause(wait_s)


def _not_answered(answer: NoAnswer | None) -> CallNotAnswered:
    assert answer is not None
    unknown = " Whether it was done is not known." if answer.kind == "broken" else ""
    return CallNotAnswered(f"{answer.words[:1].upper()}{answer.words[1:]}.{unknown}")


def _refused(answer: HttpAnswer) -> CallRefused:
    return CallRefused(_problem(answer), request_id=_request_id(answer))


def _problem(answer: HttpAnswer) -> Problem:
    return read_problem(answer.status, answer.body)


def _request_id(answer: HttpAnswer) -> str | None:
    return answer.headers.get("x-request-id")
