"""Token ids word by word, remembered: for WordPiece as BERT has it, where white space cuts a text before all else.

There the ids of a text are those of its words, one after another. That is so for printable ASCII: beyond it normalizers
join and drop characters, so other texts are left to the tokenizer. A word costs a look-up instead of two microseconds.
"""

import re
from collections.abc import Iterable
from itertools import chain
from threading import Lock

import msgspec
from tokenizers import Tokenizer

WORDS_MAX = 32_768  # in each of two generations; 20 MB of prose in all, and 100 MB of the worst there is
LEARNT_MAX = 4_096  # different words of a text that has a new one; a text with more of them is no prose
WORD_CHARS_MAX = 64  # longer ones come once
WORD_TOKENS_MAX = 16  # so do words of more tokens, which would take ten times the memory of others

PLAIN = re.compile(r"[\t\n\r -~]*")  # its white space is what `str.split` and BERT's normalizer both take for it


class _Part(msgspec.Struct):
    type: str


class _Added(msgspec.Struct):
    content: str
    rstrip: bool = False


class _Saved(msgspec.Struct):
    model: _Part
    normalizer: _Part | None = None
    pre_tokenizer: _Part | None = None
    added_tokens: list[_Added] = []


class Words:
    """What the words that were seen of late stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self._young: dict[str, tuple[int, ...]] = {}
        self._old: dict[str, tuple[int, ...]] = {}
        self._changing = Lock()  # long texts are counted in threads; who only looks up needs none

    def ids(self, text: str) -> list[int] | None:
        """Token ids of a text, special tokens aside; None for a text that has to be looked at as a whole."""
        if PLAIN.fullmatch(text) is None:
            return None
        words = text.split()
        young = self._young
        try:
            return list(chain.from_iterable([young[word] for word in words]))
        except KeyError:
            known = self._learn(set(words))
            return list(chain.from_iterable([known[word] for word in words]))

    def _learn(self, words: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The ids of some words. Those that were not known are found together, and remembered."""
        known: dict[str, tuple[int, ...]] = {}
        missing = []
        for word in words:
            ids = self._young.get(word) or self._old.get(word)
            if ids is None:
                missing.append(word)
            else:
                known[word] = ids
        known |= self._find(missing)
        if len(known) > LEARNT_MAX:
            return known
        kept = {word: ids for word, ids in known.items() if len(word) <= WORD_CHARS_MAX and len(ids) <= WORD_TOKENS_MAX}
        with self._changing:
            if len(self._young) + len(kept) > WORDS_MAX:
                self._young, self._old = {}, self._young
            self._young.update(kept)
        return known

    def _find(self, words: list[str]) -> dict[str, tuple[int, ...]]:
        encoded = self._encode(" ".join(words), add_special_tokens=False)
        found: dict[str, tuple[int, ...]] = {}
        tokens = list(zip(encoded.ids, encoded.offsets, strict=True))
        at = end = 0
        for word in words:
            end += len(word) + 1
            first = at
            while at < len(tokens) and tokens[at][1][1] < end:  # by its end: `lstrip` tokens begin with a space
                at += 1
            found[word] = tuple(token for token, _ in tokens[first:at])
        return found


def words_of(tokenizer: Tokenizer) -> Words | None:
    """For a tokenizer that cuts at white space first; None for any other."""
    saved = msgspec.json.decode(tokenizer.to_str(), type=_Saved)
    parts = (saved.model, saved.normalizer, saved.pre_tokenizer)
    kinds = tuple(part.type if part is not None else None for part in parts)
    if kinds != ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
        return None
    if any(token.rstrip or token.content.split() != [token.content] for token in saved.added_tokens):
        return None  # one that takes in white space is found before any cut
    if not all(tokenizer.normalizer.normalize_str(token.content) for token in saved.added_tokens):
        return None  # one of which nothing is left may be found anywhere, white space too
    return Words(tokenizer)
