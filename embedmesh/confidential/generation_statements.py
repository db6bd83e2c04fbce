"""What a sidecar says in the clear about each sealed event, signed by its identity: gateway and client check it."""

import msgspec

from embedmesh.confidential.failures import Untrusted
from embedmesh.confidential.statements import SDK_NONCE_BYTES, read_strictly, reply_digest
from embedmesh.rules.confidential import SealedAnswer
from embedmesh.rules.generation import Generating
from embedmesh.rules.sealed_generation import GENERATED, GenerationStatement, SignedCounts
from embedmesh.signing.identity import Identity, node_id, verify


class AnsweredRequest(msgspec.Struct, frozen=True):
    """Which answer of which node an event belongs to: the same for all of one stream. `digest` is the request's."""

    public_key: bytes  # the node's identity
    lock: int
    digest: bytes
    modality: Generating
    stream: bool


def sign_event(
    identity: Identity,
    answered: AnsweredRequest,
    sealed: bytes,
    counts: SignedCounts,
    *,
    number: int,
    final: bool,
    status: int,
    time_ms: int,
    nonce: bytes = b"",
) -> tuple[bytes, bytes]:
    """The JSON of a GenerationStatement and its signature."""
    statement = msgspec.json.encode(
        GenerationStatement(
            version=1,
            node_id=node_id(identity.public_key),
            lock=answered.lock,
            request_digest=answered.digest,
            reply_digest=reply_digest(sealed, nonce),
            modality=answered.modality,
            stream=answered.stream,
            number=number,
            final=final,
            status=200 if status == 200 else 400,
            input=counts.input,
            cached=counts.cached,
            output=counts.output,
            images=counts.images,
            size=counts.size,
            estimated=counts.estimated,
            time_ms=time_ms,
        )
    )
    return statement, identity.sign(GENERATED, statement)


def read_event(answer: SealedAnswer, answered: AnsweredRequest, number: int, units: int) -> GenerationStatement:
    """The statement of an event at this place, under a lock of `units` tokens. Raises Untrusted."""
    if not verify(answered.public_key, GENERATED, answer.statement, answer.signature):
        raise Untrusted("signature")
    statement = read_strictly(answer.statement, GenerationStatement)
    if statement.node_id != node_id(answered.public_key):
        raise Untrusted("node")
    if statement.lock != answered.lock:
        raise Untrusted("lock")
    if statement.request_digest != answered.digest:
        raise Untrusted("request")
    if (statement.modality, statement.stream) != (answered.modality, answered.stream):
        raise Untrusted("operation")
    if statement.number != number:
        raise Untrusted("order")
    if len(answer.nonce) not in SDK_NONCE_BYTES or statement.reply_digest != reply_digest(answer.sealed, answer.nonce):
        raise Untrusted("reply")
    _check_counts(statement, answer, units)
    return statement


def _check_counts(statement: GenerationStatement, answer: SealedAnswer, units: int) -> None:
    tokens, images = statement.input + statement.output, statement.images
    if statement.status == 400:
        if tokens or images or statement.cached or statement.number or not statement.final:
            raise Untrusted("count")
        return
    if not answer.sealed or statement.cached > statement.input or tokens > units:
        raise Untrusted("count")
    if statement.modality == "images":
        right = not tokens and images == 1 and statement.final
    else:
        right = not images and not statement.size and statement.input > 0
    if not right or (not statement.stream and not (statement.final and statement.number == 0)):
        raise Untrusted("count")
