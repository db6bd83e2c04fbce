"""Our own gateway with some of its work left out: `python -m bench.gateway.ours STAGE ARGUMENTS OF embedmesh gateway`.

STAGE is one of STAGES, each of which does all that those before it do, or ALONE or SIGNED.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from embedmesh.dialects.openai.render import respond
from embedmesh.flow.paid import Outcome
from embedmesh.flow.world import World
from embedmesh.rules.exchange import Deliver, Receive, RequestHead
from embedmesh.rules.forwarding import Answer, Part, Share

import embedmesh.gateway as gateway
import embedmesh.gateway.api.app as edge
from bench.gateway.node import NODE_ID, SESSION
from embedmesh.cli import main as cli
from embedmesh.gateway.nodes.own import OwnLink, Signing
from embedmesh.gateway.nodes.pools import ConnectionPool
from embedmesh.rules.embeddings import Call, Counted
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, PriorRequest
from embedmesh.rules.ports import Clock

STAGES = ("forward", "key", "count", "hold")
"""Only forward; + key, limits and validation; + token count; + money held durably: the gateway as it is."""
ALONE, SIGNED = "alone", "signed"
"""As it is, but no request shares a call with others; and that with every call signed, and every answer checked."""
TOKENS = 28
IDS = [list(range(2_000, 2_000 + TOKENS - 2))]


class FixedTokenizer:
    """Takes every text for the same ids."""

    def __init__(self, real: Any) -> None:
        self.specials, self.special_ids = real.specials, real.special_ids
        self.vocab_size, self.max_tokens = real.vocab_size, real.max_tokens
        self.clip, self.next_cut = real.clip, real.next_cut

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(IDS[0]) for _ in texts]

    soon = ids


class NoLedger:
    """Holds nothing."""

    def __init__(self, real: Any) -> None:
        self.healthy, self.prior, self.kept_bytes = real.healthy, real.prior, real.kept_bytes
        self.available_nanousd = real.available_nanousd

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        return None

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        pass

    def release(self, hold: Hold, why: HoldEnd) -> None:
        pass


async def only_forward(
    world: World, asked: RequestHead, receive: Receive, deliver: Deliver, on_model: Callable[[str], None]
) -> Outcome:
    """The body is read and not looked at; the node is asked for one vector, which is not checked."""
    await receive("")
    model = world.catalogue.models[0]
    counted = Counted(lengths=[TOKENS], ids=IDS)
    part = Part(node_id="local", places=(0,), tokens=TOKENS, expected_s=1.0)
    reply = await world.client.embed(part, model, counted, "req")
    answer = Answer(reply.data, model.width, reply.tokens, (Share("local", TOKENS, 0),))
    await deliver(respond(Call(model=model.id, encoding="base64"), 0, answer, 0.0))
    return Outcome(model.id, TOKENS, 0)


def signed_link(pool: ConnectionPool, clock: Clock) -> OwnLink:
    """A link under the session of bench.gateway.node."""
    signing = Signing(NODE_ID, "0" * 16, clock, lambda *_: None)
    signing.add(SESSION)
    return OwnLink(pool, clock, signing)


def leave_out(stage: str) -> None:
    """Change the gateway of this process."""
    if stage in (ALONE, SIGNED):
        gateway.CoalescingLink = lambda link: link  # type: ignore[misc, assignment]
    if stage == SIGNED:
        gateway.OwnLink = signed_link  # type: ignore[misc, assignment]
    if stage in ("hold", ALONE, SIGNED):
        return

    def staged(**parts: Any) -> World:
        parts["ledger"] = NoLedger(parts["ledger"])
        if stage != "count":
            parts["tokenizers"] = {name: FixedTokenizer(each) for name, each in parts["tokenizers"].items()}
        return World(**parts)

    gateway.World = staged  # type: ignore[misc, assignment]
    if stage == "forward":
        edge.handle = only_forward


if __name__ == "__main__":
    leave_out(sys.argv[1])
    sys.argv[1:2] = ["gateway"]
    cli()
