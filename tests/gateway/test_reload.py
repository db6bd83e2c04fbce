"""Settings that change while a gateway runs: all of a change or nothing, and never another model under a known name."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.catalogue import Catalogue, parse_catalogue, refuse_new_meanings
from embedmesh.gateway.api.reload_api import Reloaded, ReloadRequests
from embedmesh.gateway.build import build
from embedmesh.gateway.main import Ending, open_store, stop
from embedmesh.gateway.models import load_models
from embedmesh.gateway.parts import Gateway
from embedmesh.gateway.reload import RELOADED, Reloader
from embedmesh.process import EXIT_OK
from embedmesh.rules.acts import Actor
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import InternalError, InvalidValue, Overloaded, SetupError, StoreUnavailable
from embedmesh.rules.shares import Shares
from embedmesh.settings import GatewaySettings
from embedmesh.settings_file import fields_of
from embedmesh.storage.books import Books
from embedmesh.storage.books.acts import ActRow
from embedmesh.storage.books.new_keys import NewKeys
from embedmesh.system import this_user
from tests.data import CHECKOUT

BY = Actor("key_operator", "192.0.2.7", "x-1")
PLAIN = '[[models]]\nid = "m"\nwidth = 8\nmax_tokens = 16\nprice = 5\naliases = ["one"]\n'
CHAT = '[[models]]\nid = "talk"\nmodalities = ["chat"]\nmax_tokens = 100\nprice = 1\n'


class Live:
    """A gateway that is built, and its reloader; nothing listens."""

    def __init__(self, gateway: Gateway, settings: GatewaySettings) -> None:
        self.gateway = gateway
        self.wanted = settings
        self.read: Callable[[], GatewaySettings] = lambda: self.wanted
        self.reloader = Reloader(gateway, settings, lambda: self.read(), None, False)

    async def reload(self, **changes: Any) -> Reloaded:
        self.wanted = msgspec.structs.replace(self.wanted, **changes)
        return await self.reloader.reload()


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    file = tmp_path / "models.toml"
    file.write_text(PLAIN)
    settings = GatewaySettings(data_dir=tmp_path, catalogue=file)
    ending = Ending(settings)
    store = await open_store(settings, SystemClock(), ending)
    assert store is not None
    gateway = build(settings, load_models(file), store, SystemClock())
    yield Live(gateway, settings)
    for each in gateway.background:
        if asyncio.iscoroutine(each):
            each.close()
    await stop(gateway, [], drain_s=0.0)
    assert ending.exit_code == EXIT_OK


def test_every_setting_that_can_change_is_one_and_no_secret_or_path_of_the_store_does() -> None:
    known = fields_of(GatewaySettings)
    assert set(RELOADED) <= set(known)
    assert not {"store", "data_dir", "files_dir", "host", "port", "workers", "nodes"} & set(RELOADED)


async def test_what_can_change_does_at_once_and_what_cannot_is_named(live: Live) -> None:
    world, app = live.gateway.world, live.gateway.app
    reloaded = await live.reload(
        in_flight_max=2,
        reply_bytes_total_max=20 * 2**20,
        cors_origin=("https://a.example",),
        port=9_999,
        policy="cheapest",
    )
    assert set(reloaded.changed) == {"in_flight_max", "reply_bytes_total_max", "cors_origin", "policy"}
    assert reloaded.needs_restart == ["port"]
    assert world.replies.total == 20 * 2**20
    assert app._room.shares.total == 2
    assert app.server._cors is app._fast_path.cors is not None
    again = await live.reload(cors_origin=())
    assert (again.changed, again.needs_restart) == (["cors_origin"], ["port"])
    assert app.server._cors is app._fast_path.cors is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cors_origin": ("nonsense",)}, "Mend --cors-origin"),
    ({"trusted_proxies": ("10.0.0.1/8",)}, "Mend --trusted-proxies"),
    ({"node_networks": ("10.0.0.1/8",)}, "Mend --node-networks"),
    ({"key_defaults": "speed=1"}, "Correct --key-defaults"),
    ({"catalogue": Path("/nowhere/models.toml")}, "cannot be read"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
async def test_where_anything_is_wrong_nothing_changes(changes: dict[str, Any], says: str, live: Live) -> None:
    before = live.reloader.settings
    with pytest.raises(SetupError, match=says):
        await live.reload(in_flight_max=3, files_bytes_max=2**21, **changes)
    assert live.reloader.settings is before
    assert live.gateway.app._room.shares.total == before.in_flight_max
    assert live.gateway.files._bounds.of_account == before.files_bytes_max


async def test_default_limits_of_new_keys_are_those_of_the_last_reload(live: Live) -> None:
    await live.reload(key_defaults="concurrency=3")
    read = await live.gateway.books.operators.ask(lambda books: books.new_keys.read())
    assert isinstance(read, NewKeys) and read.limits.concurrency == 3
    [act] = await live.gateway.books.operators.ask(lambda books: books.acts.list(rows_max=1))
    assert (act.verb, act.actor) == ("key_defaults.change", this_user().name)


async def test_whatever_a_reload_raises_the_gateway_goes_on_and_who_waits_is_told(live: Live) -> None:
    def broken() -> GatewaySettings:
        raise ZeroDivisionError

    before, live.read = live.read, broken
    requests = live.gateway.adjustable.requests
    running = asyncio.create_task(live.reloader.run())
    with pytest.raises(InternalError, match="not read again"):
        await requests.ask(BY)
    live.read = before
    assert (await requests.ask(BY)).changed == []
    assert (requests.applied, requests.refused) == (1, 1)
    running.cancel()
    await asyncio.wait([running])


async def test_the_row_of_a_reload_is_there_before_it_takes_effect(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who asked have a row, in one transaction; where it cannot be written nothing changes, and nobody has one."""
    operators, cors = live.gateway.books.operators, live.gateway.app.use_cors
    rows: list[ActRow] = []

    async def acts() -> list[ActRow]:
        return list(await operators.ask(lambda books: books.acts.list(verb="settings.reload")))

    def use_cors(value: Any) -> None:
        rows.extend(operators._books.acts.list(verb="settings.reload"))  # type: ignore[union-attr]
        cors(value)

    monkeypatch.setattr(live.gateway.app, "use_cors", use_cors)
    other = Actor("key_other", "192.0.2.8", "x-2")
    live.wanted = msgspec.structs.replace(live.wanted, cors_origin=("https://a.example",))
    reloaded = await live.reloader.reload([BY, other])
    assert [(row.actor, row.changes) for row in reversed(rows)] == [
        (each.name, {"changed": "cors_origin"}) for each in (BY, other)
    ]
    assert reloaded.changed == ["cors_origin"]

    def failing(books: Books, *_: object) -> None:
        raise StoreUnavailable("gone")

    monkeypatch.setattr(Books, "tell_settings", failing)
    before = live.reloader.settings
    live.wanted = msgspec.structs.replace(live.wanted, cors_origin=(), in_flight_max=3)
    with pytest.raises(StoreUnavailable):
        await live.reloader.reload([BY])
    assert live.reloader.settings is before and live.gateway.app._room.shares.total == before.in_flight_max
    assert len(await acts()) == 2
    assert set((await live.reloader.reload()).changed) == {"cors_origin", "in_flight_max"}  # by SIGHUP: no act
    assert len(await acts()) == 2


