"""What is kept of a server of another make, by what its models do."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.fleet.registry import Registry
from embedmesh.gateway.api.fleet_api import FleetApi, UpstreamModel, UpstreamRequest
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import InvalidValue
from embedmesh.rules.limits import UPSTREAM_GENERATING, UPSTREAM_IN_FLIGHT
from embedmesh.rules.models import Model
from embedmesh.storage.nodes import NodeRecord
from tests.flow.world import MODEL

CHAT = Model(
    id="acme/chat", aliases=("chat",), width=0, max_tokens=10_000_000, price=1, modalities=("chat", "completions")
)
IMAGES = Model(id="acme/images", width=0, max_tokens=77, price=0, modalities=("images",))


def record_of(*models: str, **more: Any) -> NodeRecord:
    roster = cast(Roster, SimpleNamespace(records=lambda: ()))
    clock = SystemClock()
    api = FleetApi(roster, Registry(clock), BodyBudget(1), clock, Catalogue((MODEL, CHAT, IMAGES)))
    named = tuple(UpstreamModel(name.partition("=")[0], name.partition("=")[2]) for name in models)
    return api._upstream(UpstreamRequest("http://10.0.0.8:8000", named, **more))


@pytest.mark.parametrize(
    "models, in_flight",
    [
        (["acme/chat"], UPSTREAM_GENERATING),
        (["acme/images"], UPSTREAM_GENERATING),
        ([MODEL.id], UPSTREAM_IN_FLIGHT),
        ([MODEL.id, "acme/chat"], UPSTREAM_GENERATING),
    ],
)
def test_how_many_requests_it_works_on_at_one_time(models: list[str], in_flight: int) -> None:
    """What the operator says, else by what it does."""
    assert record_of(*models).in_flight_max == in_flight
    assert record_of(*models, in_flight_max=200).in_flight_max == 200


def test_an_offer_of_a_model_that_generates() -> None:
    """It has no width, and its context may be long; an alias is kept as the id."""
    (offer,) = record_of("chat=meta-llama/Llama-4").offers
    assert (offer.id, offer.width, offer.max_tokens) == ("acme/chat", 0, 10_000_000)
    assert offer.name == "meta-llama/Llama-4"


def test_a_model_that_is_not_in_the_catalogue() -> None:
    with pytest.raises(InvalidValue):
        record_of("acme/unknown")
