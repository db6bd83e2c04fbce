"""Rerank requests and replies: each API's form, what its members mean, and how it replies.

Members of a form become those of a `RerankCall`, which is checked here for all of them, so that a form decides nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson
from msgspec import Meta

from embedmesh.dialects.adapted import ESCAPED_BYTES_MAX, converted, loaded_of, renamed, sole
from embedmesh.dialects.openai.modalities import unsupported_modality
from embedmesh.dialects.openai.render import IGNORED_HEADER, TRUNCATED_HEADER
from embedmesh.dialects.openai.values import FIELDS_VALUES_MAX, ValueBounds, check_values
from embedmesh.rules.errors import CallerFailure, Failure, InvalidValue, MissingParameter, TooManyInputs
from embedmesh.rules.exchange import Reply
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, RERANK_DOCUMENTS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Catalogue
from embedmesh.rules.reranking import TOO_MANY_DOCUMENTS, Ranked, RerankCall, RerankCounts, RerankTruncate
from embedmesh.rules.served import ParseTerms, no_such_model

RERANK_FRAME_BYTES_MAX = 1_024  # of a reply, beside results and the model's name
RANKED_BYTES_MAX = 128  # `{"index":2047,"relevance_score":-1.1754944e-38,"document":{"text":""}},`, and the score
RERANK_VALUES_MAX = 2 * RERANK_DOCUMENTS_MAX + FIELDS_VALUES_MAX  # of strings: each document as an object has two
RERANK_BOUNDS = ValueBounds(
    RERANK_VALUES_MAX,
    RERANK_VALUES_MAX,
    RERANK_VALUES_MAX,
    TooManyInputs,
    TOO_MANY_DOCUMENTS,
    TooManyInputs,
    TOO_MANY_DOCUMENTS,
    "documents",
)

# For the schema: `embedmesh.flow.rerank` refuses, with the same words for all forms.
SOME_QUERY = Meta(extra_json_schema={"minLength": 1})
SOME_DOCUMENTS = Meta(extra_json_schema={"minItems": 1, "maxItems": RERANK_DOCUMENTS_MAX})

WriteRanked = Callable[[RerankCall, Sequence[Ranked], RerankCounts], Any]
"""The reply as orjson takes it."""


@dataclass(frozen=True)
class RerankForm:
    """One API's rerank requests and replies. Implements `embedmesh.flow.rerank.RerankDialect`.

    `meanings` makes members of a RerankCall of the form; `names` are the form's own names of them, where they differ.
    `echoes` says whether the reply repeats the documents.
    """

    form: type[msgspec.Struct]
    meanings: Callable[[Any], dict[str, Any]]
    write: WriteRanked
    own_envelope: Callable[[Failure], bytes]
    names: Mapping[str, str] = field(default_factory=dict)
    echoes: Callable[[Any], bool] = lambda asked: False

    def parse(
        self, body: bytes, catalogue: Catalogue, terms: ParseTerms, *, named: str | None
    ) -> tuple[RerankCall, Model]:
        """See RerankDialect. Raises a CallerFailure that names a member of the form."""
        return self.read(self.load(body), catalogue, terms, named)

    def load(self, body: bytes) -> dict[str, Any]:
        """The members of a body that are not null. Raises a CallerFailure."""
        try:
            check_values(body, RERANK_BOUNDS)
        except CallerFailure as failure:
            raise renamed(failure, self.names) from None
        return loaded_of(body, self.form.__struct_fields__)

    def read(
        self, given: dict[str, Any], catalogue: Catalogue, terms: ParseTerms, named: str | None
    ) -> tuple[RerankCall, Model]:
        """The call and its model. Raises a CallerFailure that names a member of the form."""
        asked = converted(given, self.form)
        said = self.meanings(asked)
        name, model = _model(said.pop("model", None) or named, catalogue, terms)
        truncate: RerankTruncate = said.pop("truncate", None) or ("none" if model.foreign else "end")
        return RerankCall(model=name, truncate=truncate, asked=asked, **said), model

    def envelope(self, failure: Failure) -> bytes:
        """How failures are told, also those that come once the request is parsed."""
        return self.own_envelope(renamed(failure, self.names))

    def reply_bytes_max(self, call: RerankCall) -> int:
        """See RerankDialect. A text takes no more bytes in the reply than it did in the body."""
        told = min(call.top_n or len(call.documents), len(call.documents))
        echoed = 0
        if self.echoes(call.asked):
            longest = sorted(map(len, call.documents), reverse=True)[:told]
            echoed = min(ESCAPED_BYTES_MAX * sum(longest), REQUEST_BODY_BYTES_MAX)
        return RERANK_FRAME_BYTES_MAX + ESCAPED_BYTES_MAX * len(call.model) + told * RANKED_BYTES_MAX + echoed

    def render(
        self, call: RerankCall, ranked: Sequence[Ranked], counts: RerankCounts, headers: dict[str, str]
    ) -> Reply:
        """See RerankDialect."""
        told = self.write(call, ranked, counts)
        headers[TRUNCATED_HEADER] = f"{counts.truncated}"
        if call.ignored:
            headers[IGNORED_HEADER] = ",".join(call.ignored)
        return Reply(headers, orjson.dumps(told))


class RerankPath:
    """One request at a path that two forms share: `first` has it where it has the member `by`, else `other`.

    It is made for each request: how its failures are told follows from its body. Implements
    `embedmesh.flow.rerank.RerankDialect`.
    """

    def __init__(self, by: str, first: RerankForm, other: RerankForm) -> None:
        self._by, self._first, self._other, self._form = by, first, other, other

    def parse(
        self, body: bytes, catalogue: Catalogue, terms: ParseTerms, *, named: str | None
    ) -> tuple[RerankCall, Model]:
        """See RerankDialect. Raises a CallerFailure that names a member of the form that was found."""
        if f'"{self._by}"'.encode() in body:  # a guess, for how it is told that a body cannot be read
            self._form = self._first
        given = self._form.load(body)
        self._form = self._first if self._by in given else self._other
        return self._form.read(given, catalogue, terms, named)

    def envelope(self, failure: Failure) -> bytes:
        return self._form.envelope(failure)

    def reply_bytes_max(self, call: RerankCall) -> int:
        return self._form.reply_bytes_max(call)

    def render(
        self, call: RerankCall, ranked: Sequence[Ranked], counts: RerankCounts, headers: dict[str, str]
    ) -> Reply:
        return self._form.render(call, ranked, counts, headers)


def agreed(given: Mapping[str, Any]) -> Any:
    """What members that mean the same say, by their names; None where none is given. Raises InvalidValue."""
    there = {name: value for name, value in given.items() if value is not None}
    first, *others = there.values() or [None]
    if any(value != first for value in others):
        several = " and ".join(f"`{name}`" for name in there)
        raise InvalidValue(f"{several} contradict each other: send one of them.", param=[*there][-1])
    return first


def _model(name: str | None, catalogue: Catalogue, terms: ParseTerms) -> tuple[str, Model]:
    """The model that is asked for, and what it was called. Raises a CallerFailure."""
    name = name or sole(catalogue, lambda model: model.reranks, "give `model`, or POST /tei/MODEL/rerank")
    if name is None:
        raise MissingParameter("You must give the parameter `model`.", param="model")
    model = catalogue.find(name)
    if model is None:
        raise no_such_model(name, catalogue, lambda model: model.reranks and terms.serves(model))
    if not model.reranks:
        raise unsupported_modality(model)
    return name, model