async def test_models_come_and_go_and_what_has_begun_goes_on(live: Live) -> None:
    """Removed models stay known to nodes' probes and to batches that run; callers cannot name them any more."""
    file, models, catalogue = live.wanted.catalogue, live.gateway.adjustable.models, live.gateway.world.catalogue
    assert file is not None
    model = catalogue.find("m")
    file.write_text(PLAIN.replace("price = 5", "price = 7").replace('"one"', '"two"') + CHAT)
    reloaded = await live.reload()
    assert reloaded.changed == ["catalogue"]
    assert (reloaded.models.added, reloaded.models.removed, reloaded.models.changed) == (["talk"], [], ["m"])
    found = catalogue.find("two")
    assert model is not None and found is not None and (model.price, found.price) == (5, 7)
    assert catalogue.find("one") is None and catalogue.find("talk") is not None
    file.write_text(CHAT)
    assert (await live.reload()).models.removed == ["m"]
    assert catalogue.find("m") is None and [each.id for each in catalogue.models] == ["talk"]
    for known in (models.known, live.gateway.fleet.examiner.catalogue):
        assert known.find("m") is not None
    file.write_text(CHAT + PLAIN.replace("width = 8", "width = 9"))  # also not in two steps
    with pytest.raises(SetupError, match="m has another width"):
        await live.reload()
    file.write_text(CHAT + PLAIN.replace('id = "m"', 'id = "other"'))  # `one` was m's
    with pytest.raises(SetupError, match="one has another id"):
        await live.reload()
    assert [each.id for each in catalogue.models] == ["talk"]


