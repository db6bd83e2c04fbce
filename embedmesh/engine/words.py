"""Token ids word by word, found in the vocabulary alone: for BERT's WordPiece, where white space cuts first.

There the ids of a text are those of its words, one after another: a look-up for a word that the vocabulary holds whole,
the library's own cut into pieces for any other. This holds for printable ASCII; beyond it normalizers join and drop
characters, so other texts are left to the tokenizer. Nothing is remembered of any text: how long a text takes says
nothing of those before it.

Ids are kept as the bytes that a node is sent, so that those of a text are those of its words, joined.
"""

import re
import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import cast

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from embedmesh.rules.embeddings import bytes_of

PLAIN = re.compile(r"[\t\n\r -~]*")  # its white space is the same for a regular expression and for BERT's normalizer
MARK = r"[!-/:-@\[-`{-~]"
RUN = re.compile(r"[!-~](?:(?<=[0-9A-Za-z])[0-9A-Za-z]*)?")
"""A word: letters and digits, or a mark, which stands alone whatever is beside it. It may begin with any printable
character, so that white space is skipped six times as fast as by the alternation that says the same.
"""
ID = attrgetter("id")
OTHER_COST_MIN = 8  # in squares of characters: half a microsecond


class TooDear(Exception):
    """The texts have too many characters in words that the vocabulary does not hold whole."""


class Words:
    """The ids of words. Never changes."""

    def __init__(
        self,
        model: WordPiece,
        vocabulary: dict[str, int],
        *,
        lowercase: bool,
        leave: re.Pattern[str] | None,
        dropped: int | None,
    ) -> None:
        """Texts in which `leave` is found, in lower case, are left to the tokenizer."""
        self._bytes = [b"" if token == dropped else bytes_of([token]) for token in range(max(vocabulary.values()) + 1)]
        self._whole = {piece: self._bytes[token] for piece, token in vocabulary.items() if RUN.fullmatch(piece)}
        self._pieces = model.tokenize
        self._fold = str.lower if lowercase else str
        self._leave = leave

    def packed(self, texts: Sequence[str], others_max: int = sys.maxsize) -> list[bytes | None]:
        """Token ids of each text, special tokens aside; None for a text that has to be looked at as a whole.

        Raises TooDear where the words that the vocabulary does not hold whole cost more than `others_max` together:
        the square of its characters each, as the library looks for every piece that a word may begin with, and some.
        """
        all_plain = self._is_plain("".join(texts))
        get, fold, find = self._whole.get, self._fold, RUN.findall
        result: list[bytes | None] = []
        for text in texts:
            if not all_plain and not self._is_plain(text):
                result.append(None)
                continue
            runs = find(fold(text))
            found = list(map(get, runs))
            try:
                result.append(b"".join(cast(list[bytes], found)))
            except TypeError:
                others_max = self._cut_others(runs, found, others_max)
                result.append(b"".join(cast(list[bytes], found)))
        return result

    def _is_plain(self, text: str) -> bool:
        """Whether the words of a text are all that counts."""
        return (
            text.isascii()
            and (text.isprintable() or PLAIN.fullmatch(text) is not None)
            and (self._leave is None or self._leave.search(text.lower()) is None)
        )

    def _cut_others(self, runs: list[str], found: list[bytes | None], others_max: int) -> int:
        """Find the words that the vocabulary does not hold whole. Returns what is left of `others_max`."""
        pieces, bytes_of_id = self._pieces, self._bytes.__getitem__
        at = -1
        for _ in range(found.count(None)):
            at = found.index(None, at + 1)
            run = runs[at]
            chars = len(run)
            others_max -= chars * chars + OTHER_COST_MIN
            if others_max < 0:
                raise TooDear
            found[at] = b"".join(map(bytes_of_id, map(ID, pieces(run))))
        return others_max


def words_of(tokenizer: Tokenizer, dropped: int | None = None) -> Words | None:
    """For a tokenizer that cuts at white space first; None for any other. The id that is `dropped` is left out."""
    model, normalizer = tokenizer.model, tokenizer.normalizer
    if not (
        isinstance(model, WordPiece)
        and isinstance(normalizer, BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
    ):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if model.unk_token not in vocabulary:
        return None
    leave: set[str] = set()  # found before any cut, in the text as it is or as it was normalized
    for token in tokenizer.get_added_tokens_decoder().values():
        leave |= {token.content.lower(), normalizer.normalize_str(token.content).lower()}
    if not all(each.strip() for each in leave):
        return None  # a token of which nothing is left may be found anywhere
    pattern = re.compile("|".join(map(re.escape, sorted(leave)))) if leave else None
    return Words(model, vocabulary, lowercase=normalizer.lowercase, leave=pattern, dropped=dropped)
