"""Models of one node: what befalls one befalls no other."""

import asyncio
from typing import Any

import msgspec
import pytest

from embedmesh.engine.loaded import LoadedModels
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from tests.flow.world import MODEL


class Scripted:
    """Serves a model whose name says what its start ends with. A slow one starts once `slow` is set."""

    slow: asyncio.Event

    def __init__(self, model: Model) -> None:
        if model.id == "no tokenizer":
            raise SetupError("no tokenizer")
        self.model = model
        self.up = False

    async def start(self) -> None:
        await asyncio.sleep(0)
        if self.model.id == "slow":
            await self.slow.wait()
        if self.model.id == "no memory":
            raise SetupError("no memory")
        if self.model.id == "a bug":
            raise LookupError("a bug")
        self.up = True

    async def loaded(self) -> None: ...

    async def keep(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None: ...

    async def idle(self) -> None: ...


def models_of(*names: str) -> tuple[Any, list[Model]]:
    make: Any = Scripted
    Scripted.slow = asyncio.Event()
    return LoadedModels(make), [msgspec.structs.replace(MODEL, id=name) for name in names]


@pytest.mark.parametrize("bad", ["no memory", "no tokenizer"])
async def test_a_model_that_cannot_start_does_not_end_the_others(bad: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is said, and its engine is tried again where there is one."""
    loaded, models = models_of("one", bad, "two")
    await loaded.load_all(models)
    assert loaded.find("one") and loaded.find("two") and loaded.some.is_set()
    assert (loaded.find(bad) is not None) is (bad == "no memory")
    assert [record.message for record in caplog.records] == [f"a model is not served: {bad}"]
    await loaded.load(models[0])
    with pytest.raises(SetupError):  # to ask for it again says that it does not start
        await loaded.load(models[1])
    await loaded.stop()


async def test_models_that_start_together_are_told_of_together() -> None:
    """A gateway that looks meanwhile finds none of them, and not one of two."""
    loaded, models = models_of("one", "slow")
    starting = asyncio.ensure_future(loaded.load_all(models))
    while not loaded._first.is_set():
        await asyncio.sleep(0)
    assert (loaded.up(), loaded.some.is_set()) == ([], False)
    Scripted.slow.set()
    await starting
    assert [each.model.id for each in loaded.up()] == ["one", "slow"]
    assert loaded.some.is_set()
    await loaded.stop()


async def test_one_that_takes_long_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedmesh.engine.loaded.TOGETHER_S", 0.0)
    loaded, models = models_of("one", "slow")
    starting = asyncio.ensure_future(loaded.load_all(models))
    await loaded.some.wait()
    assert [each.model.id for each in loaded.up()] == ["one"]
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await loaded.stop()


async def test_where_none_can_start_the_node_cannot() -> None:
    loaded, models = models_of("no memory", "no tokenizer")
    with pytest.raises(SetupError, match="no memory"):
        await loaded.load_all(models)
    assert not loaded.some.is_set()
    await loaded.stop()


async def test_a_bug_is_no_model_s_own_affair() -> None:
    loaded, models = models_of("one", "a bug")
    with pytest.raises(LookupError):
        await loaded.load_all(models)
    await loaded.stop()


async def test_one_that_is_asked_for_while_the_node_runs_is_not_kept_where_it_does_not_start() -> None:
    """Whoever asked is told; to ask again is theirs."""
    loaded, models = models_of("no memory")
    with pytest.raises(SetupError):
        await loaded.load(models[0])
    assert loaded.find("no memory") is None
