"""`/v1/admin/invites`: join tokens, each good for one node."""

from typing import Literal

import msgspec

from embedmesh.gateway.api.replies import Always, Count, ReplyList, reply_of
from embedmesh.gateway.api.routes import ADMIN_KEY, READ_KEY, Api, ApiCall, Route
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import InvalidValue, NotFound
from embedmesh.rules.limits import INVITE_NOTE_CHARS_MAX, INVITE_S_MAX
from embedmesh.rules.ports import Clock
from embedmesh.signing.invites import make_invite, verifier
from embedmesh.storage.nodes import InviteRow, NodeBooks

INVITE_S = 3_600


class InviteRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long the token is good, and a note for operators."""

    expires_in_s: int = INVITE_S
    note: str = ""


class InviteReply(msgspec.Struct, frozen=True):
    """An invite, without its token."""

    invite_id: str
    note: str
    state: Literal["open", "used", "expired"]
    created_ms: Count
    expires_ms: Count
    used_ms: Count | None
    node_id: str | None


class NewInvite(msgspec.Struct, frozen=True):
    """A new invite, with its token."""

    invite_id: str
    token: str
    expires_ms: Count


class RevokedInvite(msgspec.Struct, frozen=True):
    """An invite that was revoked."""

    invite_id: str
    revoked: Always


class InvitesApi(Api):
    """Handlers for operators. `public_key` is this gateway's, which invites pin."""

    TAG = "Administration"

    def __init__(self, books: NodeBooks, bodies: BodyBudget, clock: Clock, public_key: bytes) -> None:
        self._books = books
        self.bodies = bodies
        self._clock = clock
        self._public_key = public_key

    async def list_invites(self, call: ApiCall[None, None]) -> ReplyList[InviteReply]:
        """List invites. The newest first, without their tokens."""
        now_ms = self._clock.unix_ms()

        def state(row: InviteRow) -> str:
            return "used" if row.used_ms is not None else "open" if row.expires_ms > now_ms else "expired"

        rows = await self._books.invites()
        return ReplyList("list", [reply_of(InviteReply, row, state=state(row)) for row in rows])

    async def create_invite(self, call: ApiCall[InviteRequest, None]) -> NewInvite:
        """Invite a node. The reply has a join token, good for one node. It is shown only once."""
        expires_in_s, note = call.body.expires_in_s, call.body.note
        if not 0 < expires_in_s <= INVITE_S_MAX:
            raise InvalidValue(f"A token is good for 1 to {INVITE_S_MAX:,} seconds.", param="expires_in_s")
        if len(note) > INVITE_NOTE_CHARS_MAX:
            raise InvalidValue(f"A note has at most {INVITE_NOTE_CHARS_MAX} characters.", param="note")
        made = make_invite(self._public_key)
        expires_ms = self._clock.unix_ms() + expires_in_s * 1000
        await self._books.add_invite(made.invite_id, verifier(made.secret), note, expires_ms, call.by)
        return NewInvite(made.invite_id, made.text, expires_ms)

    async def revoke_invite(self, call: ApiCall[None, None]) -> RevokedInvite:
        """Revoke an invite. Only an invite that no node has used yet."""
        if not await self._books.revoke_invite(call.parameter, call.by):
            raise NotFound("There is no open invite of that id.")
        return RevokedInvite(call.parameter, True)

    ROUTES = (
        Route("GET", "/v1/admin/invites", READ_KEY, list_invites),
        Route("POST", "/v1/admin/invites", ADMIN_KEY, create_invite, body_optional=True),
        Route("DELETE", "/v1/admin/invites/{invite_id}", ADMIN_KEY, revoke_invite),
    )
