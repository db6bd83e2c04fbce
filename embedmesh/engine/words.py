"""Token ids word by word, found in the vocabulary alone: for BERT's WordPiece, where white space cuts first.

There the ids of a text are those of its words, one after another: a look-up for a word that the vocabulary holds whole,
the library's own cut into pieces for a rare one. This holds for printable ASCII; beyond it normalizers join and drop
characters, so other texts are left to the tokenizer. Nothing is remembered of any text: how long a text takes says
nothing of those before it.

Ids are kept as the bytes that a node is sent, so that those of a text are those of its words, joined.
"""

import re
import sys
from collections.abc import Sequence
from itertools import chain, compress, islice, repeat
from operator import attrgetter, not_

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from embedmesh.rules.embeddings import bytes_of

PLAIN = re.compile(r"[\t\n\r -~]*")  # its white space is the same for `str.split` and for BERT's normalizer
MARK = r"[!-/:-@\[-`{-~]"  # stands alone, whatever is beside it
RUN = re.compile(rf"[0-9A-Za-z]+|{MARK}")
ID = attrgetter("id")
NOTHING = repeat(b"")  # for what is not found
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
        sign: str,
        dropped: int | None,
    ) -> None:
        """Texts in which `leave` is found, in lower case, are left to the tokenizer; where it is, there is `sign`."""
        self._bytes = [b"" if token == dropped else bytes_of([token]) for token in range(max(vocabulary.values()) + 1)]
        self._whole = {piece: self._bytes[token] for piece, token in vocabulary.items() if RUN.fullmatch(piece)}
        self._marks = {mark: ids for mark, ids in self._whole.items() if not mark.isalnum()}
        self._cut = model.tokenize
        self._fold = str.lower if lowercase else str
        self._leave = leave
        self._sign = sign

    def packed(self, texts: Sequence[str], others_max: int = sys.maxsize, *, plain: bool = False) -> list[bytes | None]:
        """Token ids of each text, special tokens aside; None for a text that has to be looked at as a whole.

        Raises TooDear where the words that the vocabulary does not hold whole cost more than `others_max` together:
        the square of its characters each, as the library looks for every piece that a word may begin with, and some.
        `plain`: each of the texts is known to be.
        """
        single = len(texts) == 1
        joined = texts[0] if single else "".join(texts)
        plain = plain or (joined.isascii() and joined.isprintable() and self._sign not in joined)  # enough for most
        if not plain and not self._is_plain(joined):
            are = [self._is_plain(text) for text in texts]
            some = iter(self.packed([*compress(texts, are)], others_max, plain=True))
            return [next(some) if each else None for each in are]
        if single:
            words = self._fold(joined).split()
        else:
            words_of_each = [*map(str.split, map(self._fold, texts))]
            words = [*chain(*words_of_each)]
        found = [*map(self._whole.get, words, NOTHING)]
        if not all(found):
            self._find_others(words, found, others_max)
        if single:
            return [b"".join(found)]
        ids = iter(found)
        return list(map(b"".join, map(islice, repeat(ids), map(len, words_of_each))))

    def _is_plain(self, text: str) -> bool:
        """Whether the words of a text are all that counts."""
        return (
            text.isascii()
            and (text.isprintable() or PLAIN.fullmatch(text) is not None)
            and (self._leave is None or self._sign not in text or self._leave.search(text.lower()) is None)
        )

    def _find_others(self, words: list[str], found: list[bytes], others_max: int) -> int:
        """Add the ids of the words that are not found whole. Returns what is left of `others_max`."""
        get, get_mark, bytes_of_id, cut = self._whole.get, self._marks.get, self._bytes.__getitem__, self._cut
        for at in [*compress(range(len(words)), map(not_, found))]:
            word = words[at]
            if word.isalnum() or len(word) == 1:
                others_max -= len(word) ** 2 + OTHER_COST_MIN
                if others_max < 0:
                    raise TooDear
                found[at] = b"".join(map(bytes_of_id, map(ID, cut(word))))
            elif (mark := get_mark(word[-1])) is not None and (stem := get(word[:-1])) is not None:
                found[at] = stem + mark
            else:
                runs = RUN.findall(word)
                parts = list(map(get, runs, NOTHING))
                if not all(parts):
                    others_max = self._find_others(runs, parts, others_max)
                found[at] = b"".join(parts)
        return others_max


class NoWords:
    """Of a tokenizer that has to look at every text as a whole."""

    def packed(self, texts: Sequence[str], others_max: int = sys.maxsize) -> list[bytes | None]:
        """As `Words`."""
        return [None] * len(texts)


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
    shared = set.intersection(*map(set, leave)) if leave else set()
    sign = min((each for each in shared if re.fullmatch(MARK, each)), default="")  # a letter would be in every text
    return Words(model, vocabulary, lowercase=normalizer.lowercase, leave=pattern, sign=sign, dropped=dropped)
