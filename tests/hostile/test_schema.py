"""Two documents against the running endpoint: our own OpenAPI, and the facts of the API that we were created from.

`reference_schema.json` restates those facts, so that this runs anywhere; where the original is at hand, the two must
agree. Every request that it allows is accepted, but for the exceptions that the contract names (EXCEPTIONS).
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bench.rig.http import MODEL, http_request
from bench.rig.live import Live
from embedmesh.rules.limits import REQUEST_INPUTS_MAX, USER_CHARS_MAX
from tests.data import THOROUGH, outside_data, quick_or

pytestmark = [pytest.mark.model, pytest.mark.story]

Json = dict[str, Any]

OWN_EXAMPLES = quick_or(150, quick=15)  # requests for each operation and mode; a few seconds
FLEET_EXAMPLES = quick_or(40, quick=4)  # for those that callers do not use
ACCEPTED_EXAMPLES = quick_or(150, quick=40)  # requests that the document allows
REFERENCE_EXAMPLES = quick_or(200, quick=40)
WIDTH, MAX_TOKENS = 384, 256
TEXT_CHARS_MAX = 120  # surely fewer tokens than the model takes, whatever the characters
TOKEN_ID_MAX = 1_000  # single characters and short words of cl100k
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    allow_header_conformance,
]
OPERATIONS = [
    ("/v1/embeddings", "POST"),
    ("/v1/rerank", "POST"),
    ("/v2/rerank", "POST"),
    ("/rerank", "POST"),
    ("/tei/{id}/rerank", "POST"),
    ("/api/embed", "POST"),
    ("/api/embeddings", "POST"),
    ("/api/tags", "GET"),
    ("/api/show", "POST"),
    ("/api/version", "GET"),
    ("/v2/embed", "POST"),
    ("/v1/embed", "POST"),
    ("/embed", "POST"),
    ("/", "POST"),
    ("/tei/{id}/embed", "POST"),
    ("/info", "GET"),
    ("/tei/{id}/info", "GET"),
    ("/embed_all", "POST"),
    ("/v1beta/models/{id}:embedContent", "POST"),
    ("/v1beta/models/{id}:batchEmbedContents", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/images/generations", "POST"),
    ("/v1/nodes/lock", "POST"),
    ("/v1/confidential/embeddings", "POST"),
    ("/v1/confidential/chat/completions", "POST"),
    ("/v1/confidential/completions", "POST"),
    ("/v1/confidential/images/generations", "POST"),
    ("/v1/files", "POST"),
    ("/v1/files", "GET"),
    ("/v1/files/{file_id}", "GET"),
    ("/v1/files/{file_id}", "DELETE"),
    ("/v1/files/{file_id}/content", "GET"),
    ("/v1/batches", "POST"),
    ("/v1/batches", "GET"),
    ("/v1/batches/{batch_id}", "GET"),
    ("/v1/batches/{batch_id}/cancel", "POST"),
    ("/v1/jobs", "POST"),
    ("/v1/jobs", "GET"),
    ("/v1/jobs/{job_id}", "GET"),
    ("/v1/jobs/{job_id}/cancel", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{id}", "GET"),
    ("/health", "GET"),
    ("/readyz", "GET"),
    ("/metrics", "GET"),
    ("/openapi.json", "GET"),
    ("/docs", "GET"),
    ("/", "GET"),
    ("/v1/nodes", "GET"),
    ("/v1/nodes", "POST"),
    ("/v1/nodes/{node_id}/heartbeat", "POST"),
    ("/v1/nodes/{node_id}/drain", "POST"),
    ("/v1/nodes/{node_id}/dial", "GET"),
    ("/v1/admin/reload", "POST"),
    ("/v1/admin/nodes", "GET"),
    ("/v1/admin/nodes", "POST"),
    ("/v1/admin/nodes/{node_id}", "GET"),
    ("/v1/admin/nodes/{node_id}/{action}", "POST"),
    ("/v1/admin/invites", "GET"),
    ("/v1/admin/invites", "POST"),
    ("/v1/admin/invites/{invite_id}", "DELETE"),
    ("/v1/account", "GET"),
    ("/v1/account/usage", "GET"),
    ("/v1/account/entries", "GET"),
    ("/v1/account/entries/{entry_id}/requests", "GET"),
    ("/v1/account/keys", "GET"),
    ("/v1/account/keys", "POST"),
    ("/v1/account/keys/{key_id}", "DELETE"),
    ("/v1/admin/accounts", "GET"),
    ("/v1/admin/accounts", "POST"),
    ("/v1/admin/accounts/{account_id}", "GET"),
    ("/v1/admin/accounts/{account_id}/statement", "GET"),
    ("/v1/admin/accounts/{account_id}", "POST"),
    ("/v1/admin/accounts/{account_id}/credits", "POST"),
    ("/v1/admin/keys", "GET"),
    ("/v1/admin/keys", "POST"),
    ("/v1/admin/keys/{key_id}", "GET"),
    ("/v1/admin/keys/{key_id}", "POST"),
    ("/v1/admin/keys/{key_id}", "DELETE"),
    ("/v1/admin/keys/{key_id}/rotate", "POST"),
    ("/v1/admin/prices", "GET"),
    ("/v1/admin/prices", "POST"),
    ("/v1/admin/prices", "DELETE"),
    ("/v1/admin/requests/{request_id}", "GET"),
    ("/v1/admin/requests/{request_id}/refund", "POST"),
    ("/v1/admin/tabs/{tab_id}", "GET"),
    ("/v1/admin/payables", "GET"),
    ("/v1/admin/payouts", "POST"),
    ("/v1/admin/ledger", "GET"),
    ("/v1/admin/audit", "GET"),
]
REFERENCE: Json = json.loads(Path(__file__).with_name("reference_schema.json").read_bytes())["$defs"]
ORIGINAL = "../reference/create_embeddings_openapi.yaml"
SAYS_NOTHING = {"description", "example", "format"}  # of a schema's members, those that allow and forbid nothing

some: Json = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [*HealthCheck]}


# -- our own document ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(live: Live) -> BaseSchema:
    with live.wire() as wire:
        return schemathesis.openapi.from_dict(wire.ask(http_request("GET", "/openapi.json")).json())


def test_every_operation_is_tried(own: BaseSchema) -> None:
    documented = {(path, method.upper()) for path, methods in own.raw_schema["paths"].items() for method in methods}
    assert documented == set(OPERATIONS)


RIGHT = [(path, method, GenerationMode.POSITIVE) for path, method in OPERATIONS]
WRONG = [(path, method, GenerationMode.NEGATIVE) for path, method in OPERATIONS if method == "POST" or "{" in path]


# Without a key it is refused whatever it is: wrong ones of these are tried by `make thorough` only.
WITH_KEY = [(*tried, "admin") for tried in (*RIGHT, *WRONG)]
WITHOUT_KEY = [(*tried, "none") for tried in (*RIGHT, *(WRONG if THOROUGH else ()))]


@pytest.mark.parametrize(("path", "method", "mode", "key"), [*WITH_KEY, *WITHOUT_KEY])
def test_replies_are_as_documented(
    live: Live, own: BaseSchema, path: str, method: str, mode: GenerationMode, key: str
) -> None:
    """Whatever is sent, the answer's status, type, headers and body are among those that the document lists."""
    operation = own[path][method]
    headers = {"Authorization": f"Bearer {live.credentials.admin_key}"} if key == "admin" else {}
    root = live.base_url.removesuffix("/v1")
    varied = key == "admin" and (method == "POST" or "{" in path)
    examples = FLEET_EXAMPLES if path.startswith(("/v1/nodes", "/v1/admin", "/v1/account")) else OWN_EXAMPLES

    @settings(max_examples=examples if varied else 1, **some)
    @given(data=st.data())
    def try_it(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.call_and_validate(base_url=root, headers=headers, checks=CHECKS)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tool's own
        try_it()


def test_what_the_document_allows_is_accepted(live: Live, own: BaseSchema) -> None:
    """For a served model and inputs that it has room for; its replies are as documented, base64 and floats alike."""
    document = copy.deepcopy(own.raw_schema)
    del document["paths"]["/v1/embeddings"]["post"]["parameters"]  # one Idempotency-Key for two bodies is refused
    members = document["components"]["schemas"]["EmbeddingRequest"]["properties"]
    members["model"]["const"] = MODEL
    members["dimensions"]["maximum"] = members["output_dimension"]["maximum"] = WIDTH
    members["truncate_prompt_tokens"]["maximum"] = MAX_TOKENS
    text, texts, ids, many_ids = members["input"]["oneOf"]
    text["maxLength"] = texts["items"]["maxLength"] = ids["maxItems"] = TEXT_CHARS_MAX
    many_ids["items"]["maxItems"] = TEXT_CHARS_MAX
    ids["items"]["maximum"] = many_ids["items"]["items"]["maximum"] = TOKEN_ID_MAX
    operation = schemathesis.openapi.from_dict(document)["/v1/embeddings"]["POST"]
    headers = {"Authorization": f"Bearer {live.api_key}"}
    statuses: list[int] = []

    @settings(max_examples=ACCEPTED_EXAMPLES, **some)
    @given(data=st.data())
    def accepted(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        reply = case.call_and_validate(base_url=live.base_url.removesuffix("/v1"), headers=headers, checks=CHECKS)
        statuses.append(reply.status_code)
        if reply.status_code != 200:
            assert isinstance(case.body, dict) and refused_knowingly(case.body), (case.body, reply.text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accepted()
    assert statuses.count(200) > len(statuses) / 10  # most others have a 1.0, or members that contradict each other


SAME = [  # members that may contradict each other, or the model
    {"truncate", "truncation", "truncate_prompt_tokens"},
    {"dimensions", "output_dimension"},
    {"input_type", "task", "prompt_name"},
    {"normalize", "normalized"},
]


def refused_knowingly(asked: Json) -> bool:
    """What a schema cannot say: 1.0 is no integer to us, two members may contradict each other, and one the model."""
    given = {name for name, value in asked.items() if value is not None}
    flat = [asked.get(name) for name in ("dimensions", "output_dimension", "truncate_prompt_tokens")]
    of_the_model = "prompt_name" in given or asked.get("normalize") is False or asked.get("normalized") is False
    small = asked.get("truncate_prompt_tokens")
    if of_the_model or any(len(given & same) > 1 for same in SAME) or small in (1, 2):
        return True
    for one in asked["input"] if isinstance(asked["input"], list) else []:
        flat += one if isinstance(one, list) else [one]
    return any(isinstance(each, float) for each in flat)


# -- the API that we were created from -------------------------------------------------------------------------------

EXCEPTIONS: dict[str, Json] = {
    "model": {"type": "string", "const": MODEL},
    "input": {
        "oneOf": [
            {"type": "string", "minLength": 1, "maxLength": TEXT_CHARS_MAX},
            {
                "type": "array",
                "minItems": 1,
                "maxItems": REQUEST_INPUTS_MAX,
                "items": {"type": "string", "minLength": 1, "maxLength": TEXT_CHARS_MAX},
            },
        ]
    },
    "encoding_format": {"type": ["string", "null"], "enum": ["float", None]},  # its reply knows no base64
    "dimensions": {"type": ["integer", "null"], "minimum": 1, "maximum": WIDTH},
    "user": {"type": ["string", "null"], "maxLength": USER_CHARS_MAX},
}


def narrowed(request: Json) -> Json:
    """The request's schema without what the contract refuses knowingly: members that it does not name among it."""
    schema = copy.deepcopy(request)
    assert schema["properties"].keys() == EXCEPTIONS.keys()
    schema["properties"] = EXCEPTIONS
    schema["additionalProperties"] = False
    return schema


def test_every_request_that_the_reference_allows_is_accepted(live: Live) -> None:
    """And every reply of floats validates against it."""
    response = Draft202012Validator(REFERENCE["response"])
    allowed = Draft202012Validator(REFERENCE["request"])
    body = {"required": True, "content": {"application/json": {"schema": narrowed(REFERENCE["request"])}}}
    paths = {"/v1/embeddings": {"post": {"requestBody": body, "responses": {"200": {"description": "ok"}}}}}
    document = {"openapi": "3.1.0", "info": {"title": "reference", "version": "1"}, "paths": paths}
    operation = schemathesis.openapi.from_dict(document)["/v1/embeddings"]["POST"]
    members: set[str] = set()

    @settings(max_examples=REFERENCE_EXAMPLES, **some)
    @given(data=st.data())
    def accepted(data: st.DataObject) -> None:
        asked: Any = data.draw(operation.as_strategy(generation_mode=GenerationMode.POSITIVE)).body
        allowed.validate(asked)  # else the narrowing would be a widening
        members.update(name for name, value in asked.items() if value is not None)
        reply = wire.ask(live.embed(asked))
        if isinstance(asked.get("dimensions"), float):  # an integer to JSON Schema; the contract refuses floats
            assert (reply.status, reply.code) == (400, "invalid_type")
            return
        assert reply.status == 200, (asked, reply.body)
        response.validate(reply.json())
        assert len(reply.json()["data"]) == (1 if isinstance(asked["input"], str) else len(asked["input"]))

    with live.wire() as wire:
        accepted()
    assert members == set(EXCEPTIONS)


def test_the_restatement_agrees_with_the_original() -> None:
    original = yaml.safe_load(outside_data(ORIGINAL).read_bytes())["components"]["schemas"]
    assert bare(original, original["CreateEmbeddingRequest"]) == REFERENCE["request"]
    assert bare(original, original["CreateEmbeddingResponse"]) == REFERENCE["response"]


def bare(schemas: Json, node: Any, *, names: bool = False) -> Any:
    """A schema with its references resolved, and without what says nothing. `names`: the keys are members' names."""
    if isinstance(node, list):
        return [bare(schemas, each) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node and not names:
        return bare(schemas, schemas[node["$ref"].rpartition("/")[2]])
    return {
        name: bare(schemas, value, names=name == "properties")
        for name, value in node.items()
        if names or name not in SAYS_NOTHING
    }
