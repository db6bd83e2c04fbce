"""The public API over the real thing: what a caller may rely on, end to end, down to the last nano-USD and bit."""

import base64
import time
from typing import Any

import httpx
import numpy as np
import pytest

from embedmesh.provision.bootstrap import open_books
from embedmesh.settings import store_path
from tests.engine.goldens import read_goldens
from tests.gateway.test_metrics_page import FLEET, GATEWAY, PROCESS, listed
from tests.gateway.test_metrics_page import shown as shown_metrics
from tests.story.endpoint import MODEL, SAME, WIDTH, Endpoint, Vectors

REFERENCE_DIFF_MAX = 1e-5  # the promise against sentence-transformers in fp32
PRICE_NANOUSD = 10  # a token of the default model
SPECIALS = 2  # [CLS] and [SEP] around every text
REVOKED_WITHIN_S = 1.0

TEXT_257 = "goodbye" + " hello" * 254  # each word is one token
FIRST_256 = "goodbye" + " hello" * 253
LAST_256 = "hello" + " hello" * 253


@pytest.fixture(scope="module")
def keys(endpoint: Endpoint) -> dict[str, tuple[str, str]]:
    """Keys of an account without money, and with other scopes: name -> (id, key)."""
    with open_books(endpoint.data_dir, store_path(endpoint.data_dir)) as books:
        books.accounts.create("poor")
        made = {
            "of a poor account": books.keys.create("poor", ("embeddings",)),
            "for metrics only": books.keys.create("local", ("metrics",)),
            "to be revoked": books.keys.create("local", ("embeddings",)),
        }
    return {name: (key.key_id, token) for name, (key, token) in made.items()}


def decoded(reply: httpx.Response) -> Vectors:
    """The vectors of a base64 reply."""
    rows = [np.frombuffer(base64.b64decode(item["embedding"], validate=True), "<f4") for item in reply.json()["data"]]
    return np.array(rows)


def test_vectors_are_the_reference_s(endpoint: Endpoint) -> None:
    """Every third golden, in one request: within 1e-5 of the reference, in order, with the reference's token counts."""
    goldens = read_goldens()
    texts, vectors, tokens = goldens.texts[::3], goldens.vectors[::3], sum(goldens.tokens[::3])
    reply = endpoint.ask(input=texts, encoding_format="base64", truncate="end")
    assert reply.status_code == 200, reply.text
    assert np.abs(decoded(reply) - vectors).max() <= REFERENCE_DIFF_MAX
    assert reply.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [item["index"] for item in reply.json()["data"]] == list(range(len(texts)))
    assert {item["object"] for item in reply.json()["data"]} == {"embedding"}
    assert (reply.json()["object"], reply.json()["model"]) == ("list", MODEL)


def test_float_and_base64_are_equal_to_the_bit(endpoint: Endpoint) -> None:
    """The decimals give back the very float32 that base64 holds, also after `dimensions`."""
    cases: tuple[dict[str, Any], ...] = ({}, {"dimensions": 100})
    for members in cases:
        floats = endpoint.embed("equal to the bit", **members)
        bits = decoded(endpoint.ask(input="equal to the bit", encoding_format="base64", **members))
        assert floats.tobytes() == bits.tobytes()
        assert abs(float(np.linalg.norm(bits.astype(np.float64))) - 1) <= SAME


@pytest.mark.parametrize("tokens", [3, 128, 129, 256])
def test_long_texts_count_to_their_end(endpoint: Endpoint, tokens: int) -> None:
    """Past 128 tokens too, the last word moves the vector, and every token is counted."""
    text = "hello " * (tokens - SPECIALS - 1)
    reply = endpoint.ask(input=text + "goodbye")
    assert reply.json()["usage"]["total_tokens"] == tokens
    moved = np.abs(endpoint.embed(text + "goodbye") - endpoint.embed(text + "hello")).max()
    assert moved > 100 * REFERENCE_DIFF_MAX


def test_one_token_too_many(endpoint: Endpoint) -> None:
    """257 tokens are refused, naming the input; `truncate` keeps the end or the start, and says how many it cut."""
    refused = endpoint.ask(input=["short", TEXT_257])
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["param"] == "input.1"
    assert "257" in refused.json()["error"]["message"]

    kept = endpoint.embed([FIRST_256, LAST_256])
    cuts: tuple[tuple[dict[str, Any], int], ...] = (
        ({"truncate": "end"}, 0),
        ({"truncate": "END"}, 0),
        ({"truncation": True}, 0),
        ({"truncate": "start"}, 1),
    )
    for members, which in cuts:
        reply = endpoint.ask(input=["short", TEXT_257], **members)
        assert reply.headers["x-embedmesh-truncated"] == "1"
        assert np.abs(np.array(reply.json()["data"][1]["embedding"]) - kept[which]).max() <= SAME
    refusals: tuple[dict[str, Any], ...] = ({"truncate": "none"}, {"truncation": False}, {"truncate": None})
    for members in refusals:
        assert endpoint.ask(input=TEXT_257, **members).status_code == 400


