"""Text to the model's own token ids, with our limits and not the file's.

`tokenizer.json` often pads and truncates (the default model's: to 128) by its own settings, and its results do not show
it. Both are turned off here; the caller decides what is too long. Gateway and node share this module, so that the
tokens counted are the tokens embedded.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tokenizers import Tokenizer

from embedmesh.engine.cuts import cuts_of
from embedmesh.engine.folder import Folder, read_folder
from embedmesh.engine.tokenizer_settings import load_tokenizer
from embedmesh.engine.tokenizer_source import TokenizerJson
from embedmesh.engine.words import NoWords, TooDear, Words, words_of
from embedmesh.rules.embeddings import ENDS_FIRST, Ids, bytes_of, numbers_of
from embedmesh.rules.errors import SetupError

TOKENIZER_PROBE = "a"  # any text will do that every vocabulary knows
CAPITALS = "THE QUICK ÄÖÉ ΔΩ ЖЯ"  # in scripts that have capitals
PIECE_CHARS = 2_048  # at most some 10 ms of a tokenizer's worst words
RUN_CHARS_MAX = 32_768  # without a possible cut: 20 ms and 10 MB of smileys. More than fits of any language
SOON_CHARS_MAX = 4_096  # of words that are looked up whole: 0.2 ms
SOON_TEXTS_MAX = 512
SOON_OTHERS_MAX = 10_000  # the cost of words that are not: a hundred of ten letters, or 1 ms of the worst
SOON_WHOLE_CHARS_MAX = 256  # of what the tokenizer looks at: 1 ms of its worst words
SOON_WHOLE_MAX = 16


class Around(NamedTuple):
    """The special ids before, between and behind the texts of an input, of which a reranker's has two, and others' one.

    `typed`: the model is given token types, 1 for what belongs to the second text and 0 for all before.
    """

    head: list[int]
    between: tuple[int, ...]
    tail: list[int]
    typed: bool = False


class ModelTokenizer:
    """One model's tokenizer. `max_tokens` bounds one input, special tokens included; it is kept here, not enforced."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        """Raises SetupError when the folder is not understood, or its tokenizer.json is missing, broken, or adds
        special tokens in a way we do not know.
        """
        folder = read_folder(path)
        tokenizer, typed = load_tokenizer(folder)
        _check_case(folder, tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        if hasattr(tokenizer.model, "_resize_cache"):
            tokenizer.model._resize_cache(0)  # of earlier words: its timing would reveal other accounts' texts
        added = tokenizer.get_added_tokens_decoder()
        self._dropped = _find_unknown(tokenizer) if folder.drops_unknown else None
        around = Around([], (), [])
        if folder.reranks:
            around = _find_pair(tokenizer, path.name, typed)
        elif folder.source != "static":
            around = _find_specials(tokenizer, path.name)
        self._head, self.between, self._tail, typed = around
        last = self.between[-1] if self.between else 0
        self.ends_first: int = last | ENDS_FIRST
        """The last id of a pair's first segment."""
        self._between = bytes_of([*self.between[:-1], self.ends_first])
        self._mark = ~last if typed else last
        self.max_tokens = max_tokens
        self.specials: int = len(self._head) + len(self._tail)
        self.vocab_size: int = max(tokenizer.get_vocab_size(with_added_tokens=True), *(at + 1 for at in added), 0)
        self.special_ids: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text: no special tokens, no padding, no truncation. Lets other threads run meanwhile.

        A text that a static model knows no word of has none.
        """
        found: list[Any] = self._words.packed(texts)
        self._complete(texts, found)
        return [numbers_of(each) for each in found]

    def prepare(self) -> None:
        """Build the tables that the first texts would otherwise wait for: that may take a second."""
        self.packed([TOKENIZER_PROBE])
        self.next_cut(TOKENIZER_PROBE * (PIECE_CHARS + 1), 0)

    def packed(self, texts: Sequence[str]) -> list[bytes] | None:
        """The same as little-endian uint32, if it takes about a millisecond whatever the texts are; else None."""
        if len(texts) > SOON_TEXTS_MAX or sum(map(len, texts)) > SOON_CHARS_MAX:
            return None
        try:
            found: list[Any] = self._words.packed(texts, SOON_OTHERS_MAX)
        except TooDear:
            return None
        if None in found:
            others = [len(text) for text, ids in zip(texts, found, strict=True) if ids is None]
            if len(others) > SOON_WHOLE_MAX or sum(others) > SOON_WHOLE_CHARS_MAX:
                return None
            self._complete(texts, found)
        return found

    def next_cut(self, text: str, start: int) -> int | None:
        """Where the next piece of a text ends: the ids of its pieces are those of the text. None for one too large.

        `start` is where the last one ended.
        """
        if len(text) - start <= PIECE_CHARS:
            return len(text)
        if self._cuts is not None:
            cut = self._cuts.search(text, start + PIECE_CHARS, min(len(text), start + RUN_CHARS_MAX))
            if cut is not None:
                return cut.start()
        return len(text) if len(text) - start <= RUN_CHARS_MAX else None

    @cached_property
    def _words(self) -> Words | NoWords:
        """Built at the first text: a node behind gateways counts none and saves the memory."""
        return words_of(self._tokenizer, self._dropped) or NoWords()

    @cached_property
    def _cuts(self) -> re.Pattern[str] | None:
        return cuts_of(self._tokenizer)

    def _complete(self, texts: Sequence[str], found: list[Any]) -> None:
        """Add the ids of the texts that are not found yet."""
        others = [at for at, ids in enumerate(found) if ids is None]
        if not others:
            return
        for at, ids in zip(others, self._encode([texts[at] for at in others]), strict=True):
            found[at] = bytes_of(ids if self._dropped is None else [token for token in ids if token != self._dropped])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if len(texts) == 1:
            return [self._tokenizer.encode(texts[0], add_special_tokens=False).ids]
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def clip(self, text: str, tokens: int, *, end: bool) -> str:
        """The piece of `text` that its first `tokens` tokens cover, or its last ones if the `end` is to be kept.

        Cut inside a word the piece may have other tokens than the text had there.
        """
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        spans = [span for token, span in zip(encoded.ids, encoded.offsets, strict=True) if token != self._dropped]
        if len(spans) <= tokens:
            return text
        return text[spans[-tokens][0] :] if end else text[: spans[tokens - 1][1]]

    def with_specials(self, ids: Sequence[int]) -> list[int]:
        """The ids that the model really gets for `ids`."""
        return [*self._head, *ids, *self._tail]

    def pair(self, query: Ids, document: Ids) -> bytes:
        """The ids of a pair, without the special ones around it. The last one of its first segment has ENDS_FIRST."""
        return bytes_of(query) + self._between + bytes_of(document)

    def marked(self, pair: Sequence[int]) -> list[int]:
        """What the graph gets for the ids of a `pair`; where it takes token types, ~id ends the first segment."""
        at = pair.index(self.ends_first)
        return [*self._head, *pair[:at], self._mark, *pair[at + 1 :], *self._tail]


def _check_case(folder: Folder, tokenizer: Tokenizer) -> None:
    """sentence-transformers lower-cases texts where its config says so. We do not: the tokenizer must."""
    normalizer = tokenizer.normalizer
    lowers = normalizer is not None and normalizer.normalize_str(CAPITALS) == normalizer.normalize_str(CAPITALS.lower())
    if folder.lowercase and not lowers:
        raise SetupError(
            f"Model folder {folder.path.name}: its sentence config has do_lower_case, which its tokenizer does not do. "
            "Save the tokenizer again with a normalizer that does."
        )


def _find_unknown(tokenizer: Tokenizer) -> int | None:
    """The id of unknown pieces, if there is one."""
    if hasattr(tokenizer.model, "unk_token"):
        token = tokenizer.model.unk_token
        return None if token is None else tokenizer.token_to_id(token)
    return msgspec.json.decode(tokenizer.to_str(), type=TokenizerJson).model.unk_id


def _find_specials(tokenizer: Tokenizer, name: str) -> Around:
    """The ids that go in front of and behind every text."""
    plain: list[int] = tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=False).ids
    full: list[int] = tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return Around(full[:start], (), full[start + len(plain) :])
    raise _rewrites(name)


def _find_pair(tokenizer: Tokenizer, name: str, typed: bool | None) -> Around:
    """The ids around and between two texts. `typed`: whether the model is given the tokenizer's token types."""
    plain: list[int] = tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=False).ids
    both: Any = tokenizer.encode(TOKENIZER_PROBE, TOKENIZER_PROBE, add_special_tokens=True)
    first, second = ([at for at, text in enumerate(both.sequence_ids) if text == which] for which in (0, 1))
    if not plain or [[both.ids[at] for at in text] for text in (first, second)] != [plain, plain]:
        raise _rewrites(name)
    head, between, tail = both.ids[: first[0]], both.ids[first[-1] + 1 : second[0]], both.ids[second[-1] + 1 :]
    if not between:
        raise SetupError(f"The tokenizer of {name} puts nothing between two texts, so that it cannot rerank.")
    types = set(both.type_ids[: second[0]]), set(both.type_ids[second[0] :])
    if any(types[0]) or len(types[1]) > 1 or max(types[1]) > 1 or (typed is None and any(types[1])):
        raise SetupError(
            f"The tokenizer of {name} gives token types in a way that is not known. If its tokenizer_config.json names"
            " no class, it must have model_input_names, which say whether the model gets them."
        )
    return Around(head, tuple(between), tail, typed=bool(typed) and types[1] == {1})


def _rewrites(name: str) -> SetupError:
    return SetupError(f"The tokenizer of {name} rewrites texts when it adds special tokens, which is not supported.")
