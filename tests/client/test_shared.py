"""One bulk client for many callers, as workers of engines have it; and what an endpoint says of its models."""

import asyncio
import gc
import pickle
import threading
import time

import numpy as np
import pytest

from embedmesh.client import CallNotAnswered, CallRefused, InputRefused, NotTrusted, WrongCall
from embedmesh.client.access import find_access
from embedmesh.client.bulk.shared import SharedClient
from embedmesh.client.models import served_width
from embedmesh.client.refusals import Problem
from tests.client.gateway import ALIAS, KEY, Answer, Received, ScriptedGateway, envelope, free_port
from tests.client.test_embed import TEXTS, expected


def client_of(gateway: ScriptedGateway, **options: object) -> SharedClient:
    return SharedClient(model=ALIAS, base_url=gateway.base_url, api_key=KEY, **options)  # type: ignore[arg-type]


def test_batches_of_threads_and_loops_share_a_window(gateway: ScriptedGateway) -> None:
    """Each gets its own vectors; together they have no more in flight, and no more connections, than one may."""
    at_once, most = 0, 0
    lock = threading.Lock()

    def script(received: Received) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.005)
        with lock:
            at_once -= 1

    gateway.script = script
    client = client_of(gateway, concurrency=3, batch_size=8)
    cuts = [TEXTS[at : at + 40] for at in range(0, len(TEXTS), 40)]

    async def in_a_loop() -> list[object]:
        return list(await asyncio.gather(*(asyncio.wrap_future(client.embed(cut)) for cut in cuts)))

    waiting = [client.embed(cut) for cut in cuts]
    for found in ([future.result(30) for future in waiting], asyncio.run(in_a_loop())):
        vectors = np.concatenate([one.vectors for one in found])  # type: ignore[attr-defined]
        assert np.array_equal(vectors, expected(TEXTS))
    assert 1 < most <= 3 and gateway.connections <= 3


def test_nulls_and_refused_texts_have_rows_of_their_own(gateway: ScriptedGateway) -> None:
    def script(received: Received) -> Answer | None:
        given = received.body["input"]
        return (400, envelope("bad", "too bad", f"input.{given.index('bad')}")) if "bad" in given else None

    gateway.script = script
    client = client_of(gateway)
    done = client.embed(["a", None, "bad", "b"]).result(30)
    assert np.array_equal(done.vectors[[0, 3]], expected(["a", "b"])) and np.isnan(done.vectors[[1, 2]]).all()
    assert {at: problem.message for at, problem in done.refused.items()} == {2: "too bad"} and done.tokens == 6
    gateway.width = 4
    assert client.embed([None, "bad"]).result(30).vectors.shape == (2, 4)
    assert client.embed([]).result(30).vectors.shape == (0, 4)


def test_a_client_that_nobody_has_ends_its_thread(gateway: ScriptedGateway) -> None:
    before = set(threading.enumerate())
    client = client_of(gateway)
    client.embed(["a"]).result(30)
    (ours,) = (each for each in set(threading.enumerate()) - before if each.name == "embedmesh-client")
    del client
    gc.collect()
    ours.join(30)
    assert not ours.is_alive()


def test_options_that_only_one_run_can_have_are_refused(gateway: ScriptedGateway) -> None:
    with pytest.raises(WrongCall, match="on_refused is no option"):
        client_of(gateway, on_refused=print)


def test_the_width_is_asked_for_and_nothing_is_paid(gateway: ScriptedGateway) -> None:
    access = find_access(gateway.base_url, KEY, None)
    gateway.width = 384
    assert served_width(access, "org/model:fast") == 384 and gateway.asked == ["/v1/models/org%2Fmodel%3Afast"]
    gateway.width = 0
    with pytest.raises(WrongCall, match="Give dimensions"):
        served_width(access, ALIAS)
    gateway.width = None
    with pytest.raises(CallRefused, match="not_found"):
        served_width(access, ALIAS)
    with pytest.raises(CallNotAnswered):
        served_width(find_access(f"http://127.0.0.1:{free_port()}/v1", KEY, None), ALIAS)


@pytest.mark.parametrize(
    "error",
    [
        CallRefused(Problem(401, "invalid_api_key", "no", None), request_id="req_1"),
        InputRefused(7, Problem(400, "bad", "no", "input.7")),
        NotTrusted("not_pinned", "no"),
        CallNotAnswered("away"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_whole_from_a_worker_process(error: Exception) -> None:
    """Engines carry what a worker raises to the driver by pickle."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and again.args == error.args and vars(again) == vars(error)
