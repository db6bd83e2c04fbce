"""Our own gateway with some of its work left out: `python -m bench.gateway.ours STAGE ARGUMENTS OF embedmesh gateway`.

STAGE is one of STAGES, each of which does all that those before it do, or ALONE or SIGNED.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from bench.gateway.node import NODE_ID, SESSION
from embedmesh.cli import main as cli
from embedmesh.dialects.openai.render import render
from embedmesh.flow.deliver import Outcome
from embedmesh.flow.operation import Operation
from embedmesh.flow.straight import KnownHead, StraightEmbeddings
from embedmesh.flow.world import World
from embedmesh.gateway import build
from embedmesh.gateway.api import embeddings_api
from embedmesh.gateway.nodes.own import OwnLink, Signing
from embedmesh.rules.embeddings import Call, Counted
from embedmesh.rules.exchange import Deliver, Receive, RequestHead
from embedmesh.rules.forwarding import Answer, Part, Share
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, PriorRequest
from embedmesh.rules.ports import Clock
from embedmesh.upstream.pools import ConnectionPool

STAGES = ("forward", "key", "count", "hold")
"""Only forward; + key, limits and validation; + token count; + money held durably: the gateway as it is."""
ALONE, SIGNED = "alone", "signed"
"""As it is, but no request shares a call with others; and that with every call signed, and every answer checked."""
TOKENS = 28
IDS = [list(range(2_000, 2_000 + TOKENS - 2))]


class FixedTokenizer:
    """Takes every text for the same ids."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(IDS[0]) for _ in texts]

    soon = ids


class NoLedger:
    """Holds nothing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def has_tab(self, key_id: str) -> bool:
        return True

    def spend(self, hold: Hold) -> Hold | None:
        return hold

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        return None

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        pass

    def release(self, hold: Hold, why: HoldEnd) -> None:
        pass


async def only_forward(
    world: World,
    operation: Operation,
    head: RequestHead,
    receive: Receive,
    deliver: Deliver,
    on_model: Callable[[str], None],
) -> Outcome:
    """The body is read and not parsed; the node gives one vector, which is not checked."""
    await receive("")
    model = world.catalogue.models[0]
    counted = Counted(lengths=[TOKENS], ids=IDS)
    part = Part(node_id="local", rows=(0,), tokens=TOKENS, expected_s=1.0)
    reply = await world.client.embed(part, model, counted, "req")
    answer = Answer(reply.data, model.width, reply.tokens, (Share("local", TOKENS, 0),))
    delivery = await deliver(render(Call(model=model.id, encoding="base64"), 0, answer, {}))
    return Outcome(model.id, TOKENS, 0, delivery)


class NothingStraight(StraightEmbeddings):
    """Every request goes the way of `serve`."""

    def knows(self, headers: Mapping[str, str]) -> KnownHead | None:
        return None


def signed_link(pool: ConnectionPool, clock: Clock) -> OwnLink:
    """A link under the session of bench.gateway.node."""
    signing = Signing(NODE_ID, "0" * 16, clock, lambda *_: None)
    signing.add(SESSION)
    return OwnLink(pool, clock, signing)


def replace(module: ModuleType, **names: Any) -> None:
    """Other values for what a module has imported."""
    for name, value in names.items():
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, value)


def leave_out(stage: str) -> None:
    """Change the gateway of this process."""
    if stage in (ALONE, SIGNED):
        replace(build, CoalescingLink=lambda link, load: link)
    if stage == SIGNED:
        replace(build, OwnLink=signed_link)
    if stage in ("hold", ALONE, SIGNED):
        return

    def staged(**parts: Any) -> World:
        parts["ledger"] = NoLedger(parts["ledger"])
        if stage != "count":
            parts["tokenizers"] = {name: FixedTokenizer(each) for name, each in parts["tokenizers"].items()}
        return World(**parts)

    replace(build, World=staged)
    if stage == "forward":
        replace(embeddings_api, serve=only_forward, StraightEmbeddings=NothingStraight)


if __name__ == "__main__":
    leave_out(sys.argv[1])
    sys.argv[1:2] = ["gateway"]
    cli()
