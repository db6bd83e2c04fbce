"""Token ids word by word, found in the vocabulary alone: for BERT's WordPiece, where white space cuts first.

There the ids of a text are those of its words, one after another, and a word's are a few look-ups. This holds for
printable ASCII; beyond it normalizers join and drop characters, so other texts are left to the tokenizer. Nothing is
remembered of any text: how long a text takes says nothing of those before it.
"""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

PLAIN = re.compile(r"[\t\n\r -~]*")  # its white space is the same for `str.split` and for BERT's normalizer
MARK = r"[!-/:-@\[-`{-~]"  # stands alone, whatever is beside it
RUN = re.compile(rf"[0-9A-Za-z]+|{MARK}")


class TooDear(Exception):
    """The texts have too many characters in words that the vocabulary does not hold whole."""


class Words:
    """The ids of words. Never changes."""

    def __init__(
        self, model: WordPiece, vocabulary: dict[str, int], *, lowercase: bool, leave: re.Pattern[str] | None
    ) -> None:
        """Texts in which `leave` is found, in lower case, are left to the tokenizer."""
        prefix = model.continuing_subword_prefix
        self._whole = {piece: token for piece, token in vocabulary.items() if RUN.fullmatch(piece)}
        self._inner = {
            piece.removeprefix(prefix): token
            for piece, token in vocabulary.items()
            if piece.startswith(prefix) and RUN.fullmatch(piece.removeprefix(prefix))
        }
        self._unknown = vocabulary[model.unk_token]
        self._word_chars_max: int = model.max_input_chars_per_word
        self._piece_chars_max = max(map(len, (*self._whole, *self._inner)), default=1)
        self._lowercase = lowercase
        self._leave = leave

    def ids(self, texts: Sequence[str], others_chars_max: int | None = None) -> list[list[int] | None]:
        """Token ids of each text, special tokens aside; None for a text that has to be looked at as a whole.

        Raises TooDear past `others_chars_max` characters in words that take more than one look-up.
        """
        whole, leave = self._whole, self._leave
        spare = sum(map(len, texts)) if others_chars_max is None else others_chars_max
        result: list[list[int] | None] = []
        for text in texts:
            lower = text.lower()
            if (
                not text.isascii()
                or not (text.isprintable() or PLAIN.fullmatch(text))
                or (leave is not None and leave.search(lower))
            ):
                result.append(None)
                continue
            found: list[int] = []
            for word in (lower if self._lowercase else text).split():
                token = whole.get(word)
                if token is not None:
                    found.append(token)
                    continue
                for run in RUN.findall(word):
                    token = whole.get(run)
                    if token is not None:
                        found.append(token)
                        continue
                    spare -= len(run)
                    if spare < 0:
                        raise TooDear
                    found += self._pieces(run)
            result.append(found)
        return result

    def _pieces(self, word: str) -> list[int]:
        """The longest piece that begins the word, then the longest that continues it, and so on."""
        size = len(word)
        if size > self._word_chars_max:
            return [self._unknown]
        found: list[int] = []
        table, start = self._whole, 0
        while start < size:
            end = min(size, start + self._piece_chars_max)
            while (token := table.get(word[start:end])) is None:
                end -= 1
                if end == start:
                    return [self._unknown]
            found.append(token)
            table, start = self._inner, end
        return found


def words_of(tokenizer: Tokenizer) -> Words | None:
    """For a tokenizer that cuts at white space first; None for any other."""
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
    return Words(model, vocabulary, lowercase=normalizer.lowercase, leave=pattern)
