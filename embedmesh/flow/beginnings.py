"""The beginnings of texts, in tokens: short texts are counted together, long ones piece by piece, as far as needed."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from embedmesh.rules.errors import ContextLengthExceeded
from embedmesh.rules.ports import Tokenizer

BATCH_CHARS = 8_192  # of short texts that are looked at together


class Beginning:
    """As many pieces of a text as were counted: `count` tokens in all, of which `ids` has at least the first `room`."""

    def __init__(self, text: str, room: int, ids: list[int] | None = None) -> None:
        """The ids of a text of one piece may be known."""
        self.text = text
        self.room = room
        self.ids = [] if ids is None else ids
        self.count = len(self.ids)
        self.cuts = [0] if ids is None else [0, len(text)]  # where the pieces end
        self._counts = [0] if ids is None else [0, len(ids)]  # the tokens until there

    @property
    def is_whole(self) -> bool:
        """Whether the text was counted to its end."""
        return self.cuts[-1] == len(self.text)

    @property
    def wants_more(self) -> bool:
        """Whether it is neither whole nor has more tokens than there is room for."""
        return self.count <= self.room and not self.is_whole

    def read_on(self, tokenizer: Tokenizer, name: str) -> None:
        """Count the next piece. Raises ContextLengthExceeded, naming the input, where none can be cut off."""
        start = self.cuts[-1]
        self.skip(tokenizer, name)
        ids = tokenizer.ids([self.text[start : self.cuts[-1]]])[0]
        if len(self.ids) <= self.room:  # what is behind is only counted
            self.ids += ids
        self.count += len(ids)
        self._counts.append(self.count)

    def skip(self, tokenizer: Tokenizer, name: str) -> None:
        """Find where the next piece ends, and do not count it. Raises as `read_on` does."""
        start = self.cuts[-1]
        cut = tokenizer.next_cut(self.text, start)
        if cut is None:
            raise ContextLengthExceeded(
                f"This input has more than {len(self.text) - start:,} characters without a place where it can be cut "
                "to be counted. Shorten it.",
                param=name,
            )
        self.cuts.append(cut)

    def clip(self, tokenizer: Tokenizer, tokens: int) -> str:
        """What the first `tokens` stand for; at most as many as were counted."""
        at = bisect_right(self._counts, tokens) - 1
        start, missing = self.cuts[at], tokens - self._counts[at]
        if not missing:
            return self.text[:start]
        return self.text[:start] + tokenizer.clip(self.text[start : self.cuts[at + 1]], missing, end=False)


def beginnings(tokenizer: Tokenizer, texts: Iterable[str], room: int) -> Iterator[Beginning]:
    """The beginnings of texts in their order: short ones are whole, of longer ones nothing is counted yet."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        short = tokenizer.next_cut(text, 0) == len(text)
        if short:
            batch.append(text)
            chars += len(text)
            if chars < BATCH_CHARS:
                continue
        yield from _whole(tokenizer, batch, room)
        if not short:
            yield Beginning(text, room)
        batch, chars = [], 0
    yield from _whole(tokenizer, batch, room)


def _whole(tokenizer: Tokenizer, batch: list[str], room: int) -> Iterator[Beginning]:
    if batch:
        for text, ids in zip(batch, tokenizer.ids(batch), strict=True):
            yield Beginning(text, room, ids)
