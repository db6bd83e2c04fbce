"""An endpoint whose models are run by nodes that speak by a script, one process away from the callers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from bench.faultnode import speech
from bench.rig.speakers import Speaker, speakers
from bench.rig.streams import Caller
from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.holds import Metered
from embedmesh.rules.nodes import TRIAL_ANSWERS
from embedmesh.settings import store_path
from embedmesh.storage.books import Books
from tests.data import model_folder
from tests.story.endpoint import SETTLE_S, Endpoint, run_json, wait_until

CHAT, FRAIL, PAIR, OLD, PAINTER = "acme/chat", "acme/frail", "acme/pair", "acme/old", "acme/painter"
INPUT_PRICE, OUTPUT_PRICE, OUTPUT_MAX = 1, 3, 64  # nano-USD a token; tokens
SMALL, LARGE = "32x16", "64x64"
SMALL_PRICE, LARGE_PRICE = 700_000, 2_000_000
SAID = speech.text(speech.TOKENS)
CHARGED = speech.PROMPT_TOKENS * INPUT_PRICE + speech.TOKENS * OUTPUT_PRICE
"""Of an answer of the usual length, by the node's own usage."""
USAGE = "SELECT cost, meters FROM usage WHERE hold_id = :hold_id"
MENDED_S = 10.0  # a node that was ejected twice comes back after half a second

TALKS = f"""
[[models]]
id = "{{name}}"
modalities = ["chat", "completions"]
max_tokens = 400_000
output_max = {OUTPUT_MAX}
price = {INPUT_PRICE}_000_000
output_price = {OUTPUT_PRICE}_000_000
image_tokens = 100
token_ids = "native"
"""
CATALOGUE = f"""
[[models]]
id = "sentence-transformers/all-MiniLM-L6-v2"
aliases = ["all-MiniLM-L6-v2"]
folder = "{{folder}}"
width = 384
max_tokens = 256
price = 10_000_000
digest = "8b15441b4c169b78dcc3f86d491663fade918ca0772dae0b58d0eba4f681d569"

[[models]]
id = "{PAINTER}"
modalities = ["images"]
max_tokens = 300
price = 0
image_prices = {{{{ "{LARGE}" = {LARGE_PRICE}, "{SMALL}" = {SMALL_PRICE} }}}}
""" + "".join(TALKS.format(name=name) for name in (CHAT, FRAIL, PAIR, OLD))


class Charge(NamedTuple):
    """What one request was charged, by the ledger. Quantities are by meter."""

    cost: int
    meters: dict[str, int]
    estimated: bool


