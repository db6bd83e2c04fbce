"""Cuts texts into requests, by tokens, inputs and the size of the reply. It has no I/O.

Nobody counts tokens here: a text has as many as its bytes over BYTES_A_TOKEN, and how many bytes a token really has is
learned from replies. What an endpoint refuses as too much it does not get again.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from embedmesh.client.errors import WrongCall
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, REQUEST_INPUTS_MAX, REQUEST_TOKENS_MAX

Text = str | Sequence[int] | msgspec.Raw
"""A text, its token ids, or a text as JSON."""

UNIT_TOKENS = 16_384  # the fixed cost of a request is a few hundred tokens' on the fastest nodes: a few per cent
UNIT_REPLY_BYTES = 4 * 1024 * 1024  # wanted of a reply at most; several are in memory at one time
VECTOR_BYTES = 8 * 1024  # of one in base64, until a first reply tells: 1,536 components
COMPONENT_BYTES_BASE64 = 16 / 3  # of a component in base64
BYTES_A_TOKEN = 4.0  # of English; learned from replies
BYTES_A_TOKEN_MIN = 0.5
JSON_ID_BYTES = 8  # of an id in JSON, its comma included
BODY_BYTES = REQUEST_BODY_BYTES_MAX - 256 * 1024  # what JSON's escapes and other members may add


class Unit(NamedTuple):
    """The texts of one request, the first of which has the index `start` in the input. `size` is theirs in bytes."""

    start: int
    texts: Sequence[Text]
    size: int


class Packing:
    """What one request may have. `inputs` is what the caller wants at most; by default it follows from the sizes."""

    def __init__(self, inputs: int | None = None) -> None:
        self._inputs_wanted = inputs
        self._inputs_max = REQUEST_INPUTS_MAX
        self._bytes_max = BODY_BYTES
        self._vector_bytes: float = VECTOR_BYTES
        self._bytes_a_token = BYTES_A_TOKEN

    @property
    def inputs(self) -> int:
        """Of one request, at most."""
        wanted = self._inputs_wanted or max(1, int(UNIT_REPLY_BYTES / self._vector_bytes))
        return min(wanted, self._inputs_max)

    @property
    def size(self) -> float:
        """Bytes of the texts of one request, at most, unless it is a single text."""
        tokens = REQUEST_TOKENS_MAX / 2 if self._inputs_wanted else UNIT_TOKENS  # half: sizes are estimated
        return min(tokens * self._bytes_a_token, self._bytes_max)

    @property
    def reply_bytes(self) -> float:
        """Of the reply to a full request."""
        return self.inputs * self._vector_bytes

    def units(self, texts: Iterable[Text], start: int = 0) -> Iterator[Unit]:
        """All of the texts. It looks at no more of them than make the next request."""
        cut = Packer(self, start)
        for text in texts:
            if (unit := cut.add(text)) is not None:
                yield unit
        if (unit := cut.end()) is not None:
            yield unit

    def fits(self, texts: Sequence[Text], size: int) -> int:
        """How many of these, of `size` bytes, one request may have by what was refused before; at least one."""
        if size <= self._bytes_max and len(texts) <= self._inputs_max:
            return len(texts)
        room = self._bytes_max
        for at, text in enumerate(texts[: self._inputs_max]):
            room -= size_of(text)
            if room < 0:
                return max(at, 1)
        return min(len(texts), self._inputs_max)

    def replied(self, width: int, size: int, tokens: int) -> None:
        """What a reply to texts of `size` bytes tells of others."""
        self._vector_bytes = max(width, 1) * COMPONENT_BYTES_BASE64
        if tokens:
            self._bytes_a_token += (max(size / tokens, BYTES_A_TOKEN_MIN) - self._bytes_a_token) / 8

    def too_many(self, inputs: int) -> None:
        """That many inputs were refused. What was refused at the same time halves the number once, not twice."""
        self._inputs_max = min(self._inputs_max, max(inputs // 2, 1))

    def too_much(self, size: int) -> None:
        """A request whose texts have that many bytes was refused."""
        self._bytes_max = min(self._bytes_max, max(size // 2, 1))


class Packer:
    """Takes texts one by one, wherever they come from."""

    def __init__(self, packing: Packing, start: int = 0) -> None:
        self._packing = packing
        self._start = start
        self._begin()

    def _begin(self) -> None:
        self._texts: list[Text] = []
        self._size = 0
        self._size_max, self._inputs_max = self._packing.size, self._packing.inputs

    def add(self, text: Text) -> Unit | None:
        """The unit that is full, if this text makes one so."""
        size = len(text) if type(text) is str and text.isascii() else size_of(text)
        full = self._cut() if self._texts and self._size + size > self._size_max else None
        self._texts.append(text)
        self._size += size
        if full is None and len(self._texts) >= self._inputs_max:
            return self._cut()
        return full

    def end(self) -> Unit | None:
        """The last unit."""
        return self._cut() if self._texts else None

    def _cut(self) -> Unit:
        unit = Unit(self._start, self._texts, self._size)
        self._start += len(self._texts)
        self._begin()
        return unit


def size_of(text: Text) -> int:
    """Bytes of UTF-8, or about those of JSON. Raises WrongCall."""
    if isinstance(text, str):
        return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if isinstance(text, msgspec.Raw):
        return memoryview(text).nbytes
    try:
        return JSON_ID_BYTES * len(text)
    except TypeError:
        raise WrongCall("Every text must be a str, or a list of token ids.") from None
