"""What a tokenizer is made of: tokenizer.json, as the library reads it and as it is written, and its settings."""

import base64
import binascii
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from tokenizers import Tokenizer, normalizers

from embedmesh.engine.jsonfile import Fields
from embedmesh.rules.errors import SetupError

Refuse = Callable[[str], SetupError]


class ModelJson(msgspec.Struct):
    """The settings of tokenizer.json's model that the library does not expose."""

    unk_id: int | None = None
    byte_fallback: bool = False


class TokenizerJson(msgspec.Struct):
    """The parts of tokenizer.json that we read ourselves."""

    model: ModelJson
    added_tokens: list[dict[str, Any]] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


class TokenizerSource(NamedTuple):
    """What a tokenizer is made of: `config` is tokenizer_config.json, `file` what tokenizer.json makes alone."""

    config: Fields
    file: Tokenizer
    json: TokenizerJson
    refuse: Refuse

    def flag(self, name: str, default: bool, *, null: bool | None = None) -> bool:
        """A setting that is true or false; `null` is what null means, where null is allowed."""
        value = self.config.get(name, default)
        value = null if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(f"tokenizer_config.json has {name!r} = {value!r}"[:120])
        return value

    def model(self, kind: str, **changes: object) -> Any:
        """The model of tokenizer.json with the `changes` of its class; its other settings must be the usual ones."""
        model = self.file.model
        if type(model).__name__ != kind:
            raise self.refuse(f"its 'tokenizer_class' is for {kind}, and its tokenizer.json for another model")
        prefix = "##" if kind == "WordPiece" else ""
        usual = {"continuing_subword_prefix": prefix, "end_of_word_suffix": "", "max_input_chars_per_word": 100}
        for name, value in usual.items():
            if getattr(model, name, value) not in (value, value or None):
                raise self.refuse(f"its tokenizer.json has {name!r} = {getattr(model, name)!r}"[:120])
        for name, value in changes.items():
            setattr(model, name, value)
        return model

    def unigram(self, unk_id: int) -> Any:
        """The model, which must be a Unigram whose unknown pieces have that id."""
        if (self.json.model.unk_id, self.json.model.byte_fallback) != (unk_id, False):
            raise self.refuse(f"its tokenizer.json has 'unk_id' = {self.json.model.unk_id}, its class {unk_id}")
        return self.model("Unigram")

    def charsmap(self) -> Any:
        """The first table of characters among the normalizers of tokenizer.json."""
        found = self.json.normalizer or {}
        listed = found.get("normalizers", []) if found.get("type") == "Sequence" else [found]
        for one in listed:
            if isinstance(one, dict) and one.get("type") == "Precompiled" and "precompiled_charsmap" in one:
                try:
                    return normalizers.Precompiled(base64.b64decode(one["precompiled_charsmap"]))
                except (TypeError, binascii.Error):
                    break
        return None