class Generating(NamedTuple):
    """The endpoint and its nodes: one that serves CHAT and PAINTER, one each for FRAIL and OLD, two for PAIR."""

    endpoint: Endpoint
    sole: Speaker
    frail: Speaker
    old: Speaker
    pair: Sequence[Speaker]
    books: Books

    @property
    def address(self) -> tuple[str, int]:
        """Of the gateway."""
        host, _, port = self.endpoint.root.removeprefix("http://").rpartition(":")
        return host, int(port)

    def call(self, body: dict[str, Any], path: str = "chat/completions", key: str = "", **more: Any) -> Caller:
        """A request on a connection of its own."""
        return Caller(self.address, key or self.endpoint.api_key, f"/v1/{path}", body, **more)

    def ask(self, body: dict[str, Any], path: str = "chat/completions", **headers: str) -> httpx.Response:
        """Any reply that is no stream."""
        return self.endpoint.http.post(f"{self.endpoint.base_url}/{path}", json=body, headers=headers)

    def post(self, body: dict[str, Any], path: str = "chat/completions") -> Any:
        """The whole reply, as JSON; it must be a 200."""
        reply = self.ask(body, path)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def mend(self, node: Speaker, model: str, within_s: float = MENDED_S) -> None:
        """Right answers of a node after one that was wrong: else it is ejected, and stays so for longer each time."""
        body, asked = asking(model=model), node.asked

        def answered() -> bool:
            self.ask(body)
            return node.asked >= asked + TRIAL_ANSWERS

        wait_until(f"a node of {model} is well", answered, within_s)

    def charge(self, answer_id: str) -> Charge | None:
        """What an answer was charged, by its id or its request's; None if nothing. Waits until its hold has ended."""
        hold, rows = {"hold_id": answer_id.rpartition("-")[2]}, self.books._db.execute

        def ended() -> bool:
            """Whether it was charged, or its hold has ended otherwise; under a tab there is no hold."""
            held = rows("SELECT state FROM holds WHERE hold_id = :hold_id", hold).fetchall()
            return bool(rows(USAGE, hold).fetchall()) or (bool(held) and held != [("open",)])

        wait_until(f"the hold of {answer_id} has ended", ended, SETTLE_S)
        for cost, meters in rows(USAGE, hold).fetchall():
            found = msgspec.json.decode(meters, type=tuple[Metered, ...])
            counted = {each.meter.value: each.quantity for each in found}
            return Charge(cost, counted, any(each.estimated for each in found))
        return None

    def account(self, account_id: str, nanousd: int) -> str:
        """A new account with so much money, and a key of it."""
        self.books.accounts.create(account_id)
        self.books.accounts.credit(account_id, nanousd, f"story {account_id}")
        _, key = self.books.keys.create(account_id, ("generate",))
        return key


def asking(order: str = "", model: str = CHAT, **more: Any) -> dict[str, Any]:
    """A chat; `order` tells the node how to answer, like `dies at=2`."""
    words = f"Tell me something. <<{order}>>" if order else "Tell me something."
    return {"model": model, "messages": [{"role": "user", "content": words}], **more}


def streaming(order: str = "", model: str = CHAT, **more: Any) -> dict[str, Any]:
    """The same, as a stream."""
    return asking(order, model, stream=True, **more)


def tokens_of(text: str) -> int:
    """Our own count, without a tokenizer."""
    return ceil(len(text.encode()) / 4)


def own_input(body: dict[str, Any]) -> int:
    """Our own count of a chat's input: its texts, and four tokens around each message and the whole."""
    return sum(tokens_of(each["content"]) for each in body["messages"]) + 4 * (1 + len(body["messages"]))


def estimated(body: dict[str, Any], said: str) -> int:
    """What an answer costs by our own count: never more than its limit."""
    output = min(tokens_of(said), int(body.get("max_tokens", OUTPUT_MAX)))
    return own_input(body) * INPUT_PRICE + output * OUTPUT_PRICE


@contextmanager
def generating(folder: Path) -> Iterator[Generating]:
    """All of it. In the end the ledger adds up, no bug was met, and the endpoint stops well."""
    catalogue = folder / "models.toml"
    catalogue.write_text(CATALOGUE.format(folder=model_folder()))
    with speakers(5) as nodes:
        endpoint = Endpoint(folder / "data", "--catalogue", catalogue).wait_ready()
        try:
            serves = ((CHAT, PAINTER), (FRAIL,), (OLD,), (PAIR,), (PAIR,))
            for number, (node, models) in enumerate(zip(nodes, serves, strict=True)):
                options = [word for model in models for word in ("--model", f"{model}=scripted")]
                added = run_json(
                    "nodes", "add", node.url, *options, "--name", f"n{number}", "--data-dir", folder / "data"
                )
                assert added["state"] == "ready", json.dumps(added)
            with open_books(endpoint.data_dir, store_path(endpoint.data_dir)) as books:
                sole, frail, old, *pair = nodes
                yield Generating(endpoint, sole, frail, old, pair, books)
            endpoint.account()
            endpoint.check_ledger()
            assert "embedmesh_internal_errors_total 0.0" in endpoint.get("/metrics", endpoint.admin_key).text
            assert endpoint.stop() == 0
        finally:
            endpoint.kill_all()