def test_token_ids(endpoint: Endpoint) -> None:
    """Ids of cl100k are the text that they spell; special ones and unknown ones are refused by place."""
    hello, halves = [15339, 1917], [15339, 1917, 0]  # "hello world", "hello world!"
    vectors = endpoint.embed(["hello world", "hello world!"])
    reply = endpoint.ask(input=[hello, halves])
    assert np.abs(np.array([item["embedding"] for item in reply.json()["data"]]) - vectors).max() <= SAME
    assert reply.json()["usage"]["total_tokens"] == 4 + 5
    for ids, param in (([100257], "input"), ([100256], "input"), ([[15339], [2**40]], "input.1"), ([-1], "input.0")):
        refused = endpoint.ask(input=ids)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
        assert refused.json()["error"]["param"] == param


@pytest.mark.parametrize("role", ["query", "document", "search_query", "search_document", "passage", None])
def test_input_type(endpoint: Endpoint, role: str | None) -> None:
    """Every spelling of a role is taken; this model has no prompts, so none moves a vector or costs a token."""
    reply = endpoint.ask(input="which role?", input_type=role)
    assert np.abs(np.array(reply.json()["data"][0]["embedding"]) - endpoint.embed("which role?")).max() <= SAME
    refused = endpoint.ask(input="which role?", input_type="poem")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_type")


@pytest.mark.parametrize("texts", [["a"], ["what does", "this cost?"], ["word " * 254]])
def test_what_is_charged(endpoint: Endpoint, texts: list[str]) -> None:
    """The ledger charges just what the header says, which is the tokens of `usage` at the model's price."""
    before = endpoint.account().balance_nanousd
    reply = endpoint.ask(input=texts)
    cost = int(reply.headers["x-embedmesh-cost-nanousd"])
    assert cost == reply.json()["usage"]["total_tokens"] * PRICE_NANOUSD
    assert before - endpoint.account().balance_nanousd == cost


def test_refusals_cost_nothing(endpoint: Endpoint, keys: dict[str, tuple[str, str]]) -> None:
    """Nobody pays for a request that was refused, for whatever reason."""
    before = endpoint.account().balance_nanousd
    for members in ({"input": ""}, {"input": TEXT_257}, {"input": "x", "dimensions": 0}, {"input": "x", "what": 1}):
        assert endpoint.ask(**members).status_code == 400
    assert endpoint.ask(input="x", model="nobody/nothing").status_code == 404
    assert endpoint.account().balance_nanousd == before


