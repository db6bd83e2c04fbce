"""The three fields of `atoma-sdk`: its real client moves an admitted node, and nobody else."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from atoma_sdk import AtomaSDK
from atoma_sdk.models import APIError

from embedmesh.rules.nodes import Check
from embedmesh.signing import atoma
from embedmesh.signing.identity import Identity
from tests.gateway.mesh import Applicant, Gateway, relay_to, says, somebody, until
from tests.http.raw import request, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRANGER = Identity(bytes(32))


@pytest.fixture(scope="module")
def sdk(gw: Gateway) -> Iterator[AtomaSDK]:
    """Unmodified. A node has no key of a caller, and the client wants one."""
    with AtomaSDK(bearer_auth="none", server_url=gw.url) as made:
        yield made


async def create(sdk: AtomaSDK, one: Applicant, *, signer: Identity | None = None, **changes: Any) -> str:
    """What the client makes of the gateway's answer to a node's word about itself."""
    data = {"node_small_id": one.welcome.small_id, "public_address": one.address, "country": "DE"} | changes
    signature = atoma.sign(signer or one.identity, data)
    return (await sdk.nodes.nodes_create_async(data=data, signature=signature)).message  # type: ignore[arg-type]


async def test_whatever_is_not_an_admitted_nodes_word_about_itself_is_refused(
    gw: Gateway, applicant: Applicant, sdk: AtomaSDK
) -> None:
    """A foreign key, another small id, an address where nobody is, a removed node; nothing changes."""
    async with applicant.member() as node:
        refused: list[tuple[dict[str, Any], int]] = [
            ({"signer": STRANGER}, 403),
            ({"node_small_id": applicant.welcome.small_id + 1}, 403),
            ({"public_address": "https://127.0.0.1:1"}, 400),
            ({"public_address": "https://10.0.0.1"}, 400),
            ({"public_address": "https://127.0.0.1:1/path"}, 400),
            ({"public_address": "unix:/run/node.sock"}, 400),
            ({}, 403),
        ]
        for changes, status in refused:
            if not changes:
                await gw.act(applicant.node_id, "remove")
            before = gw.roster.record(applicant.node_id)
            with pytest.raises(APIError) as error:
                await create(sdk, applicant, **changes)
            assert error.value.status_code == status, changes
            assert json.loads(error.value.body)["error"]["message"]
            assert gw.roster.record(applicant.node_id) == before
            assert gw.node(applicant.node_id) is (node if changes else None)


@pytest.mark.parametrize("wrong", ["other data", "junk", "more fields"])
async def test_it_must_be_signed(gw: Gateway, applicant: Applicant, wrong: str) -> None:
    await applicant.join(await gw.invite())
    data: dict[str, Any] = {"node_small_id": 1, "public_address": "https://node.example", "country": "FR"}
    signature = atoma.sign(applicant.identity, data)
    body = {
        "other data": {"data": data | {"country": "DE"}, "signature": signature},
        "junk": {"data": data, "signature": "junk"},
        "more fields": {"data": data | {"more": 1}, "signature": signature},
    }[wrong]
    reply = await send(gw.port, request("POST", "/v1/nodes", json.dumps(body).encode(), key=None))
    says(reply, 400, "This is no registration")


async def test_a_node_moves(gw: Gateway, applicant: Applicant, sdk: AtomaSDK) -> None:
    """To a new address, with the certificate and the session that it has: the form has nothing to agree new ones."""
    async with applicant.member() as before, applicant.listening() as address:
        applicant.door.new_session(applicant.sessions.of_gateway)
        assert str(applicant.welcome.small_id) in await create(sdk, applicant, country="FR")
        node = await gw.until_ready(applicant.node_id)
        assert (node is before, node.address) == (False, address)
        asked = len(applicant.engine.asked)
        await gw.answers_rightly(applicant.node_id)
        assert len(applicant.engine.asked) > asked
        record = gw.roster.record(applicant.node_id)
        assert (record.address, record.country, record.trusted) == (address, "FR", False)


async def test_a_country_that_is_no_code_is_not_guessed(gw: Gateway, applicant: Applicant, sdk: AtomaSDK) -> None:
    """The first two letters of Germany are Georgia's."""
    async with applicant.member():
        for country, kept in (("Germany", "DE"), ("", "DE"), ("\U0001f1eb\U0001f1f7", "DE"), ("fr", "FR")):
            await create(sdk, applicant, country=country)
            assert gw.roster.record(applicant.node_id).country == kept


async def test_said_again_it_changes_nothing(gw: Gateway, applicant: Applicant, sdk: AtomaSDK) -> None:
    """It has no nonce, so whoever saw it can say it again: a node that is there must not lose its place by that."""
    async with applicant.member() as node:
        for _ in range(3):
            await create(sdk, applicant)
            assert gw.node(applicant.node_id) is node
            await gw.answers_rightly(applicant.node_id)


async def test_nothing_looks_like_a_replay_to_a_node_that_moved(
    gw: Gateway, applicant: Applicant, sdk: AtomaSDK
) -> None:
    """The same process with the same session at another address: nonces must go on where they were."""
    async with applicant.member():
        for _ in range(5):
            await gw.answers_rightly(applicant.node_id)
        async with somebody(relay_to(applicant.address)) as port:
            applicant.believe(f"https://127.0.0.1:{port}")
            await create(sdk, applicant)
            await gw.answers_rightly(applicant.node_id)
            node = gw.node(applicant.node_id)
            assert node is not None
            await until("it is probed", lambda: node.last_right_answer)
            assert not node.failed.keys() & {Check.ACCESS, Check.STATUS_4XX, Check.SIGNATURE}
