"""Parses the ordinary embeddings request: a model, one text or a few, and nothing that needs a closer look.

What it reads, `parse` reads alike, which tests/dialects compares; anything else is left to `parse`.
"""

from typing import Literal

import msgspec

from embedmesh.rules.embeddings import Call
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Catalogue

TEXTS_MAX = 64  # more are a matter of milliseconds, in which a few coroutines do not count


class _Ordinary(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    input: str | list[str]
    encoding_format: Literal["base64", "float"] | None = None


_decode = msgspec.json.Decoder(_Ordinary).decode


def parse_ordinary(body: bytes, catalogue: Catalogue) -> tuple[Call, Model] | None:
    """The call and its model; None for any request that is not ordinary, or not valid."""
    try:
        said = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    model = catalogue.find(said.model)
    texts = said.input
    single = texts.__class__ is str
    if model is None or not texts or (not single and (len(texts) > TEXTS_MAX or "" in texts)):
        return None
    if model.width < 2:  # it generates or reranks: `parse` says what it does instead
        return None
    several = [texts] if single else texts
    encoding = said.encoding_format or "float"
    return Call(model=said.model, texts=several, single=single, encoding=encoding), model  # type: ignore[arg-type]
