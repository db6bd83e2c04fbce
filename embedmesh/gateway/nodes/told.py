"""The tokens that a sealed answer says it has, for the comparison with receipts; nothing is verified here."""

import msgspec


class _Told(msgspec.Struct):
    """Of a SealedAnswer."""

    statement: bytes


class _Statement(msgspec.Struct):
    """Of an AnswerStatement, or of a GenerationStatement."""

    tokens: int = 0
    input: int = 0
    output: int = 0


DECODE_TOLD = msgspec.msgpack.Decoder(_Told).decode
DECODE_STATEMENT = msgspec.json.Decoder(_Statement).decode


def tokens_told(answer: bytes) -> int:
    """The tokens; 0 where that is no sealed answer."""
    try:
        said = DECODE_STATEMENT(DECODE_TOLD(answer).statement)
        return said.tokens + said.input + said.output
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
