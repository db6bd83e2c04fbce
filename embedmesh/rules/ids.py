"""Ids of our own making: sortable by time, not guessable."""

import secrets

from embedmesh.rules.ports import Clock


def new_id(prefix: str, clock: Clock) -> str:
    """`req_019a…`: 48 bits of Unix milliseconds, then 80 random bits, in hex (the layout of UUID version 7).

    Time first, so that rows that are written together lie together in an index.
    """
    return f"{prefix}_{clock.unix_ms():012x}{secrets.token_hex(10)}"
