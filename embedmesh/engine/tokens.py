"""Text to the model's own token ids, with our limits and not the file's.

`tokenizer.json` often pads and truncates (the default model's: to 128) by its own settings, and its results do not show
it. Both are turned off here; the caller decides what is too long. Gateway and node share this module, so that the
tokens counted are the tokens embedded.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from embedmesh.engine.cuts import cuts_of
from embedmesh.engine.folder import Folder, read_folder
from embedmesh.engine.tokenizer_settings import load_tokenizer
from embedmesh.engine.tokenizer_source import TokenizerJson
from embedmesh.engine.words import NoWords, TooDear, Words, words_of
from embedmesh.rules.embeddings import bytes_of, numbers_of
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


class ModelTokenizer:
    """One model's tokenizer. `max_tokens` bounds one input, special tokens included; it is kept here, not enforced."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        """Raises SetupError when the folder is not understood, or its tokenizer.json is missing, broken, or adds
        special tokens in a way we do not know.
        """
        folder = read_folder(path)
        tokenizer = load_tokenizer(folder)
        _check_case(folder, tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        if hasattr(tokenizer.model, "_resize_cache"):
            tokenizer.model._resize_cache(0)  # of earlier words: its timing would reveal other accounts' texts
        added = tokenizer.get_added_tokens_decoder()
        self._dropped = _find_unknown(tokenizer) if folder.drops_unknown else None
        self._head, self._tail = ([], []) if folder.source == "static" else _find_specials(tokenizer, path.name)
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


def _find_specials(tokenizer: Tokenizer, name: str) -> tuple[list[int], list[int]]:
    """The ids that go in front of and behind every text."""
    plain: list[int] = tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=False).ids
    full: list[int] = tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise SetupError(f"The tokenizer of {name} rewrites texts when it adds special tokens, which is not supported.")
