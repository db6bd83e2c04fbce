"""Text to the model's own token ids, with our limits and not the file's.

`tokenizer.json` often pads and truncates (the default model's: to 128) by its own settings, and says nothing about it
in its answers. Both are turned off here; whoever calls decides what is too long. Gateway and node share this module, so
that what was counted is what is embedded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import msgspec
from tokenizers import Tokenizer

from embedmesh.engine.folder import Folder, read_folder
from embedmesh.engine.tokenizer_settings import load_tokenizer
from embedmesh.engine.words import words_of
from embedmesh.rules.errors import SetupError

PROBE = "a"  # any text will do that every vocabulary knows
CAPITALS = "THE QUICK ÄÖÉ ΔΩ ЖЯ"  # in scripts that have capitals


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
        self._words = words_of(tokenizer)
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
        found = self._find(texts)
        if self._dropped is None:
            return found
        return [[token for token in ids if token != self._dropped] for ids in found]

    def _find(self, texts: Sequence[str]) -> list[list[int]]:
        if self._words is None:
            return self._encode(texts)
        found = [self._words.ids(text) for text in texts]
        others = [at for at, ids in enumerate(found) if ids is None]
        if others:
            for at, ids in zip(others, self._encode([texts[at] for at in others]), strict=True):
                found[at] = ids
        return cast(list[list[int]], found)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if len(texts) == 1:
            return [self._tokenizer.encode(texts[0], add_special_tokens=False).ids]
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def clip(self, text: str, tokens: int, *, end: bool) -> str:
        """The piece of `text` that its first `tokens` tokens stand for, or its last where its `end` is to be kept.

        Cut inside a word the piece may have other tokens than the text had there.
        """
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        spans = [span for token, span in zip(encoded.ids, encoded.offsets, strict=True) if token != self._dropped]
        if len(spans) <= tokens:
            return text
        return text[spans[-tokens][0] :] if end else text[: spans[tokens - 1][1]]

    def with_specials(self, ids: Sequence[int]) -> list[int]:
        """What the model is really given for `ids`."""
        return [*self._head, *ids, *self._tail]


class _Unigram(msgspec.Struct):
    unk_id: int | None = None


class _Saved(msgspec.Struct):
    model: _Unigram


def _check_case(folder: Folder, tokenizer: Tokenizer) -> None:
    """sentence-transformers lower-cases texts where it is told to. We do not: the tokenizer must."""
    normalizer = tokenizer.normalizer
    lowers = normalizer is not None and normalizer.normalize_str(CAPITALS) == normalizer.normalize_str(CAPITALS.lower())
    if folder.lowercase and not lowers:
        raise SetupError(
            f"Model folder {folder.path.name}: its sentence config's do_lower_case is not what its tokenizer does. "
            "Save the tokenizer again with the normalizer that is meant."
        )


def _find_unknown(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what the vocabulary does not know, if there is one."""
    if hasattr(tokenizer.model, "unk_token"):
        token = tokenizer.model.unk_token
        return None if token is None else tokenizer.token_to_id(token)
    return msgspec.json.decode(tokenizer.to_str(), type=_Saved).model.unk_id


def _find_specials(tokenizer: Tokenizer, name: str) -> tuple[list[int], list[int]]:
    """The ids that go in front of and behind every text."""
    plain: list[int] = tokenizer.encode(PROBE, add_special_tokens=False).ids
    full: list[int] = tokenizer.encode(PROBE, add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise SetupError(f"The tokenizer of {name} rewrites texts when it adds special tokens, which is not supported.")
