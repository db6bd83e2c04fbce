"""Names of models as people write them, and the full ids that keys and prices of the store have."""

from collections.abc import Iterable
from pathlib import Path

from embedmesh.catalogue import load_catalogue
from embedmesh.commands.telling import WrongUsage, did_you_mean
from embedmesh.provision.assets import assets_dir


def model_ids(names: Iterable[str], catalogue: Path | None) -> tuple[str, ...]:
    """The ids of models of the catalogue, each once. Raises WrongUsage for one that is not there, and SetupError."""
    known = load_catalogue(catalogue, assets=assets_dir())
    found: dict[str, None] = {}
    for name in names:
        model = known.find(name)
        if model is None:
            raise WrongUsage(
                f"There is no model {name} in the catalogue.{did_you_mean(name, known.names)} `embedmesh models list` "
                "shows its models; name the catalogue that your gateways serve by --catalogue."
            )
        found[model.id] = None
    return tuple(found)


def model_id(name: str, catalogue: Path | None) -> str:
    """The id of the model that is called so, or the name itself: a price may outlive its model. Raises SetupError."""
    model = load_catalogue(catalogue, assets=assets_dir()).find(name)
    return name if model is None else model.id
