"""Who the caller is. One message for every wrong key, so that nothing about keys can be probed."""

from embedmesh.rules.errors import InsufficientScope, InvalidApiKey, InvalidValue
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller, Keys

METRICS_SCOPES = ("metrics", "admin")
HEADER_CHARS_MAX = 512  # our keys have about 50; anything longer is not one of ours


async def identify(
    authorization: str | None,
    keys: Keys,
    *any_of: str,
    api_key: str | None = None,
    chars_max: int = HEADER_CHARS_MAX,
) -> Caller:
    """The caller behind an `Authorization: Bearer` or an `api-key` header; its key has one of the named scopes, if any.

    Raises InvalidApiKey, InsufficientScope, Overloaded, StoreUnavailable, or InvalidValue if the two headers differ.
    """
    token = token_of(authorization, api_key, chars_max)
    caller = await keys.find(token) if token is not None else None
    if caller is None:
        raise InvalidApiKey("The API key is missing or not valid. Send it as `Authorization: Bearer YOUR_KEY`.")
    if any_of and caller.scopes.isdisjoint(any_of):
        raise InsufficientScope(f"This API key may not do this: it lacks the scope `{any_of[0]}`.")
    return caller


def token_of(authorization: str | None, api_key: str | None, chars_max: int = HEADER_CHARS_MAX) -> str | None:
    """The key in the two headers; None where there is none. Raises InvalidValue if they differ."""
    scheme, _, token = (authorization or "").partition(" ")
    good = scheme.lower() == "bearer" and 0 < len(token) <= chars_max
    if api_key is not None:
        if authorization and not (good and token.strip() == api_key.strip()):
            raise InvalidValue("`Authorization` and `api-key` carry different keys. Send one of them.")
        token, good = api_key, 0 < len(api_key) <= chars_max
    return token.strip() if good else None


def may_use(caller: Caller, model: Model) -> None:
    """Raise InsufficientScope if the caller's key is for other models."""
    if caller.models is not None and model.id not in caller.models:
        raise InsufficientScope("This API key may not use this model. Use another model, or a key that allows it.")
