"""Vectors that accounts want remembered: what was embedded for an account once is not embedded for it again.

A vector is found by the account, the model with its digest, and the token ids, which cover everything else that the
vector depends on: text, prompt, truncation. Nothing of one account is found for another, not even through timing. The
memory holds vectors and keyed hashes, no texts.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

import msgspec

from embedmesh.rules.embeddings import Counted, Ids, bytes_of
from embedmesh.rules.forwarding import Answer, Share
from embedmesh.rules.models import Model

CACHED = "cache"  # in place of a node's id
ENTRY_BYTES = 400  # of an entry beside its vector's components
KEY_BYTES = 16
COMPONENT_BYTES = 4

SHRINK_BYTES = 4 * 1024 * 1024  # what goes at a time when there is to be less room: a few milliseconds of work
EVICTION_LOOKS = 64  # accounts that are looked at to find one that has much: more would take long, and gain little

Generation = Callable[[str], int | None]
"""By node id: its generation, which changes when the node is quarantined or re-added; None while it is not believed."""


Makers = tuple[tuple[str, int | None], ...]
"""The nodes that may have made a vector, each with its generation then."""


class _Entry(NamedTuple):
    row: bytes
    makers: Makers


class Learnt(NamedTuple):
    """A right answer to some inputs, to be remembered once it is paid."""

    counted: Counted
    answer: Answer
    makers: Makers


class Remembered:
    """What is known of one request's inputs."""

    def __init__(self, counted: Counted, rows: list[bytes | None]) -> None:
        """`rows` are vectors of full width, None for unknown ones."""
        self._counted = counted
        self._rows = rows
        self.inputs = sum(row is not None for row in rows)
        self.tokens = sum(length for length, row in zip(counted.lengths, rows, strict=True) if row is not None)

    @property
    def missing(self) -> Counted:
        """The inputs without a known vector, in their order."""
        unknown = [at for at, row in enumerate(self._rows) if row is None]
        counted = self._counted
        return Counted(
            lengths=[counted.lengths[at] for at in unknown],
            ids=[counted.ids[at] for at in unknown] if counted.ids is not None else None,
            texts=[counted.texts[at] for at in unknown] if counted.texts is not None else None,
            truncated=counted.truncated,
            query=counted.query,
            queries=[counted.queries[at] for at in unknown] if counted.queries is not None else None,
        )

    def join(self, answer: Answer | None, width: int) -> Answer:
        """All vectors in order: the known ones, and the nodes' answer to the others."""
        if answer is None:
            rows = b"".join(row for row in self._rows if row is not None)
            return Answer(rows, width, self.tokens, (Share(CACHED, self.tokens),))
        others = _rows_of(answer)
        data = b"".join(next(others) if row is None else row for row in self._rows)
        shares = answer.shares
        if self.tokens:
            shares = tuple(sorted((*shares, Share(CACHED, self.tokens)), key=lambda share: -share.tokens))
        return Answer(data, width, answer.tokens + self.tokens, shares)


