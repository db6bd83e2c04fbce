"""Ids of our own making: sortable by time, not guessable."""

import os
import re

from embedmesh.rules.ports import Clock

RANDOM_BYTES = 10
PIECES = 256  # of randomness that are asked of the system at one time: asking costs most

OWN_ID = re.compile(f"[a-z]+_([0-9a-f]{{12}})[0-9a-f]{{{2 * RANDOM_BYTES}}}")
PIECE = re.compile(f".{{{2 * RANDOM_BYTES}}}")

_pieces: list[str] = []  # not yet used; to take one is a single step, whatever other threads do


def new_id(prefix: str, clock: Clock) -> str:
    """`req_019a…`: 48 bits of Unix milliseconds, then 80 random bits, in hex (the layout of UUID version 7).

    Time first, so that rows that are written together lie together in an index.
    """
    return id_at(prefix, clock.unix_ms())


def id_at(prefix: str, unix_ms: int) -> str:
    """The same where the time is known."""
    try:
        return f"{prefix}_{unix_ms:012x}{_pieces.pop()}"
    except IndexError:
        return f"{prefix}_{unix_ms:012x}{random_hex()}"


def first_id(prefix: str, unix_ms: int) -> str:
    """Whatever was named before that moment sorts before it."""
    return f"{prefix}_{unix_ms:012x}"


def began_ms(own_id: str, otherwise: int) -> int:
    """When an id was made; `otherwise` for one that is not of our own making."""
    found = OWN_ID.fullmatch(own_id)
    return int(found[1], 16) if found else otherwise


def random_hex() -> str:
    """Twenty hex digits that nobody can guess."""
    try:
        return _pieces.pop()
    except IndexError:
        first: str
        first, *rest = PIECE.findall(os.urandom(RANDOM_BYTES * (PIECES + 1)).hex())
        _pieces.extend(rest)
        return first
