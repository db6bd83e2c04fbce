"""Settings that change while a gateway runs: read again, checked as a whole, then applied at one moment of the loop.

Each setting that can change has a line in RELOADED, with what prepares the change. Preparing may fail, and then nothing
was changed; what it returns applies the change, and cannot fail. What has no line here stays until a restart.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import msgspec

from embedmesh.fleet.addresses import Policy
from embedmesh.fleet.choose import POLICIES
from embedmesh.gateway.api.reload_api import ModelChanges, Reloaded
from embedmesh.gateway.build import batch_terms, cors_of
from embedmesh.gateway.models import Models
from embedmesh.gateway.network import parsed
from embedmesh.gateway.parts import Gateway
from embedmesh.http.connections import Origins
from embedmesh.http.tls import Certificate
from embedmesh.logs.setup import set_level
from embedmesh.provision.bootstrap import key_defaults
from embedmesh.rules.acts import Actor
from embedmesh.rules.errors import Failure, InternalError, SetupError
from embedmesh.settings import GatewaySettings
from embedmesh.storage.books import Books
from embedmesh.storage.books.new_keys import NewKeys
from embedmesh.system import this_user

log = logging.getLogger("embedmesh.gateway")

Apply = Callable[[], None]
Prepare = Callable[[Gateway, GatewaySettings], Apply]
ReadSettings = Callable[[], GatewaySettings]


def _cors(gateway: Gateway, new: GatewaySettings) -> Apply:
    cors = cors_of(new)
    return lambda: gateway.app.use_cors(cors)


def _trusted_proxies(gateway: Gateway, new: GatewaySettings) -> Apply:
    origins = parsed(Origins, new.trusted_proxies, "--trusted-proxies")
    return lambda: gateway.adjustable.origins.become(origins)


def _node_networks(gateway: Gateway, new: GatewaySettings) -> Apply:
    policy = parsed(Policy, new.node_networks, "--node-networks")
    return lambda: gateway.adjustable.policy.become(policy)


def _choice(gateway: Gateway, new: GatewaySettings) -> Apply:
    return lambda: gateway.fleet.scheduler.use(POLICIES[new.policy], hedge=new.hedge)


def _sizes(gateway: Gateway, new: GatewaySettings) -> Apply:
    def apply() -> None:
        gateway.app.resize(new.in_flight_max, new.body_bytes_total_max)
        gateway.world.replies.resize(new.reply_bytes_total_max)
        gateway.world.cache.resize(new.cache_bytes_max)
        gateway.files.bound(new.files_bytes_max)

    return apply


def _batches(gateway: Gateway, new: GatewaySettings) -> Apply:
    return lambda: gateway.runner.use_terms(batch_terms(new))


def _log_level(gateway: Gateway, new: GatewaySettings) -> Apply:
    return lambda: set_level(new.log_level)


def _nothing(gateway: Gateway, new: GatewaySettings) -> Apply:
    """What is prepared apart: it is read again even where the setting is the same, or it is kept in the store."""
    return lambda: None


RELOADED: Mapping[str, Prepare] = {
    "cors_origin": _cors,
    "trusted_proxies": _trusted_proxies,
    "node_networks": _node_networks,
    "policy": _choice,
    "hedge": _choice,
    "in_flight_max": _sizes,
    "body_bytes_total_max": _sizes,
    "reply_bytes_total_max": _sizes,
    "cache_bytes_max": _sizes,
    "files_bytes_max": _sizes,
    "batch_lines_max": _batches,
    "batch_inputs_max": _batches,
    "batch_price_percent": _batches,
    "log_level": _log_level,
    "key_defaults": _nothing,
    "catalogue": _nothing,
    "tls_cert": _nothing,
    "tls_key": _nothing,
}


class Reloader:
    """Reads a gateway's settings again when somebody wants it: SIGHUP, the admin API, another gateway of the store."""

    def __init__(
        self,
        gateway: Gateway,
        settings: GatewaySettings,
        read: ReadSettings,
        certificate: Certificate | None,
        open_to_others: bool,
    ) -> None:
        """`settings` are those in force; `read` reads them anew (SetupError). `open_to_others`: see NewKeys."""
        self._gateway = gateway
        self.settings = settings
        self._read = read
        self._certificate = certificate
        self._open_to_others = open_to_others

    async def run(self) -> NoReturn:
        """Do it whenever it is wanted; cancel it."""
        requests = self._gateway.adjustable.requests
        while True:
            asked_by, tell = await requests.next()
            try:
                result = await self.reload(asked_by)
            except (SetupError, Failure) as refused:
                log.error("the settings stay as they were: %s", refused)
                tell(refused)
            except Exception as error:
                # Whatever a file may hold: requests go on with what there is. Its words may be a secret of the file.
                log.exception("the settings were not read again (%s): a bug of ours", type(error).__name__)
                tell(InternalError("The settings were not read again: a bug of ours. The log says where."))
            else:
                tell(result)

    async def reload(self, asked_by: Sequence[Actor] = ()) -> Reloaded:
        """Read and apply them, or raise SetupError or StoreUnavailable with nothing changed.

        Where somebody asked for it, the act is written, and the store's other gateways hear of it, just before.
        """
        before = self.settings
        read = await asyncio.to_thread(self._read)
        differing = [name for name in before.__struct_fields__ if getattr(read, name) != getattr(before, name)]
        fixed = {name: getattr(before, name) for name in differing if not self._may_change(name, read)}
        new = msgspec.structs.replace(read, **fixed)
        changed = [name for name in differing if name not in fixed]
        models = await asyncio.to_thread(self._gateway.adjustable.models.read_again, new.catalogue)
        apply = [RELOADED[name](self._gateway, new) for name in changed]
        if self._certificate is not None and new.tls_cert is not None and new.tls_key is not None:
            apply.append(await asyncio.to_thread(self._certificate.prepare, new.tls_cert, new.tls_key))
        limits = NewKeys(key_defaults(new), self._open_to_others)
        found = model_changes(self._gateway.adjustable.models, models)
        named = [*changed, "catalogue"] if found != ModelChanges() and "catalogue" not in changed else changed
        reloaded = Reloaded(named, list(fixed), found)

        def write(books: Books) -> None:
            if "key_defaults" in changed:
                books.by(this_user(), lambda books: books.new_keys.write(limits))
            if asked_by:
                books.tell_settings(reloaded.names(), asked_by)

        if asked_by or "key_defaults" in changed:  # the last of what can fail
            await self._gateway.books.operators.ask(write)
        for each in apply:
            each()
        self._gateway.adjustable.models.become(models)
        self.settings = new
        _log(named, list(fixed), found)
        return reloaded

    def _may_change(self, name: str, new: GatewaySettings) -> bool:
        """Whether a setting can change now. A port does not begin to speak TLS, or end to."""
        if name in ("tls_cert", "tls_key"):
            return self._certificate is not None and new.tls_cert is not None and new.tls_key is not None
        return name in RELOADED


def model_changes(before: Models, after: Models) -> ModelChanges:
    """What a new catalogue does to the models of the one before; tiers that follow from others are not named."""
    old, new = ({model.id: model for model in each.catalogue.written} for each in (before, after))
    return ModelChanges(
        added=[name for name in new if name not in old],
        removed=[name for name in old if name not in new],
        changed=[name for name in new if name in old and new[name] != old[name]],
    )


def _log(changed: list[str], needs_restart: list[str], models: ModelChanges) -> None:
    """Names, never values: one may be a secret."""
    log.info("the settings were read again; changed: %s", ", ".join(changed) or "nothing")
    for what, names in msgspec.structs.asdict(models).items():
        if names:
            log.info("models %s: %s", what, ", ".join(names))
    if needs_restart:
        log.warning("a restart is needed for: %s", ", ".join(needs_restart))
