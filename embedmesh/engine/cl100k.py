"""Token ids of OpenAI's `cl100k_base` back into text. OpenAI's clients may send ids instead of texts.

Decoding needs only the table of ranks (one line a token: base64 of its bytes, a space, its id); no merging of pairs.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX

CL100K_RANKS = 100_256
CL100K_SPECIALS = {
    100_257: "<|endoftext|>",
    100_258: "<|fim_prefix|>",
    100_259: "<|fim_middle|>",
    100_260: "<|fim_suffix|>",
    100_276: "<|endofprompt|>",
}


class Cl100k:
    """Implements the port `Decoder`."""

    def __init__(self, path: Path) -> None:
        """Read the ranks. Raises SetupError if the file is missing or is no table of ranks.

        The caller checks that it is the table which OpenAI publishes: `embedmesh.provision.assets` has its hash.
        """
        try:
            content = path.read_bytes()
        except OSError:
            raise SetupError("The cl100k ranks cannot be read. Run `embedmesh setup`.") from None
        try:
            self._bytes = [base64.b64decode(line.partition(b" ")[0]) for line in content.splitlines()]
        except ValueError:  # no base64
            self._bytes = []
        if len(self._bytes) != CL100K_RANKS:
            raise SetupError("The cl100k ranks file is damaged. Run `embedmesh setup` to fetch it again.")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for a wrong id, and for more text than a body may have.
        """
        try:
            parts = [self._bytes[token] for token in ids]
        except IndexError:
            wrong = next(token for token in ids if token >= CL100K_RANKS)
        else:
            if sum(map(len, parts)) > REQUEST_BODY_BYTES_MAX:
                raise ValueError(
                    f"These token ids stand for more than {REQUEST_BODY_BYTES_MAX:,} bytes of text. Split them."
                )
            return b"".join(parts).decode("utf-8", errors="replace")
        if wrong in CL100K_SPECIALS:
            raise ValueError(f"{wrong} is a special token of cl100k_base; special tokens are not accepted.")
        raise ValueError(f"{wrong} is not a token id of cl100k_base, the vocabulary that this model takes ids of.")
