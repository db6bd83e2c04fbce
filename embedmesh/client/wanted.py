"""What a caller wants embedded, as the body of a request, and how much it can be at most."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from embedmesh.client.errors import WrongCall
from embedmesh.rules.embeddings import Encoding
from embedmesh.rules.limits import REQUEST_INPUTS_MAX, REQUEST_TOKENS_MAX

EXTRA_TOKENS_MAX = 64  # of an input: special tokens, and the words of a model's prompt
TOKENS_AN_ID_MAX = 4  # an id stands for some four letters of cl100k_base, which other vocabularies may cut up
Inputs = str | Iterable[str] | Iterable[int] | Iterable[Iterable[int]]


class Wanted(msgspec.Struct, frozen=True):
    """`body` is the JSON of an ordinary request with base64 as its encoding: `encoding` is what the caller gets.

    `tokens_max` bounds the tokens of all inputs. `lock_tokens`: for how many money is set aside, if the caller says so.
    Of a chat, `body` is that of a chat, `operation` what the seal is bound to, and `stream` whether it is to be one.
    """

    model: str
    body: bytes
    inputs: int
    tokens_max: int
    lock_tokens: int | None = None
    encoding: Encoding = "float"
    dimensions: int | None = None
    operation: str = ""
    stream: bool = False


def want(
    *,
    model: str,
    input: Inputs,
    encoding_format: Literal["float", "base64"] | None = None,
    dimensions: int | None = None,
    lock_tokens: int | None = None,
    fields: Mapping[str, Any],
) -> Wanted:
    """The request with these members; `fields` are further ones, of which None is not sent. Raises WrongCall."""
    inputs = _inputs(input)
    if encoding_format not in (None, "float", "base64"):
        raise WrongCall("encoding_format must be float or base64.")
    given = {name: value for name, value in fields.items() if value is not None}
    if dimensions is not None:
        given["dimensions"] = dimensions
    try:
        body = msgspec.json.encode({**given, "model": model, "input": inputs, "encoding_format": "base64"})
    except UnicodeEncodeError:
        raise WrongCall("A text has half a surrogate pair, which UTF-8 cannot hold. Remove it.") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WrongCall(f"The arguments are not JSON: {type(error).__name__}.") from None
    width = given.get("dimensions", given.get("output_dimension"))
    return Wanted(
        model=model,
        body=body,
        inputs=1 if isinstance(inputs, str) or isinstance(inputs[0], int) else len(inputs),
        tokens_max=tokens_bound(inputs),
        lock_tokens=lock_tokens,
        encoding=encoding_format or "float",
        dimensions=width if isinstance(width, int) else None,
    )


def tokens_bound(inputs: "str | list[Any]") -> int:
    """How many tokens the inputs have at most: texts as many as bytes, as no vocabulary in use has more."""
    each = [inputs] if isinstance(inputs, str) or isinstance(inputs[0], int) else inputs
    sizes = (len(one.encode()) if isinstance(one, str) else TOKENS_AN_ID_MAX * len(one) for one in each)
    return min(sum(sizes) + EXTRA_TOKENS_MAX * len(each), REQUEST_TOKENS_MAX)


def _inputs(given: Any) -> "str | list[Any]":
    """A text, or a list of texts, of ids, or of lists of ids. Raises WrongCall."""
    if isinstance(given, str):
        return given
    try:
        found = [one if isinstance(one, str | int) else list(one) for one in given]
    except TypeError:
        raise WrongCall("input must be a text, a list of texts, token ids, or a list of lists of token ids.") from None
    if not found:
        raise WrongCall("input must not be empty.")
    kinds = {type(one) for one in found}
    if len(kinds) > 1 or not kinds <= {str, int, list}:
        raise WrongCall("input must be all texts, all token ids, or all lists of token ids.")
    if kinds != {int} and len(found) > REQUEST_INPUTS_MAX:
        raise WrongCall(
            f"input has {len(found):,} entries; one request takes at most {REQUEST_INPUTS_MAX:,}. Split it."
        )
    return found
