"""Embedding requests and replies of other APIs: each is a form, what its members are called here, and how it replies.

The members of a form become those of OpenAI's request, which are checked as ever (`openai.parse.validate`), so that a
dialect decides nothing. Its failures name its own members, in its own envelope.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
import orjson

from embedmesh.dialects.openai.broken import broken_json
from embedmesh.dialects.openai.parse import validate
from embedmesh.dialects.openai.render import TRUNCATED_HEADER, finished
from embedmesh.dialects.openai.values import check_depth, check_values
from embedmesh.dialects.quantised import Matrix
from embedmesh.rules.embeddings import Call
from embedmesh.rules.errors import CallerFailure, Failure, InvalidType, InvalidValue, MissingParameter, UnknownParameter
from embedmesh.rules.exchange import Reply
from embedmesh.rules.forwarding import Answer
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Catalogue
from embedmesh.rules.served import ParseTerms

ADAPTED_FRAME_BYTES_MAX = 1_024  # of a reply, beside texts and vectors
ADAPTED_ROW_BYTES_MAX = 16  # beside its components
ADAPTED_FLOAT_BYTES_MAX = 15 + 4  # of a component as it is printed, and of what it is printed of
ESCAPED_BYTES_MAX = 6  # of a character, escaped
PATH = re.compile(r" - at `\$\.?(.*)`$")
FIELD = re.compile(r"field `([^`]*)`")
SHOWN = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a member's name: can be shown

OUR_ADVICE = re.compile(', or (?:send "truncate"|ask for "encoding_format").*')  # other APIs write it in other ways
OWN_WORDS = "own_words"  # of a failure: it names members of the form already, and some may be called as ours are
AnyFailure = TypeVar("AnyFailure", bound=Failure)

Write = Callable[[Any, Matrix, Answer], Any]
"""The reply as orjson takes it, arrays included: of the request's form, the vectors (n, width), the answer."""


class AdaptedCall(Call, frozen=True):
    """A call, and the request that it comes from."""

    asked: Any = None


@dataclass(frozen=True)
class Adapted:
    """One request of another API. Implements `embedmesh.flow.embed.Dialect`.

    `ours` makes members of OpenAI's request of the form, `names` are theirs by ours, where they differ. `cuts`: a text
    that is too long is cut at its end, unless the request says otherwise. `name_of` is what a model is called here.
    `echoes` says whether the reply repeats the texts, and `bytes_of` how many bytes a component takes in it at most.
    """

    form: type[msgspec.Struct]
    ours: Callable[[Any], dict[str, Any]]
    write: Write
    own_envelope: Callable[[Failure], bytes]
    names: Mapping[str, str] = field(default_factory=dict)
    cuts: bool = False
    name_of: Callable[[str, Catalogue], str] = lambda name, catalogue: name
    echoes: bool = False
    bytes_of: Callable[[Any], int] = lambda asked: ADAPTED_FLOAT_BYTES_MAX

    def parse(self, body: bytes, catalogue: Catalogue, terms: ParseTerms, *, named: str | None) -> tuple[Call, Model]:
        """See Dialect. Raises a CallerFailure that names a member of the form."""
        check_values(body)
        asked = converted(loaded_of(body, self.form.__struct_fields__), self.form)
        given = {name: value for name, value in self.ours(asked).items() if value is not None}
        if "model" in given:
            given["model"] = self.name_of(given["model"], catalogue)
        elif named is None:
            named = sole(catalogue)
        if self.cuts and "truncate" not in given and not _foreign(given.get("model", named), catalogue):
            given["truncate"] = "end"
        try:
            call, model = validate(given, catalogue, terms, named)
        except CallerFailure as failure:
            raise renamed(failure, self.names) from None
        members = {name: getattr(call, name) for name in Call.__struct_fields__}
        return AdaptedCall(**members, asked=asked), model

    def envelope(self, failure: Failure) -> bytes:
        """How failures are told, also those that come once the request is parsed."""
        return self.own_envelope(renamed(failure, self.names))

    def parse_ordinary(self, body: bytes, catalogue: Catalogue) -> None:
        """None: the straight path has OpenAI's requests only."""

    def reply_bytes_max(self, call: Call, width: int) -> int:
        """See Dialect."""
        inputs = len(call.texts) or len(call.ids)
        row = ADAPTED_ROW_BYTES_MAX + (call.dimensions or width) * self.bytes_of(call.asked) + width * 4  # type: ignore[attr-defined]
        echoed = ESCAPED_BYTES_MAX * sum(map(len, call.texts)) if self.echoes else 0
        return ADAPTED_FRAME_BYTES_MAX + inputs * row + echoed

    def render(self, call: Call, truncated: int, answer: Answer, headers: dict[str, str]) -> Reply:
        """See Dialect."""
        data, width = finished(call, answer)
        matrix = np.frombuffer(data, dtype="<f4").reshape(-1, width)
        told = self.write(call.asked, matrix, answer)  # type: ignore[attr-defined]
        headers[TRUNCATED_HEADER] = f"{truncated}"
        return Reply(headers, orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY))


