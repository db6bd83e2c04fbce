"""Which models are served, for those who parse requests: a gateway's terms, and the failure for an unknown name."""

import itertools
from collections.abc import Callable, Collection
from typing import NamedTuple

from embedmesh.rules.errors import ModelNotFound
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Catalogue

NAMED_MODELS_MAX = 10  # in the error; GET /v1/models has all
ALIAS_LINE = 'aliases = ["the name you asked for"]'  # the name itself is not repeated: it may be a text, or a key


class ParseTerms(NamedTuple):
    """What a request is held to, apart from the catalogue."""

    serves: Callable[[Model], bool] = lambda model: True  # whether to name the model to a caller who names none of ours
    normal: Collection[str] = ()  # ids of models whose vectors have unit length by themselves
    ignore_unknown: bool = False  # fields that we do not know and that cannot change vectors


ORDINARY = ParseTerms()


def no_such_model(name: str, catalogue: Catalogue, serves: Callable[[Model], bool]) -> ModelNotFound:
    """The failure names the models that are served, and says how to give one of them the name that was asked for."""
    served = list(itertools.islice((model.id for model in catalogue.models if serves(model)), NAMED_MODELS_MAX))
    if (known := catalogue.find(name)) is not None:
        message = f"No node here serves {known.id}."
    else:
        message = "There is no model of that name here."
    message += f" Served are: {', '.join(served)}. GET /v1/models lists all." if served else " No model is served now."
    if known is None and served:
        message += f" To call {served[0]} by that name, too, the operator adds {ALIAS_LINE} to its catalogue entry."
    return ModelNotFound(message, param="model")