def test_without_money(endpoint: Endpoint, keys: dict[str, tuple[str, str]]) -> None:
    """An account that cannot pay gets 429 `insufficient_quota`, which says that trying again is useless; not a debt."""
    _, poor = keys["of a poor account"]
    refused = endpoint.ask(input="x", headers={"Authorization": f"Bearer {poor}"})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == refused.json()["error"]["type"] == "insufficient_quota"
    assert refused.headers["x-should-retry"] == "false"
    assert endpoint.account("poor").balance_nanousd == 0

    with open_books(
        endpoint.data_dir, store_path(endpoint.data_dir)
    ) as books:  # enough for three tokens, [CLS] x [SEP], and not for four
        books.accounts.credit("poor", 3 * PRICE_NANOUSD, "story")
    statuses = [
        endpoint.ask(input=text, headers={"Authorization": f"Bearer {poor}"}).status_code for text in ("x x", "x", "x")
    ]
    assert statuses == [429, 200, 429]
    assert endpoint.account("poor").balance_nanousd == 0


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        (None, 401, "invalid_api_key"),
        ("em_wrong", 401, "invalid_api_key"),
        ("for metrics only", 403, "insufficient_scope"),
    ],
)
def test_without_the_right_key(
    endpoint: Endpoint, keys: dict[str, tuple[str, str]], key: str | None, status: int, code: str
) -> None:
    """No key, a wrong one, and one that may do something else: refused before the body is looked at."""
    token = keys[key][1] if key in keys else key
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    reply = httpx.post(f"{endpoint.base_url}/embeddings", content=b"not JSON", headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.headers["x-request-id"]
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_revoked_key(endpoint: Endpoint, keys: dict[str, tuple[str, str]]) -> None:
    """A key that is revoked while it is in use opens nothing a second later."""
    key_id, token = keys["to be revoked"]
    headers = {"Authorization": f"Bearer {token}"}
    assert endpoint.ask(input="x", headers=headers).status_code == 200
    with open_books(endpoint.data_dir, store_path(endpoint.data_dir)) as books:
        assert books.keys.revoke(key_id)
    time.sleep(REVOKED_WITHIN_S)
    assert endpoint.ask(input="x", headers=headers).status_code == 401


def test_metrics_need_a_key(endpoint: Endpoint, keys: dict[str, tuple[str, str]]) -> None:
    """The admin key and one with the scope see numbers; no key is 401, another key is 403. No number names a caller."""
    assert endpoint.get("/metrics").status_code == 401
    assert endpoint.get("/metrics", endpoint.api_key).status_code == 403
    for key in (endpoint.admin_key, keys["for metrics only"][1]):
        shown = endpoint.get("/metrics", key)
        assert shown.status_code == 200
        assert shown.headers["content-type"].startswith("text/plain; version=0.0.4")
    with_tls = {("embedmesh_certificate_expires_timestamp_seconds", "gauge")}
    assert shown_metrics(shown.text) == listed(GATEWAY, FLEET, PROCESS) - with_tls
    tokens = endpoint.metric(f'embedmesh_tokens_total{{model="{MODEL}"}}')
    endpoint.embed("counted")
    assert endpoint.metric(f'embedmesh_tokens_total{{model="{MODEL}"}}') == tokens + 3
    without_nodes = "\n".join(line for line in shown.text.splitlines() if 'node="local"' not in line)
    assert "local" not in without_nodes, "the account's name"


def test_what_needs_no_key(endpoint: Endpoint) -> None:
    """Health, readiness and the documents of the API."""
    assert endpoint.get("/health").json() == {"message": "ok"}
    ready = endpoint.get("/readyz").json()
    assert ready.keys() == {"ready", "reasons"}
    assert ready["ready"] is True
    assert [reason for reason in ready["reasons"] if "starved" not in reason] == []  # it may be, on a busy machine
    assert endpoint.get("/openapi.json").json()["openapi"].startswith("3.1")
    assert endpoint.get("/docs").headers["content-type"] == "text/html; charset=utf-8"
    sent = endpoint.get("/")
    assert (sent.status_code, sent.headers["location"]) == (302, "/docs")
    for path in ("/health", "/readyz", "/docs", "/"):
        head = httpx.head(endpoint.root + path)
        assert (head.status_code, head.content) == (endpoint.get(path).status_code, b""), path
    for path in ("/v1", "/v1/admin", "/v2/embeddings"):
        assert endpoint.get(path).json()["error"]["code"] == "not_found"
    wrong = endpoint.get("/v1/embeddings")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_models_tell_what_they_are(endpoint: Endpoint) -> None:
    """Beyond OpenAI's members: width, limits, price and how many nodes serve it; `/` and `%2F` are the same."""
    for name in (MODEL, MODEL.replace("/", "%2F"), "all-MiniLM-L6-v2", MODEL + ":exact"):
        model = endpoint.get(f"/v1/models/{name}", endpoint.api_key).json()
        assert (model["id"], model["object"], model["width"], model["max_tokens"]) == (MODEL, "model", WIDTH, 256)
        assert (model["price_nanousd_per_million_tokens"], model["nodes"]) == (10_000_000, 1)
    assert endpoint.get(f"/v1/models/{MODEL}:fast", endpoint.api_key).status_code == 404


def test_neither_texts_nor_keys_are_written_down(endpoint: Endpoint) -> None:
    """What was embedded, for whom, and with which key is in no file of the server: not in its log, not in its store."""
    secret, user = "A secret of grandmother Wilhelmine", "user-4711-wilhelmine"
    endpoint.embed(secret, user=user)
    assert endpoint.ask(input=["Wilhelmine " * 300]).status_code == 400
    assert endpoint.ask(input="x", nosuch="Wilhelmine").status_code == 400
    endpoint.account()
    files = [path for path in endpoint.data_dir.rglob("*") if path.is_file() and path.name != "bootstrap.json"]
    assert len(files) >= 4
    for file in (*files, endpoint.log, endpoint.said):
        content = file.read_bytes()
        assert b"ilhelmine" not in content, file.name
        assert endpoint.api_key.encode() not in content, file.name
        assert endpoint.admin_key.encode() not in content, file.name
