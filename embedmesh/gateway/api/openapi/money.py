"""The routes for operators about accounts, keys and money."""

from embedmesh.gateway.api.openapi.account import A_PAGE, after, limit, which_key
from embedmesh.gateway.api.openapi.fleet import BY_AN_OPERATOR, OF_ONE_THING, by_operator
from embedmesh.gateway.api.openapi.operations import SCOPED_KEY, body, parameter, query
from embedmesh.gateway.api.openapi.replies import Failures, json_reply
from embedmesh.gateway.api.openapi.shapes import TEXT, Json, ref
from embedmesh.rules import errors
from embedmesh.rules.limits import ACCOUNT_KEYS_MAX

ONCE = "Once for each reference; `applied` is false where that was done before."
LIST: Failures = (errors.NotFound, *A_PAGE, *SCOPED_KEY)
ONE: Failures = (errors.Overloaded, *OF_ONE_THING)
TO_ONE: Failures = (errors.NotFound, *BY_AN_OPERATOR)


def money_paths() -> Json:
    """What operators ask."""
    return _account_paths() | _key_paths() | _price_paths() | _report_paths()


def _account_paths() -> Json:
    which = {"parameters": [parameter("account_id", "The account's id.", "local")]}
    return {
        "/v1/admin/accounts": {
            "get": by_operator(
                "listAccounts",
                "List accounts",
                "The oldest first; our own and the nodes' among them.",
                {200: json_reply("A page of accounts.", "AccountPage")},
                LIST,
            )
            | {"parameters": [limit(), after("account")]},
            "post": by_operator(
                "createAccount",
                "Make an account",
                "For a customer, prepaid or, with a credit limit, postpaid.",
                {200: json_reply("The account.", "Account")},
                BY_AN_OPERATOR,
            )
            | body(ref("AccountRequest")),
        },
        "/v1/admin/accounts/{account_id}": {
            "get": by_operator(
                "getAnAccount",
                "Get an account",
                "What it has, holds and may owe, and whether its answers may come from the cache.",
                {200: json_reply("The account.", "Account")},
                ONE,
            )
            | which,
            "post": by_operator(
                "changeAccount",
                "Change an account",
                "How much it may owe, not less than it owes now; and whether its answers may come from the cache.",
                {200: json_reply("The account.", "Account")},
                TO_ONE,
            )
            | body(ref("AccountChange"))
            | which,
        },
        "/v1/admin/accounts/{account_id}/credits": {
            "post": by_operator(
                "creditAccount",
                "Give an account money, or take it back",
                ONCE,
                {200: json_reply("It is so.", "Moved")},
                (errors.InsufficientQuota, *TO_ONE),
            )
            | body(ref("CreditRequest"))
            | which
        },
    }


def _key_paths() -> Json:
    which = {"parameters": [which_key()]}
    return {
        "/v1/admin/keys": {
            "get": by_operator(
                "listAllKeys",
                "List keys",
                "Of one account, or all, the oldest first; revoked and expired ones, too.",
                {200: json_reply("A page of keys.", "KeyPage")},
                LIST,
            )
            | {"parameters": [query("account", "Whose.", TEXT), limit(), after("key")]},
            "post": by_operator(
                "createAnyKey",
                "Make a key",
                f"For any account, with any scopes. It is shown once. An account has at most {ACCOUNT_KEYS_MAX:,} good "
                f"ones. Limits that are not named are those of the gateway's `--key-defaults`.",
                {200: json_reply("The key.", "NewKey")},
                (errors.ModelNotFound, *TO_ONE),
            )
            | body(ref("KeyRequest")),
        },
        "/v1/admin/keys/{key_id}": {
            "get": by_operator("getKey", "Get a key", "One key.", {200: json_reply("The key.", "Key")}, ONE) | which,
            "post": by_operator(
                "changeKey",
                "Change a key",
                "Its name, its end or its limits. What is not named stays as it is.",
                {200: json_reply("The key as it is now.", "Key")},
                (errors.ModelNotFound, *TO_ONE),
            )
            | body(ref("KeyChange"))
            | which,
            "delete": by_operator(
                "revokeAnyKey",
                "Revoke a key",
                "It is useless at once, on every gateway, and so are those that it made. Harmless where it was revoked "
                "before.",
                {200: json_reply("The key.", "Key")},
                ONE,
            )
            | which,
        },
        "/v1/admin/keys/{key_id}/rotate": {
            "post": by_operator(
                "rotateKey",
                "Let another key take its place",
                "A new key that may do the same, and has spent what the old one has. The old one ends later, so that "
                "nobody is locked out, and draws from the new one.",
                {200: json_reply("The new key.", "NewKey")},
                TO_ONE,
            )
            | body(ref("RotateRequest"), required=False)
            | which
        },
    }


def _price_paths() -> Json:
    def model(*, required: bool) -> Json:
        return query("model", "A model, by id or alias.", TEXT | {"minLength": 1}, required=required)

    return {
        "/v1/admin/prices": {
            "get": by_operator(
                "listPrices",
                "List prices that were set",
                "Of all times, the latest first; of one model, or all.",
                {200: json_reply("The prices.", "PricePage")},
                (*A_PAGE, *SCOPED_KEY),
            )
            | {"parameters": [model(required=False)]},
            "post": by_operator(
                "setPrice",
                "Set a price",
                "For one account or for all, in place of what counted before. What was bought stays as it was paid.",
                {200: json_reply("The price.", "Price")},
                (errors.ModelNotFound, *TO_ONE),
            )
            | body(ref("PriceRequest")),
            "delete": by_operator(
                "endPrice",
                "End a price",
                "Then the price for all counts, or the catalogue's.",
                {200: json_reply("It is ended.", "EndedPrice")},
                LIST,
            )
            | {"parameters": [model(required=True), query("account", "Whose, where it is not for all.", TEXT)]},
        }
    }


def _report_paths() -> Json:
    which = {"parameters": [parameter("request_id", "Our own id of the request, as entries tell it.", "req_1")]}
    return {
        "/v1/admin/requests/{request_id}": {
            "get": by_operator(
                "explainRequest",
                "Explain a request",
                "What was held for it, how that ended, what was bought, and all money that was moved.",
                {200: json_reply("The request.", "Explained")},
                ONE,
            )
            | which
        },
        "/v1/admin/requests/{request_id}/refund": {
            "post": by_operator(
                "refundRequest",
                "Give back what a request cost",
                f"All of it, or some. Its nodes keep what they have earned. {ONCE}",
                {200: json_reply("It is so.", "Moved")},
                TO_ONE,
            )
            | body(ref("RefundRequest"))
            | which
        },
        "/v1/admin/payables": {
            "get": by_operator(
                "listPayables",
                "What nodes have earned",
                "And were not paid out.",
                {200: json_reply("The nodes.", "PayableList")},
                SCOPED_KEY,
            )
        },
        "/v1/admin/payouts": {
            "post": by_operator(
                "payOut",
                "Note that a node's operator was paid",
                ONCE,
                {200: json_reply("It is noted.", "Moved")},
                TO_ONE,
            )
            | body(ref("PayoutRequest"))
        },
        "/v1/admin/ledger": {
            "get": by_operator(
                "checkLedger",
                "Check that all money adds up",
                "A large store takes longer than a request may: then `embedmesh ledger check` does it.",
                {200: json_reply("What was found.", "LedgerReport")},
                SCOPED_KEY,
            )
        },
    }
