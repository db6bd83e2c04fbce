"""What a model has prices for: each meter of its tokens, each size of its images, its searches."""

from embedmesh.rules.holds import Meter
from embedmesh.rules.models import Model

IMAGES_OF = "images:"  # and a size: one image of it
SEARCHES = Meter.SEARCHES.value


def images_of(size: str) -> str:
    """The name of the price of an image of that size, as `1024x1024`."""
    return IMAGES_OF + size


def size_of(meter: str) -> str | None:
    """The size whose price it is; None if it is a price of something else."""
    return meter.removeprefix(IMAGES_OF) if meter.startswith(IMAGES_OF) else None


def price_meters(model: Model) -> tuple[str, ...]:
    """What a price can be set for: that of input, unless the catalogue says that searches are paid."""
    if model.search_price is not None:
        return (SEARCHES,)
    if model.encodes:
        return (Meter.INPUT.value,)
    tokens = Meter.INPUT, Meter.CACHED, Meter.OUTPUT
    return (*(meter.value for meter in tokens), *map(images_of, model.image_prices))


def piece_of(meter: str) -> str | None:
    """What a price is for one of, if not for a million tokens."""
    return "search" if meter == SEARCHES else "image" if size_of(meter) is not None else None


def unit_of(meter: str) -> str:
    """What a price is the price of, in words."""
    if (size := size_of(meter)) is not None:
        return f"an image of {size}"
    if meter == SEARCHES:
        return "a search"
    return f"a million {'' if meter == Meter.INPUT.value else f'{meter} '}tokens"
