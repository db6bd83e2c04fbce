"""`/v1/admin/audit`: what operators have changed, and owners of keys in their accounts."""

import functools
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.queries import PAGE_ROWS, Limit, NonEmpty
from embedmesh.gateway.api.replies import Count, ReplyPage, doc, page_of, reply_of
from embedmesh.gateway.api.routes import AUDIT_KEY, Api, ApiCall, Route
from embedmesh.storage.books.acts import ACT_ID_MAX


class AuditQuery(msgspec.Struct, frozen=True):
    limit: Limit = PAGE_ROWS
    after: Annotated[int, Meta(ge=0, le=ACT_ID_MAX, description="The `act_id` of the last act of the page before.")] = 0
    order: Annotated[Literal["asc", "desc"], doc("`asc`: the oldest first; `desc`, the default: the latest first.")] = (
        "desc"
    )
    since_ms: Annotated[int, Meta(ge=0, le=10**15, description="List what was done then or later.")] = 0
    actor: Annotated[NonEmpty | None, doc("By whom: a key's id, `oidc:ISSUER#SUBJECT`, `user:NAME`.")] = None
    act: Annotated[NonEmpty | None, doc("What was done, such as `key.revoke`; `key` is all that begins with it.")] = (
        None
    )
    object: Annotated[NonEmpty | None, doc("To what: the id of a key, an account, a model, a node, a request.")] = None


class ActReply(msgspec.Struct, frozen=True, rename={"verb": "act", "object_id": "object"}):
    """An act: who did what to what, when, and from where."""

    act_id: Annotated[Count, doc("Its place in the audit: the first is 1, and none is left out.")]
    created_ms: Count
    actor: Annotated[str, doc("A key's id, `oidc:ISSUER#SUBJECT`, or `user:NAME` of the machine `origin`.")]
    verb: Annotated[str, doc("What was done, such as `key.revoke`.")]
    object_id: Annotated[str, doc("The id of what it was done to.")]
    changes: Annotated[dict[str, Any], doc("By name: `[old, new]` of what was changed, or what was said.")]
    origin: Annotated[str, doc("The address that the request came from, or the name of the machine.")]
    request_id: Annotated[str, doc("The `x-request-id`; empty where there was no request.")]
    hash: Annotated[str, doc("Over all of this and the act before.")]


class AuditApi(Api):
    """Handlers for operators, and for keys with the scope `audit`. Reading makes no row."""

    TAG = "Administration"

    def __init__(self, books: BooksThread) -> None:
        self._books = books

    async def list_acts(self, call: ApiCall[None, AuditQuery]) -> ReplyPage[ActReply]:
        """List what was done by operators, and to keys. The latest first, or the oldest."""
        query = call.query
        kind: dict[str, Any] = {
            "after": query.after or None,
            "oldest_first": query.order == "asc",
            "since_ms": query.since_ms,
            "actor": query.actor,
            "verb": query.act,
            "object_id": query.object,
        }
        found = await self._books.ask(
            lambda books: books.acts.list(**kind, rows_max=query.limit + 1), viewer=call.viewer
        )
        return page_of(found, query.limit, _reply)

    ROUTES = (Route("GET", "/v1/admin/audit", AUDIT_KEY, list_acts),)


_reply: functools.partial[ActReply] = functools.partial(reply_of, ActReply)
