"""The routes for an account's own keys."""

from embedmesh.gateway.api.account_api import KEYS_SCOPE, USAGE_DAYS, USAGE_DAYS_MAX
from embedmesh.gateway.api.openapi.operations import ANY_KEY, LIMITED_KEY, body, operation, parameter, query
from embedmesh.gateway.api.openapi.replies import Failures, json_reply
from embedmesh.gateway.api.openapi.shapes import COUNT, Json, ref
from embedmesh.gateway.api.queries import ROWS
from embedmesh.rules import errors
from embedmesh.rules.limits import ACCOUNT_KEYS_A_DAY_MAX, ACCOUNT_KEYS_MAX, KEYS_ABOVE_MAX, PAGE_ROWS_MAX

TAG = "Account"
KEY_ID = "key_019aa0b4c0de7b62a1f0c3d4e5f60718"
DATE: Json = {"type": "string", "format": "date"}
A_PAGE: Failures = (errors.UnknownParameter, errors.InvalidValue, errors.Overloaded)
WITH_BODY: Failures = (
    errors.InvalidValue,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
    errors.Overloaded,
)


def account_paths() -> Json:
    """What an account asks of itself."""
    return {
        "/v1/account": {
            "get": operation(
                "getAccount",
                TAG,
                "What your account has",
                "Its balance, what is held for running requests, what may be spent, and whether answers may come from "
                "the cache. With any of its keys.",
                {200: json_reply("The account.", "OwnAccount")},
                ANY_KEY,
                scopes=(),
            )
        },
        "/v1/account/usage": {
            "get": operation(
                "getUsage",
                TAG,
                "What your account used",
                "By day (UTC), model and key, the latest day first. With any of its keys.",
                {200: json_reply("The usage.", "UsageList")},
                (*A_PAGE, *ANY_KEY),
                scopes=(),
            )
            | {
                "parameters": [
                    query("from", f"The first day; else the last {USAGE_DAYS} days count.", DATE),
                    query("to", f"The last day, at most {USAGE_DAYS_MAX} from the first on; else today.", DATE),
                ]
            }
        },
        "/v1/account/entries": {
            "get": operation(
                "listEntries",
                TAG,
                "What came and went",
                "Every entry of the ledger for your account, the latest first. With any of its keys.",
                {200: json_reply("A page of entries.", "EntryPage")},
                (*A_PAGE, *ANY_KEY),
                scopes=(),
            )
            | {"parameters": [query("before", "An entry: those before it are wanted.", COUNT), limit()]}
        },
        "/v1/account/keys": {
            "get": operation(
                "listKeys",
                TAG,
                "List your account's keys",
                "The oldest first; revoked and expired ones, too.",
                {200: json_reply("A page of keys.", "KeyPage")},
                (errors.NotFound, *A_PAGE, *LIMITED_KEY),
                scopes=(KEYS_SCOPE,),
            )
            | {"parameters": [limit(), after("key")]},
            "post": operation(
                "createKey",
                TAG,
                "Make a key",
                "It is shown once. It can do no more than the key that makes it: no other scopes, no looser limits, "
                "no later end; and never administer. What it uses counts against that key's limits and budgets, too, "
                f"and it ends with it. Keys make keys to a depth of {KEYS_ABOVE_MAX}, and at most "
                f"{ACCOUNT_KEYS_A_DAY_MAX:,} of an account in a day; an account has at most {ACCOUNT_KEYS_MAX:,} good "
                "ones.",
                {200: json_reply("The key.", "NewKey")},
                (errors.ModelNotFound, *WITH_BODY, *LIMITED_KEY),
                scopes=(KEYS_SCOPE,),
            )
            | body(ref("OwnKeyRequest")),
        },
        "/v1/account/keys/{key_id}": {
            "delete": operation(
                "revokeKey",
                TAG,
                "Revoke a key",
                "It is useless at once, on every gateway, and so are those that it made. Harmless where it was revoked "
                "before.",
                {200: json_reply("The key.", "Key")},
                (errors.NotFound, errors.Overloaded, *LIMITED_KEY),
                scopes=(KEYS_SCOPE,),
            )
            | {"parameters": [which_key()]}
        },
    }


def limit() -> Json:
    """The parameter `limit` of a page."""
    return query("limit", f"How many; else {ROWS}.", {"type": "integer", "minimum": 1, "maximum": PAGE_ROWS_MAX})


def after(what: str) -> Json:
    """The parameter `after` of a page."""
    return query("after", f"The id of the last {what} of the page before.", {"type": "string", "minLength": 1})


def which_key() -> Json:
    """The parameter `key_id`."""
    return parameter("key_id", "The key's id.", KEY_ID)
