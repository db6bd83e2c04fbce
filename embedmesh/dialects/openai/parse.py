"""Parses an embeddings request: a JSON body in, a Call and its Model out. Pure; every refusal names the field."""

import re
from collections.abc import Iterable
from typing import Any

import orjson

from embedmesh.dialects.openai.broken import broken_json
from embedmesh.dialects.openai.fields import FIELDS
from embedmesh.dialects.openai.modalities import unsupported_modality
from embedmesh.dialects.openai.spellings import COULD_CHANGE
from embedmesh.dialects.openai.values import check_depth, check_values
from embedmesh.rules.embeddings import Call, Dtype, Encoding, Truncate
from embedmesh.rules.errors import (
    InvalidType,
    InvalidValue,
    MissingParameter,
    UnknownParameter,
)
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Catalogue
from embedmesh.rules.served import ORDINARY, ParseTerms, no_such_model

SHOWN_NAME_CHARS_MAX = 64  # of an unknown field's name, in the error
IGNORED_MAX = 16  # ignored fields that are named in a header; our own list has nine
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a field: can be shown in a header


def parse(
    body: bytes, catalogue: Catalogue, terms: ParseTerms = ORDINARY, *, named: str | None = None
) -> tuple[Call, Model]:
    """The call and the catalogue's model for it; `named` is the model that the path names. Raises a CallerFailure."""
    check_values(body)
    try:
        loaded = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise broken_json(body, error, FIELDS) from None
    try:
        return validate(loaded, catalogue, terms, named)
    except (InvalidType, UnknownParameter):
        check_depth(loaded)  # no accepted request is deep: looked at only once it is refused
        raise


def validate(loaded: object, catalogue: Catalogue, terms: ParseTerms, named: str | None) -> tuple[Call, Model]:
    """The call and its model, of a body that was read. Raises a CallerFailure."""
    if not isinstance(loaded, dict):
        raise InvalidType("The body must be a JSON object with at least `model` and `input`.")
    given = {name: value for name, value in loaded.items() if value is not None}  # null means: not given
    if named is not None:
        given.setdefault("model", named)
    says, ignored = _read(given, terms)
    if ignored:
        check_depth({name: given[name] for name in ignored})  # nothing else looks into them
    for name in ("model", "input"):
        if name not in given:
            raise MissingParameter(f"You must give the parameter `{name}`.", param=name)

    model = _model(says["model"], catalogue, terms)
    if named is not None and (other := _model(named, catalogue, terms)).id != model.id:
        raise InvalidValue(
            f"`model` means {model.id}, and the path means {other.id}. Name one of them, or the same twice.",
            param="model",
        )
    dimensions = says.get("dimensions")
    if dimensions is not None and dimensions > model.width:
        name = "dimensions" if "dimensions" in given else "output_dimension"
        raise InvalidValue(f"`{name}` must be at most {model.width} for this model.", param=name)
    inputs = says["input"]
    single = isinstance(inputs, str) or isinstance(inputs[0], int)
    several = [inputs] if single else inputs
    keep, truncate = _cut(given, says, model)
    encoding, dtype = _printed(given, says)
    call = Call(
        model=says["model"],
        texts=several if isinstance(several[0], str) else [],
        ids=several if isinstance(several[0], list) else [],
        single=single,
        encoding=encoding,
        dtype=dtype,
        dimensions=dimensions,
        user=says.get("user"),
        role=_role(given, says, model),
        truncate=truncate,
        keep=keep,
        normalize=_normalize(says, model, terms) or dtype != "float",  # the formulas are for unit length
        ignored=tuple(ignored[:IGNORED_MAX]) if ignored else (),
    )
    return call, model


def _read(given: dict[str, Any], terms: ParseTerms) -> tuple[dict[str, Any], list[str]]:
    """The meanings of the fields, and the names of those without one."""
    if not given.keys() <= FIELDS.keys():
        _check_unknown((name for name in given if name not in FIELDS), terms)
    says: dict[str, Any] = {}
    ignored = []
    for name, value in given.items():
        field = FIELDS.get(name)
        checked = field.check(value) if field is not None else None
        if field is None or field.says is None:
            ignored.append(name)
        elif (before := says.setdefault(field.says, checked)) is not checked and before != checked:
            raise _contradiction(given, name, field.says)
    return says, ignored


def _check_unknown(names: Iterable[str], terms: ParseTerms) -> None:
    for name in names:
        if not (terms.ignore_unknown and PLAIN_NAME.fullmatch(name) and not COULD_CHANGE.search(name)):
            shown = name[:SHOWN_NAME_CHARS_MAX]
            raise UnknownParameter(f"Unknown parameter: `{shown}`. Known are {', '.join(FIELDS)}.", param=shown or None)


def _contradiction(given: Iterable[str], name: str, *subjects: str) -> InvalidValue:
    """The failure for fields that contradict each other about these; `name` is the one at fault."""
    several = " and ".join(f"`{field}`" for field in given if field in FIELDS and FIELDS[field].says in subjects)
    return InvalidValue(f"{several} contradict each other: send one of them.", param=name)


def _model(name: str, catalogue: Catalogue, terms: ParseTerms) -> Model:
    model = catalogue.find(name)
    if model is None:
        raise no_such_model(name, catalogue, terms.serves)
    if not model.embeds:
        raise unsupported_modality(model)
    return model


def _role(given: dict[str, Any], says: dict[str, Any], model: Model) -> Any:
    prompt = says.get("prompt")
    if prompt is None:
        return says.get("role")
    if prompt not in model.prompts:
        there = f"only {' and '.join(model.prompts)}" if model.prompts else "none"
        raise InvalidValue(f"`prompt_name` is no prompt of this model: it has {there}.", param="prompt_name")
    if says.setdefault("role", prompt) != prompt:
        raise _contradiction(given, "prompt_name", "prompt", "role")
    return prompt


def _cut(given: dict[str, Any], says: dict[str, Any], model: Model) -> tuple[int | None, Truncate]:
    """How many tokens of an input are kept, where it is not the model's own bound, and what is cut."""
    keep, truncate = says.get("keep"), says.get("truncate")
    if keep is None:
        return None, truncate or "none"
    name = "truncate_prompt_tokens"
    if truncate == "none" or (keep == -1 and truncate == "start"):
        raise _contradiction(given, name, "keep", "truncate")
    if keep > model.max_tokens:
        raise InvalidValue(f"`{name}` must be at most {model.max_tokens} for this model.", param=name)
    return (keep if keep > 0 else None), truncate or "end"


def _printed(given: dict[str, Any], says: dict[str, Any]) -> tuple[Encoding, Dtype]:
    """How a vector is written, and of what its components are."""
    encoding, kind = says.get("encoding_format"), says.get("embedding_type")
    if kind == "base64":
        if encoding == "float" or says.get("dtype", "float") != "float":
            raise _contradiction(given, "embedding_type", "encoding_format", "dtype", "embedding_type")
        return "base64", "float"
    if kind is not None and says.setdefault("dtype", kind) != kind:
        raise _contradiction(given, "embedding_type", "dtype", "embedding_type")
    return encoding or "float", says.get("dtype", "float")


def _normalize(says: dict[str, Any], model: Model, terms: ParseTerms) -> bool:
    wanted = says.get("normalize")
    if wanted is False and (model.foreign or model.id in terms.normal or says.get("dimensions") is not None):
        raise InvalidValue("This model's vectors come in unit length only: leave `normalize` out.", param="normalize")
    return bool(wanted)
