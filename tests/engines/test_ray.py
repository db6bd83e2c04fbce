"""Ray: `map_batches` with our Embedder, and nodes on a cluster's workers."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from embedmesh.client import CallRefused, InputRefused
from tests.client.gateway import ALIAS, KEY, WIDTH, Answer, Received, ScriptedGateway, envelope, vector_of
from tests.engines.conftest import needs
from tests.engines.test_daft import refuse_bad

pytestmark = [needs("ray"), pytest.mark.filterwarnings("ignore")]
TEXTS = [f"text {number} ünïcödé" for number in range(500)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two CPUs on this machine."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def embedded(gateway: ScriptedGateway, texts: Sequence[str | None], **options: Any) -> list[dict[str, Any]]:
    """All rows, by their ids."""
    import ray

    from embedmesh.ray import Embedder

    rows = [{"id": at, "text": text} for at, text in enumerate(texts)]
    given = {"model": ALIAS, "base_url": gateway.base_url, "api_key": KEY, **options}
    data = ray.data.from_items(rows).map_batches(
        Embedder, fn_constructor_kwargs=given, batch_size=64, concurrency=1, num_cpus=0.1
    )
    found = sorted(data.take_all(), key=lambda row: row["id"])
    assert [row["id"] for row in found] == list(range(len(texts)))
    return found


def right(text: str) -> Any:
    return np.frombuffer(vector_of(text, WIDTH), "<f4")


def test_every_row_has_its_vector_and_is_paid_once(gateway: ScriptedGateway) -> None:
    found = embedded(gateway, TEXTS)
    assert np.array_equal(np.stack([row["embedding"] for row in found]), np.stack([right(text) for text in TEXTS]))
    assert sorted(text for one in gateway.received for text in one.body["input"]) == sorted(TEXTS)


def test_what_is_refused_ends_the_job_or_is_told_in_a_column(gateway: ScriptedGateway) -> None:
    gateway.script = refuse_bad
    texts: list[str | None] = ["a", "bad", "b", None]
    found = embedded(gateway, texts, errors="problem", output="vector")
    assert [row["problem"] for row in found] == [None, "too bad (invalid_value)", None, None]
    assert [bool(np.isnan(row["vector"]).all()) for row in found] == [False, True, False, True]
    with pytest.raises(Exception, match="too bad") as raised:
        embedded(gateway, texts)
    assert InputRefused.__name__ in str(raised.getrepr(style="short")) + repr(raised.value.__cause__)


def test_a_busy_endpoint_is_waited_for(gateway: ScriptedGateway) -> None:
    """What is refused for load is sent again after the time that the server says; no row is lost."""
    answers = iter([429, 503, 429])

    def busy(received: Received) -> Answer | None:
        status = next(answers, None)
        return None if status is None else (status, envelope("rate_limit"), {"Retry-After": "0.05"})

    gateway.script = busy
    assert len(embedded(gateway, TEXTS)) == len(TEXTS)


def test_a_key_that_is_refused_ends_the_job(gateway: ScriptedGateway) -> None:
    gateway.script = lambda received: (401, envelope("invalid_api_key", "no such key"))
    with pytest.raises(Exception, match="no such key") as raised:
        embedded(gateway, ["a", "b"])
    assert CallRefused.__name__ in str(raised.getrepr(style="short"))