def loaded_of(body: bytes, names: Collection[str]) -> dict[str, Any]:
    """The members of a body that are not null; `names` are those of the form. Raises a CallerFailure."""
    try:
        loaded = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise broken_json(body, error, names) from None
    if not isinstance(loaded, dict):
        raise InvalidType("The body must be a JSON object.")
    return {name: value for name, value in loaded.items() if value is not None}  # null means: not given


def converted(given: dict[str, Any], form: type[msgspec.Struct]) -> Any:
    """The members of a body as a request of a form. Raises a CallerFailure that names a member."""
    try:
        return msgspec.convert(given, form)
    except msgspec.ValidationError as error:
        check_depth(given)
        failure = in_words(str(error))
        vars(failure)[OWN_WORDS] = True
        raise failure from None


def sole(
    catalogue: Catalogue,
    does: Callable[[Model], bool] = lambda model: model.embeds,
    advice: str = "name one in the path, as in /tei/MODEL/embed",
) -> str | None:
    """The model of a request that names none: the only one of the catalogue that does it. Raises MissingParameter.

    Nodes come and go; so it is not the only one that has a node now.
    """
    names = (model.id.removesuffix(f":{model.tier}") for model in catalogue.models if does(model))
    found = list(dict.fromkeys(names))  # its tiers have one
    if len(found) > 1:
        raise MissingParameter(f"There are several models here: {advice}.")
    return found[0] if found else None


def _foreign(name: str | None, catalogue: Catalogue) -> bool:
    """Whether nobody here can cut texts for a model."""
    model = catalogue.find(name) if name else None
    return model is not None and model.foreign


def in_words(error: str) -> CallerFailure:
    """What msgspec says of a request that is not of its form, without any of its values."""
    path = PATH.search(error)
    where = path.group(1).replace("[", ".").replace("]", "") if path else ""
    where = where if SHOWN.fullmatch(where) else ""
    named = FIELD.search(error)
    name = named.group(1) if named and SHOWN.fullmatch(named.group(1)) else ""
    param = ".".join(filter(None, (where, name))) or None
    if "missing required" in error:
        return MissingParameter(f"You must give the parameter `{param}`.", param=param)
    if "unknown field" in error:
        return UnknownParameter(f"Unknown parameter: `{param}`." if param else "Unknown parameter.", param=param)
    said = f"`{param}`" if param else "The body"
    expected = error.split(" - at ")[0].partition(", got")[0].removeprefix("Expected ")
    if error.startswith("Expected") and not re.search(r"length|>=|<=", error):
        return InvalidType(f"{said} must be of the type {expected.replace('`', '')}.", param=param)
    if error.startswith("Expected"):
        return InvalidValue(f"{said} must be {expected.replace('`', '')}.", param=param)
    return InvalidValue(f"{said} has a value that is not taken; /openapi.json lists those that are.", param=param)


def renamed(failure: AnyFailure, names: Mapping[str, str]) -> AnyFailure:
    """The failure in the words of another API: its members instead of ours. Harmless twice."""
    if OWN_WORDS in vars(failure):
        return failure
    failure.message = OUR_ADVICE.sub(".", failure.message)
    for ours, theirs in names.items():
        mentions = re.compile(rf"(?<=`){re.escape(ours)}(?=[`.])")
        failure.message = mentions.sub(theirs, failure.message)
        if failure.param is not None:
            failure.param = re.sub(rf"^{re.escape(ours)}(?=\.|$)", theirs, failure.param)
    return failure
