"""Token ids word by word, found in the vocabulary alone: for WordPiece as BERT has it, where white space cuts first.

There the ids of a text are those of its words, one after another, and a word's are a few look-ups. That is so for
printable ASCII: beyond it normalizers join and drop characters, so other texts are left to the tokenizer. Nothing is
remembered of any text: how long a text takes says nothing of those before it.
"""

import re
from collections.abc import Sequence

import msgspec
from tokenizers import Tokenizer

PLAIN = re.compile(r"[\t\n\r -~]*")  # its white space is what `str.split` and BERT's normalizer both take for it
MARK = r"[!-/:-@\[-`{-~]"  # stands alone, whatever is beside it
RUNS = re.compile(rf"[0-9A-Za-z]+|{MARK}").findall
LONE = re.compile(rf"[0-9A-Za-z]+|{MARK}").fullmatch


class _Part(msgspec.Struct):
    type: str


class _Normalizer(_Part):
    lowercase: bool = True


class _WordPiece(msgspec.Struct):
    vocab: dict[str, int]
    unk_token: str
    continuing_subword_prefix: str
    max_input_chars_per_word: int


class _Added(msgspec.Struct):
    content: str


class _Saved(msgspec.Struct):
    model: msgspec.Raw
    normalizer: _Normalizer | None = None
    pre_tokenizer: _Part | None = None
    added_tokens: list[_Added] = []


class TooDear(Exception):
    """A text has more characters in words that the vocabulary does not hold whole than were to be looked at."""


class Words:
    """What words stand for. Never changes."""

    def __init__(self, model: _WordPiece, unknown: int, *, lowercase: bool, leave: re.Pattern[str] | None) -> None:
        """Texts in which `leave` is found, in lower case, are left to the tokenizer."""
        begins = model.continuing_subword_prefix
        self._whole = {piece: token for piece, token in model.vocab.items() if LONE(piece)}
        self._inner = {
            piece.removeprefix(begins): token
            for piece, token in model.vocab.items()
            if piece.startswith(begins) and LONE(piece.removeprefix(begins))
        }
        self._unknown = unknown
        self._word_chars_max = model.max_input_chars_per_word
        self._piece_chars_max = max(map(len, (*self._whole, *self._inner)), default=1)
        self._lowercase = lowercase
        self._leave = leave

    def ids(self, text: str) -> list[int] | None:
        """Token ids of a text, special tokens aside; None for a text that has to be looked at as a whole."""
        return self.each([text])[0]

    def each(self, texts: Sequence[str], others_chars_max: int | None = None) -> list[list[int] | None]:
        """The same for several. Raises TooDear past so many characters in words that take more than one look-up."""
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
                for run in RUNS(word):
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
        """The longest piece that begins the word, then the longest that goes on, and so forth."""
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
    saved = msgspec.json.decode(tokenizer.to_str(), type=_Saved)
    parts = (msgspec.json.decode(saved.model, type=_Part), saved.normalizer, saved.pre_tokenizer)
    kinds = tuple(part.type if part is not None else None for part in parts)
    if saved.normalizer is None or kinds != ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
        return None
    model = msgspec.json.decode(saved.model, type=_WordPiece)
    unknown = model.vocab.get(model.unk_token)
    if unknown is None:
        return None
    leave: set[str] = set()  # found before any cut, in the text as it is or as it was normalized
    for token in saved.added_tokens:
        leave |= {token.content.lower(), tokenizer.normalizer.normalize_str(token.content).lower()}
    if not all(each.strip() for each in leave):
        return None  # one of which nothing is left may be found anywhere
    pattern = re.compile("|".join(map(re.escape, sorted(leave)))) if leave else None
    return Words(model, unknown, lowercase=saved.normalizer.lowercase, leave=pattern)
