"""Vectors of a batch of lines, by the client's own requests (`embedmesh.client.bulk`), and a run's end in our words."""

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from embedmesh.bulk.lines import Refusal
from embedmesh.bulk.stops import NothingListens, RequestRefused, Stopped, stopped_by
from embedmesh.client.bulk.packing import Packing, Unit
from embedmesh.client.bulk.posting import Post
from embedmesh.client.bulk.replies import Rows as Vector
from embedmesh.client.bulk.requests import BulkObserver, BulkRequests
from embedmesh.client.bulk.window import Clock, CongestionWindow, Sleep
from embedmesh.client.errors import EmbedmeshError
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.ports import Dice

if TYPE_CHECKING:
    from embedmesh.client.core import Trust

__all__ = ["BulkClient", "BulkObserver", "NothingListens", "RequestFields", "RequestRefused", "Stopped", "Vector"]

IN_FLIGHT_MAX = 4  # two keep one node and the network both busy; four feed a second node, and bound the memory
BULK_REQUEST_S = 600.0  # the longest a gateway lets a request live

RequestFields = dict[str, str | int]


class BulkClient:
    """Embeds batches of texts at one endpoint. `fields` are those of every request beside `input`.

    With `trust` every request is sealed for a node that it names.
    """

    def __init__(
        self,
        post: Post,
        fields: RequestFields,
        *,
        observer: BulkObserver,
        dice: Dice,
        trust: "Trust | None" = None,
        sleep: Sleep = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        packing, window = Packing(REQUEST_INPUTS_MAX), CongestionWindow(IN_FLIGHT_MAX)
        self._requests = BulkRequests(
            post,
            fields,
            packing=packing,
            window=window,
            observer=observer,
            dice=dice,
            trust=trust,
            sleep=sleep,
            clock=clock,
        )

    async def embed(self, texts: list[bytes]) -> list[Vector | Refusal]:
        """A vector or a refusal for each text (a JSON string). Raises Stopped."""
        unit = Unit(0, [msgspec.Raw(text) for text in texts], sum(map(len, texts)))
        try:
            embedded = await self._requests.embed(unit)
        except EmbedmeshError as error:
            raise stopped_by(error) from None
        refused = {at: Refusal(problem.code, problem.message) for at, problem in embedded.refused.items()}
        return [refused.get(at, vector) for at, vector in enumerate(embedded.vectors)]