class VectorCache:
    """At most `bytes_max` bytes. The least recently used vectors of the accounts that have most go first."""

    def __init__(self, bytes_max: int, generation: Generation) -> None:
        self._bytes_max = self._bytes_wanted = bytes_max
        self._generation = generation
        self._secret = os.urandom(32)  # or callers could choose texts whose hashes are equal
        self._accounts: dict[str, OrderedDict[bytes, _Entry]] = {}
        self._bytes_of: dict[str, int] = {}
        self.bytes = self.hits = self.misses = 0

    def has(self, account_id: str) -> bool:
        """Whether any vector of the account is remembered."""
        return account_id in self._accounts

    def look(self, account_id: str, model: Model, counted: Counted) -> Remembered | None:
        """What is known of the inputs; None if their tokens are not counted exactly."""
        if counted.ids is None or not counted.exact:
            return None
        entries = self._accounts.get(account_id)
        if entries is None:
            rows: list[bytes | None] = [None] * len(counted.ids)
        else:
            rows = [self._find(account_id, entries, key) for key in self._keys(account_id, model, counted.ids)]
        found = Remembered(counted, rows)
        self.hits += found.inputs
        self.misses += len(rows) - found.inputs
        return found

    def learn(self, counted: Counted, answer: Answer) -> Learnt:
        """What can be kept of an answer that has just come, with the generations of its nodes as they are now."""
        return Learnt(
            counted, answer, tuple((share.node_id, self._generation(share.node_id)) for share in answer.shares)
        )

    def keep(self, account_id: str, model: Model, learnt: Learnt) -> None:
        """Remember an answer that the account has paid for."""
        counted, answer, makers = learnt
        assert counted.ids is not None  # or `look` had found nothing to ask for
        entries = self._accounts.setdefault(account_id, OrderedDict())
        for key, row in zip(self._keys(account_id, model, counted.ids), _rows_of(answer), strict=True):
            before = entries.pop(key, None)
            entries[key] = entry = _Entry(row, makers)
            self._count(account_id, _size(entry) - (_size(before) if before is not None else 0))
        self._evict(account_id)

    def resize(self, bytes_max: int) -> None:
        """Have room for so much from now on. What is over goes in slices: requests go on between two of them."""
        self._bytes_wanted = bytes_max
        self._shrink()

    def _shrink(self) -> None:
        self._bytes_max = max(self._bytes_wanted, min(self._bytes_max, self.bytes - SHRINK_BYTES))
        self._evict()
        if self._bytes_max > self._bytes_wanted:
            asyncio.get_running_loop().call_soon(self._shrink)

    def _evict(self, account_id: str = "") -> None:
        """Drop vectors until there is room, most of all of the account that has just had some kept."""
        while self.bytes > self._bytes_max:
            looked_at = {*islice(self._bytes_of, EVICTION_LOOKS), account_id} & self._bytes_of.keys()
            most = max(looked_at, key=self._bytes_of.__getitem__)
            next_most = max((self._bytes_of[each] for each in looked_at if each != most), default=0)
            self._make_room(most, next_most)

    def _make_room(self, account_id: str, down_to: int) -> None:
        """Drop the account's oldest vectors until there is room, or it has no more than `down_to` bytes."""
        entries = self._accounts[account_id]
        while True:
            self._drop(account_id, entries, next(iter(entries)))
            if self.bytes <= self._bytes_max or self._bytes_of.get(account_id, 0) <= down_to:
                return

    def _find(self, account_id: str, entries: OrderedDict[bytes, _Entry], key: bytes) -> bytes | None:
        entry = entries.get(key)
        if entry is None:
            return None
        if any(number is None or number != self._generation(node_id) for node_id, number in entry.makers):
            self._drop(account_id, entries, key)
            return None
        entries.move_to_end(key)
        return entry.row

    def _drop(self, account_id: str, entries: OrderedDict[bytes, _Entry], key: bytes) -> None:
        self._count(account_id, -_size(entries.pop(key)))
        if not entries:
            del self._accounts[account_id], self._bytes_of[account_id]

    def _count(self, account_id: str, more: int) -> None:
        self.bytes += more
        self._bytes_of[account_id] = self._bytes_of.get(account_id, 0) + more

    def _keys(self, account_id: str, model: Model, ids: Sequence[Ids]) -> Iterator[bytes]:
        names = msgspec.json.encode((account_id, model.id, model.digest))
        begun = blake2b(names, digest_size=KEY_BYTES, key=self._secret)
        for each in ids:
            hashed = begun.copy()
            hashed.update(bytes_of(each))
            yield hashed.digest()


def _size(entry: _Entry) -> int:
    return len(entry.row) + ENTRY_BYTES


def _rows_of(answer: Answer) -> Iterator[bytes]:
    size = answer.width * COMPONENT_BYTES
    return (answer.data[at : at + size] for at in range(0, len(answer.data), size))