def parsed(text: str) -> Catalogue:
    return parse_catalogue(text, name="models.toml", base=Path("/"))


FOLDER = 'folder = "f"\ndigest = "' + "a" * 64 + '"\n'
MEANINGS = [  # the model before and after, and the fields that make it another; none: it may change
    ("price = 5", "price = 6", ""),
    ('aliases = ["one"]', 'aliases = ["two"]', ""),
    ("width = 8", "width = 9", "width"),
    ("max_tokens = 16", "max_tokens = 17", "max_tokens"),
    (FOLDER, FOLDER.replace("aaa", "bbb", 1), "digest"),
    (FOLDER, FOLDER.replace('"f"', '"elsewhere"'), ""),
    ('token_ids = "cl100k"', 'token_ids = "native"', "token_ids"),
    ('prompts = { query = "q: " }', 'prompts = { query = "query: " }', "prompts"),
    ("", 'tier = "int8"', "tier"),
    ("", '[[models]]\nid = "x"\nwidth = 8\nmax_tokens = 16\nprice = 1\naliases = ["fresh"]', ""),
]


@pytest.mark.parametrize(("before", "after", "other"), MEANINGS)
def test_a_known_name_never_comes_to_mean_other_vectors(before: str, after: str, other: str) -> None:
    def text(written: str) -> str:
        named = {line.partition(" ")[0] for line in written.splitlines()}
        own = [line for line in PLAIN.splitlines() if line.partition(" ")[0] not in named or written.startswith("[[")]
        return "\n".join([*own, *written.splitlines()])

    known, new = parsed(text(before)), parsed(text(after))
    if not other:
        refuse_new_meanings(known, new, "models.toml")
        return
    with pytest.raises(SetupError, match=f"models.toml: m.* has another .*{other}"):
        refuse_new_meanings(known, new, "models.toml")


def test_shares_that_shrink_below_what_is_taken_take_nothing_more_until_enough_came_back() -> None:
    shares = Shares(100)
    assert shares.take("a", 40) and shares.take("b", 20)
    shares.resize(50)
    assert (shares.taken, shares.total, shares.alone) == (60, 50, 40)
    assert not shares.take("a") and not shares.take("b") and not shares.take("c")
    shares.give_back("a", 40)
    assert shares.taken == 20 and shares.take("c", 20)
    shares.give_back("b", 20)
    shares.give_back("c", 20)
    shares.resize(100)
    assert shares.taken == 0 and shares.take("a", 80)


async def test_all_who_wait_are_told_and_no_more_wait_than_is_allowed() -> None:
    requests = ReloadRequests()
    asked = [asyncio.create_task(requests.ask(BY)) for _ in range(16)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await requests.ask(BY)
    asked_by, tell = await requests.next()
    assert asked_by == [BY] * 16
    late = asyncio.create_task(requests.ask(BY))  # the file may have changed since that reading began
    await asyncio.sleep(0)
    tell(InvalidValue("wrong"))
    assert all(isinstance(each, InvalidValue) for each in await asyncio.gather(*asked, return_exceptions=True))
    assert not late.done() and requests.counts()["settings_reloads_refused"] == 1
    (await requests.next())[1](Reloaded([], ["port"]))
    assert (await late).needs_restart == ["port"]
    assert requests.counts() == {"settings_reloads": 1, "settings_reloads_refused": 1, "settings_need_restart": 1}


def test_the_reference_marks_what_can_change() -> None:
    page = (CHECKOUT / "docs/reference/settings.md").read_text().partition("## Node")[0]
    marked = {name.replace("-", "_") for name in re.findall(r"^\| `--([a-z-]+)` ↻ \|", page, re.MULTILINE)}
    assert marked == set(RELOADED)
