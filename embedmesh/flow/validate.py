"""What is asked: a JSON body in, a Call and its Model out. Pure; every refusal names the member and says what to do."""

import orjson

from embedmesh.flow.members import MEMBERS
from embedmesh.flow.values import DEPTH_MAX, check_values
from embedmesh.rules.embeddings import Call, Truncate
from embedmesh.rules.errors import (
    InvalidJson,
    InvalidType,
    InvalidValue,
    MissingParameter,
    ModelNotFound,
    UnknownParameter,
)
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Catalogue

SHOWN_NAME_CHARS_MAX = 64  # of an unknown member, in the error


def validate(body: bytes, catalogue: Catalogue) -> tuple[Call, Model]:
    """The call and the catalogue's model for it. Raises a CallerFailure."""
    check_values(body)
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidJson(f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    try:
        return _validate(asked, catalogue)
    except (InvalidType, UnknownParameter):
        if _deeper_than(asked, DEPTH_MAX):  # no accepted request is: looked at only once it is refused
            raise InvalidJson(f"The JSON is nested deeper than {DEPTH_MAX} levels.") from None
        raise


def _validate(asked: object, catalogue: Catalogue) -> tuple[Call, Model]:
    if not isinstance(asked, dict):
        raise InvalidType("The body must be a JSON object with at least `model` and `input`.")
    given = {name: value for name, value in asked.items() if value is not None}  # null means: not given
    for name in given:
        if name not in MEMBERS:
            shown = name[:SHOWN_NAME_CHARS_MAX]
            raise UnknownParameter(
                f"Unknown parameter: `{shown}`. Known are {', '.join(MEMBERS)}.", param=shown or None
            )
    for name in ("model", "input"):
        if name not in given:
            raise MissingParameter(f"You must give the parameter `{name}`.", param=name)
    checked = {name: MEMBERS[name].check(value) for name, value in given.items()}

    model = catalogue.find(checked["model"])
    if model is None:
        raise ModelNotFound(
            "There is no model of that name here. GET /v1/models lists those that are served now.", param="model"
        )
    dimensions = checked.get("dimensions")
    if dimensions is not None and dimensions > model.width:
        raise InvalidValue(f"`dimensions` must be at most {model.width} for this model.", param="dimensions")
    inputs = checked["input"]
    single = isinstance(inputs, str) or isinstance(inputs[0], int)
    several = [inputs] if single else inputs
    call = Call(
        model=checked["model"],
        texts=several if isinstance(several[0], str) else [],
        ids=several if isinstance(several[0], list) else [],
        single=single,
        encoding=checked.get("encoding_format", "float"),
        dimensions=dimensions,
        user=checked.get("user"),
        role=checked.get("input_type"),
        truncate=_truncate(checked.get("truncate"), checked.get("truncation")),
    )
    return call, model


def _truncate(truncate: Truncate | None, truncation: Truncate | None) -> Truncate:
    if truncate is not None and truncation is not None and truncate != truncation:
        raise InvalidValue("`truncate` and `truncation` contradict each other: send one of them.", param="truncation")
    return truncate or truncation or "none"


def _deeper_than(value: object, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        children: list[object] = []
        for container in layer:
            if isinstance(container, dict):
                children += container.values()
            elif isinstance(container, list):
                children += container
        layer = [child for child in children if isinstance(child, dict | list)]
        if not layer:
            return False
    return True
