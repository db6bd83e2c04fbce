"""Text to the model's own token ids, with our limits and not the file's.

`tokenizer.json` often pads and truncates (the default model's: to 128) by its own settings, and says nothing about it
in its answers. Both are turned off here; whoever calls decides what is too long. Gateway and node share this module, so
that what was counted is what is embedded.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from embedmesh.rules.errors import SetupError

PROBE = "a"  # any text will do that every vocabulary knows


class ModelTokenizer:
    """One model's tokenizer. `max_tokens` bounds one input, special tokens included; it is kept here, not enforced."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        """Raises SetupError when the file is missing, broken, or adds special tokens in a way we do not know."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise SetupError(f"Model folder {folder.name} has no tokenizer.json. Run `embedmesh setup`.")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception:  # noqa: BLE001 - the library raises bare Exception
            raise SetupError(f"The tokenizer.json of {folder.name} is broken: fetch the model again.") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._head, self._tail = _find_specials(tokenizer, folder.name)
        self.max_tokens = max_tokens
        self.specials: int = len(self._head) + len(self._tail)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text: no special tokens, no padding, no truncation. Lets other threads run meanwhile."""
        if len(texts) == 1:
            return [self._tokenizer.encode(texts[0], add_special_tokens=False).ids]
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def with_specials(self, ids: Sequence[int]) -> list[int]:
        """What the model is really given for `ids`."""
        return [*self._head, *ids, *self._tail]


def _find_specials(tokenizer: Tokenizer, name: str) -> tuple[list[int], list[int]]:
    """The ids that go in front of and behind every text."""
    plain: list[int] = tokenizer.encode(PROBE, add_special_tokens=False).ids
    full: list[int] = tokenizer.encode(PROBE, add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise SetupError(f"The tokenizer of {name} rewrites texts when it adds special tokens, which is not supported.")
