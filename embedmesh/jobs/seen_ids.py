"""Which `custom_id`s a file has had, in eight bytes each: a million take 16 MB, where a set of texts takes a hundred.

An id stands for itself by a keyed hash of 64 bits: of a million different ids two are taken for one in one file of
thirty million. Tables are small and many, so that none takes longer than some milliseconds to grow.
"""

import os
from hashlib import blake2b

ID_HASH_BYTES = 8
SHARDS = 256
SHARD_SLOTS_FIRST = 32
FILL_MAX = 0.6  # of a table: fuller ones are searched for long


class SeenIds:
    """Open addressing with linear probing; a slot with 0 is free."""

    def __init__(self) -> None:
        self._key = os.urandom(16)  # so that nobody can make ids that meet
        self._tables = [_table(SHARD_SLOTS_FIRST) for _ in range(SHARDS)]
        self._counts = [0] * SHARDS

    def add(self, custom_id: str) -> bool:
        """Whether the id is a new one."""
        digest = blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=ID_HASH_BYTES, key=self._key).digest()
        value, shard = int.from_bytes(digest, "little") or 1, digest[0]
        table = self._tables[shard]
        if not _put(table, value):
            return False
        self._counts[shard] += 1
        if self._counts[shard] > FILL_MAX * len(table):
            self._tables[shard] = larger = _table(2 * len(table))
            for each in table:
                if each:
                    _put(larger, each)
        return True


def _table(slots: int) -> "memoryview[int]":
    return memoryview(bytearray(ID_HASH_BYTES * slots)).cast("Q")


def _put(table: "memoryview[int]", value: int) -> bool:
    mask = len(table) - 1
    at = (value >> 8) & mask  # the lowest byte has chosen the table
    while (there := table[at]) != 0:
        if there == value:
            return False
        at = (at + 1) & mask
    table[at] = value
    return True
