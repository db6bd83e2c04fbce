"""What is sent about keys, by operators and by accounts themselves."""

import difflib
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from embedmesh.rules.errors import ModelNotFound
from embedmesh.rules.limits import KEY_LIMIT_MAX, MODEL_ID_CHARS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.money import AMOUNT_MAX_NANOUSD
from embedmesh.rules.ports import Catalogue
from embedmesh.storage.books.keys import Limits

OVERLAP_S = 86_400
OVERLAP_S_MAX = 365 * 86_400

Id = Annotated[str, Meta(pattern="^[!-~]{1,128}$")]
Number = Annotated[int, Meta(ge=1, le=KEY_LIMIT_MAX)]
Budget = Annotated[int, Meta(ge=0, le=AMOUNT_MAX_NANOUSD)]
UnixMs = Annotated[int, Meta(ge=0, le=10**15)]


class KeyLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a key may do, besides its scopes; null, or no models, is: no limit. Budgets are nano-USD, days are UTC.

    What is not named stays as it was; a new key has what the key has that makes it, or else what the gateway's
    `--key-defaults` says.
    """

    models: tuple[str, ...] | UnsetType | None = UNSET
    requests_a_minute: Number | UnsetType | None = UNSET
    tokens_a_minute: Number | UnsetType | None = UNSET
    concurrency: Number | UnsetType | None = UNSET
    budget_day: Budget | UnsetType | None = UNSET
    budget_month: Budget | UnsetType | None = UNSET

    def over(self, before: Limits, catalogue: Catalogue) -> Limits:
        """The limits of before, but for what is named here. Raises ModelNotFound."""
        named = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}
        if "models" in named:
            named["models"] = tuple(
                dict.fromkeys(model_of(name, catalogue, param="limits.models").id for name in named["models"] or ())
            )
        return msgspec.structs.replace(before, **named)


class OwnKeyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/account/keys`. Where no end is named it has that of the key that makes it, if any."""

    scopes: Annotated[tuple[str, ...], Meta(min_length=1, max_length=8)]
    name: str = ""
    expires_ms: UnixMs | UnsetType | None = UNSET
    limits: KeyLimits = KeyLimits()


class KeyRequest(OwnKeyRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/admin/keys`."""

    account: Id


class KeyChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/admin/keys/{id}`. What is not named stays as it is."""

    name: str | UnsetType = UNSET
    expires_ms: UnixMs | UnsetType | None = UNSET
    limits: KeyLimits | UnsetType = UNSET


class RotateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/admin/keys/{id}/rotate`: how much longer the old key is good."""

    overlap_s: Annotated[int, Meta(ge=0, le=OVERLAP_S_MAX)] = OVERLAP_S


def model_of(name: str, catalogue: Catalogue, param: str) -> Model:
    """The model of that id or alias. Raises ModelNotFound, which names the nearest."""
    model = catalogue.find(name)
    if model is None:
        names = [known for each in catalogue.models for known in (each.id, *each.aliases)]
        near = difflib.get_close_matches(name[:MODEL_ID_CHARS_MAX], names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ModelNotFound(f"There is no model {name[:MODEL_ID_CHARS_MAX]} in the catalogue.{hint}", param=param)
    return model
