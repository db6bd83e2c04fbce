"""The documentation page loads nothing from anywhere, runs nothing but its own script, and shows the whole API."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import pytest

from embedmesh import __version__
from embedmesh.dialects.openai.fields import FIELDS
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.openapi import document
from embedmesh.gateway.api.pages import SCRIPTS, docs_page
from embedmesh.gateway.api.pages.samples import CHAT_SAMPLES, ORIGIN, SAMPLES
from embedmesh.gateway.api.rerank_api import RERANK_SAMPLES
from embedmesh.http.failures import TABLE
from embedmesh.http.receive import BodyBudget
from tests.flow.world import make_world
from tests.http.raw import request, send, serving


class Page(HTMLParser):
    """What a browser would see: every tag with its attributes, and the text inside of script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in self.inside and data.strip():
            self.inside[self.tags[-1][0]].append(data)

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


HTML, POLICY = docs_page()
PAGE = Page(HTML.decode())
SCRIPT, STYLE = "".join(PAGE.inside["script"][:1]), "".join(PAGE.inside["style"][:1])


# -- nothing from outside, nothing untrusted ---------------------------------------------------------------------------


def test_the_policy_allows_this_script_and_this_style_and_nothing_else() -> None:
    def named(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    assert [tag for tag, _ in PAGE.tags if tag in ("script", "style")] == ["style", "script"]
    assert (
        f"default-src 'none'; script-src {named(SCRIPT)}; style-src {named(STYLE)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ) == POLICY


async def test_the_gateway_serves_it_with_that_policy() -> None:
    world = make_world()
    app = GatewayApp(world, world.fleet.registry, in_flight_max=1, bodies=BodyBudget(1), gauges=dict)
    async with serving(app.server) as port:
        reply = await send(port, request("GET", "/docs", key=None))
    assert (reply.status, reply.body) == (200, HTML)
    assert reply.headers["content-security-policy"] == POLICY
    assert reply.headers["content-type"] == "text/html; charset=utf-8"


def test_nothing_is_loaded_from_elsewhere() -> None:
    """The only address in the page is the one in the samples, which the page's own takes the place of."""
    addresses = re.findall(r"(?:https?:|wss?:|[\"'(=]\s*)//[^\s\"']*", HTML.decode())
    assert addresses == [ORIGIN]
    assert f'const SAMPLE_ORIGIN = "{ORIGIN}";' in SCRIPT
    for target in PAGE.all("href") + PAGE.all("src"):
        assert target.startswith(("#", "data:image/png;base64,")) or target == "openapi.json"
    assert "url(" not in STYLE
    assert "@import" not in STYLE


def test_there_are_no_inline_handlers_or_styles_that_the_policy_would_block() -> None:
    for tag, attributes in PAGE.tags:
        assert [name for name in attributes if name.startswith("on") or name == "style"] == [], tag
        assert not any(value.strip().lower().startswith("javascript:") for value in attributes.values())


@pytest.mark.parametrize(
    "word",
    ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser", "srcdoc"],
)
def test_no_text_can_become_markup_or_code(word: str) -> None:
    assert word not in SCRIPT


@pytest.mark.parametrize("place", ["localStorage", "sessionStorage", "indexedDB", "cookie", "caches", "history."])
def test_the_key_is_kept_nowhere(place: str) -> None:
    assert place not in SCRIPT


# -- everybody can use it ----------------------------------------------------------------------------------------------


def test_every_field_has_a_label_and_every_reference_a_target() -> None:
    ids = PAGE.all("id")
    assert len(ids) == len(set(ids))
    for tag, attributes in PAGE.tags:
        if tag in ("input", "select", "textarea"):
            assert attributes["id"] in PAGE.all("for")
    anchors = [href[1:] for href in PAGE.all("href") if href.startswith("#")]
    named = " ".join(anchors + [v for a in ("for", "list", "aria-describedby", "aria-labelledby") for v in PAGE.all(a)])
    assert set(named.split()) <= set(ids)
    assert set(re.findall(r'byId\("([a-z-]+)"\)', SCRIPT)) <= set(ids)


# -- what it shows, by its own script ----------------------------------------------------------------------------------

BROWSER = """
class Node {
  constructor(tag) { Object.assign(this, { tag, attributes: {}, children: [], style: { setProperty() {} } }); }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  append(...children) { this.children.push(...children.map((child) => this.adopt(child))); }
  prepend(...children) { this.children.unshift(...children); }
  replaceChildren(...children) { this.children = []; this.append(...children); }
  adopt(child) { if (typeof child !== "string") child.parentNode = this; return child; }
  remove() { this.parentNode.children = this.parentNode.children.filter((child) => child !== this); }
  get classList() { return { add: (name) => (this.attributes.class += ` ${name}`) }; }
  after() {} addEventListener() {} scrollIntoView() {} focus() {}
  set textContent(text) { this.children = [text]; }
  get textContent() { return this.children.map((c) => (typeof c === "string" ? c : c.textContent)).join(""); } }
const elements = {};
globalThis.location = { href: "https://mesh.example/embed/docs", hash: "" };
globalThis.document = {
  createElement: (tag) => new Node(tag),
  getElementById: (id) => (elements[id] ??= new Node(id)),
};
"""
"""As much of a browser as drawing needs: nodes that keep what they are given."""


def run_script(code: str, given: object) -> Any:
    """What `code` returns in Node after the page's script, all but its start, with `given` in scope."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed; the page's script is only tested where it is")
    start = SCRIPT.index("// The page's life")
    program = f"{BROWSER}\n{SCRIPT[:start]}\nconst given = {json.dumps(given)};\n"
    program += f"(async () => {{ {code} }})().then((made) => console.log(JSON.stringify(made)));"
    ran = subprocess.run([node, "-"], input=program, capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_start_of_the_script_comes_last() -> None:
    """`run_script` cuts there."""
    assert SCRIPTS[-1] == "docs.js"
    assert SCRIPT.count("// The page's life") == 1


def test_every_route_member_header_and_error_is_drawn() -> None:
    api = document(__version__)
    drawn = run_script(
        "for (const draw of [drawSamples, drawRoutes, drawMembers, drawReply, drawErrors]) draw(given);"
        "return Object.fromEntries(Object.entries(elements).map(([id, node]) => [id, node.textContent]));",
        api,
    )
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            summary = operation["summary"].replace("`", "")
            assert f"{method.upper()}{path}{summary}" in drawn["route-list"]
    for name, member in FIELDS.items():
        assert name in drawn["member-list"]
        assert member.schema["description"].replace("`", "") in drawn["member-list"]
    for failure, (status, kind) in TABLE.items():
        assert f"{status}{failure.code}{kind}" in drawn["error-list"]
    for name in api["paths"]["/v1/embeddings"]["post"]["responses"]["200"]["headers"]:
        assert name in drawn["header-list"]
    for schema in ("ChatRequest", "CompletionRequest", "ImageRequest"):
        for name, member in api["components"]["schemas"][schema]["properties"].items():
            assert name in drawn["route-list"]
            assert member["description"].replace("`", "") in drawn["route-list"]
    for sample in (*SAMPLES, *RERANK_SAMPLES, *CHAT_SAMPLES):
        assert sample["source"].strip().replace(ORIGIN, "https://mesh.example/embed") in drawn["samples"]
    assert "undefined" not in "".join(drawn.values())


def test_routes_of_nodes_and_operators_stand_aside_behind_those_of_callers() -> None:
    """Who makes an application sees its own routes first, and of the others two lines that open."""
    api = document(__version__)
    groups, asides, body = run_script(
        "drawRoutes(given);"
        "const groups = elements['route-list'].children;"
        "const asides = groups.filter((node) => node.attributes.class === 'aside');"
        "const named = (node) => node.children[0].textContent;"
        "return [groups.map((node) => node.tag), asides.map(named), asides[0].textContent];",
        api,
    )
    inside = [tag["name"] for tag in api["tags"] if "x-embedmesh-aside" in tag]
    assert [name.startswith(tag) for name, tag in zip(asides, inside, strict=True)] == [True] * 2
    assert groups[-2:] == ["details", "details"]
    assert groups[0] == "h3"
    for member in ("statement", "tokens_waiting", "signed by the node"):
        assert member in body


STREAMED = {"model": "m", "stream": True, "stream_options": {"include_usage": True}}
MODEL = {
    "width": 384,
    "max_tokens": 8_192,
    "price_nanousd_per_million_tokens": 50_000_000,
    "output_price_nanousd_per_million_tokens": 80_000_000,
    "image_prices_nanousd": {},
}
RERANKER = MODEL | {"modalities": ["rerank"], "width": 1, "search_price_nanousd": None}
PAINTER = MODEL | {"modalities": ["images"], "image_prices_nanousd": {"64x64": 2_000_000}}


@pytest.mark.parametrize(
    "code, given, expected",
    [
        ("return textsOf(given)", "a\r\n\n  \n b \nc", ["a", " b ", "c"]),
        (
            "return requestBody(given)",
            {"model": "m", "texts": ["a"], "encoding": "float", "dimensions": ""},
            {"model": "m", "input": "a", "encoding_format": "float"},
        ),
        (
            "return requestBody(given)",
            {"model": "m", "texts": ["a", "b"], "encoding": "base64", "dimensions": "4"},
            {"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 4},
        ),
        ("return components(given)", "AAAAPwAAAL8AAIA+", [0.5, -0.5, 0.25]),
        ("return components(given)", [0.5, -0.5], [0.5, -0.5]),
        ("return similarities(given)", [[3, 4], [-4, 3], [-3, -4]], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]),
        (
            "return given.map(dollars)",
            ["0", "110", "20000000", "12500000000"],
            ["$0.00", "$0.00000011", "$0.02", "$12.50"],
        ),
        ("return given.map(isSendable)", ["em_good", "schlüssel", "a\nb", ""], [True, False, False, True]),
        ("return given.map(envelopeOf)", ["<html>", "{}", "null", '{"error":"x"}'], [None, None, None, None]),
        ("return envelopeOf(given)", '{"error":{"message":"m","code":"c"}}', {"message": "m", "code": "c"}),
        ("return given.map(replyOf)", ["<html>", "null", "{}", '{"data":[]}'], [None, None, None, None]),
        (
            "return given.map((modalities) => kindOf(modalities && { modalities }))",
            [None, ["embeddings"], ["completions", "chat"], ["completions"], ["images"], ["rerank"]],
            ["embeddings", "embeddings", "chat", "completions", "images", "rerank"],
        ),
        (
            "return given.map(factsOf)",
            [
                MODEL | {"modalities": ["embeddings"]},
                MODEL | {"modalities": ["chat"]},
                PAINTER,
                RERANKER,
                RERANKER | {"search_price_nanousd": 2_000_000},
            ],
            [
                "384 components, up to 8,192 tokens a text, $0.05 a million tokens",
                "chat, up to 8,192 tokens with the answer, $0.05 a million tokens in, $0.08 out",
                "images of 64x64 at $0.002",
                "ranks documents, up to 8,192 tokens with the query, $0.05 a million tokens",
                "ranks documents, up to 8,192 tokens with the query, $0.002 a search",
            ],
        ),
        (
            "return given.map(rerankBody)",
            [
                {"model": "m", "query": "q", "documents": ["a", "b"], "topN": "", "scores": ""},
                {"model": "m", "query": "q", "documents": ["a"], "topN": "3", "scores": "raw"},
                {"model": "m", "query": "q", "documents": ["a"], "topN": "", "scores": "sigmoid"},
            ],
            [
                {"model": "m", "query": "q", "documents": ["a", "b"]},
                {"model": "m", "query": "q", "documents": ["a"], "top_n": 3, "raw_scores": True},
                {"model": "m", "query": "q", "documents": ["a"], "raw_scores": False},
            ],
        ),
        (
            "return given.map(ranksOf)",
            ["<html>", "{}", '{"results":[]}', '{"results":[{"index":0,"relevance_score":"1"}]}'],
            [None, None, None, None],
        ),
        ("return given.map(barLengths)", [[1, 0.25, 0], [0, -800, 800]], [[1, 0.25, 0], [0.5, 0, 1]]),
        (
            "return talkBody(given)",
            {"kind": "chat", "model": "m", "turns": [{"role": "user", "content": "a"}], "text": "b", "limit": "7"},
            STREAMED
            | {
                "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
                "max_tokens": 7,
            },
        ),
        (
            "return talkBody(given)",
            {"kind": "completions", "model": "m", "turns": [], "text": "b", "limit": ""},
            STREAMED | {"prompt": "b"},
        ),
        (
            "return given.map(imageBody)",
            [
                {"model": "m", "text": "a", "size": "", "number": ""},
                {"model": "m", "text": "a", "size": "1x1", "number": "2"},
            ],
            [
                {"model": "m", "prompt": "a", "response_format": "b64_json"},
                {"model": "m", "prompt": "a", "response_format": "b64_json", "size": "1x1", "n": 2},
            ],
        ),
        (
            "return given.map(takeEvents)",
            ["", ": \n\n", "data: a\n\ndata: b\n", "data: a\n\n: \n\ndata: [DONE]\n\n"],
            [[[], ""], [[], ""], [["a"], "data: b\n"], [["a", "[DONE]"], ""]],
        ),
        (
            "return given.map(addedBy)",
            [
                {"choices": [{"delta": {"content": "a"}}]},
                {"choices": [{"delta": {"reasoning_content": "b", "content": None}}]},
                {"choices": [{"text": "c"}]},
                {"choices": [], "usage": {}},
                {"error": {}},
            ],
            [
                {"answer": "a", "reasoning": ""},
                {"answer": "", "reasoning": "b"},
                {"answer": "c", "reasoning": ""},
                {"answer": "", "reasoning": ""},
                {"answer": "", "reasoning": ""},
            ],
        ),
        (
            "return given.map(imagesOf)",
            [
                '{"data":[{"b64_json":"iVBORw0KGgo="}]}',
                '{"data":[{"url":"https://x"}]}',
                '{"data":[{"b64_json":"PHN2Zz4="}]}',
                "<html>",
            ],
            [["data:image/png;base64,iVBORw0KGgo="], None, None, None],
        ),
    ],
)
def test_what_is_sent_and_made_of_the_answer(code: str, given: object, expected: object) -> None:
    assert run_script(code, given) == expected


def test_a_hostile_reply_stays_text() -> None:
    """Markup in a refusal, a header or a text is shown as it is: the nodes made are only the page's own."""
    hostile = "<img src=x onerror=alert(1)>"
    tags, shown = run_script(
        "const response = { ok: false, status: 400, headers: new Headers({ 'x-request-id': given }) };"
        "const drawn = showRefusal(response, JSON.stringify({ error: { message: given, code: given, type: given } }));"
        "const walk = (node) => typeof node === 'string' ? [] : [node.tag, ...node.children.flatMap(walk)];"
        "return [drawn.flatMap(walk), drawn.map((node) => node.textContent).join('')];",
        hostile,
    )
    assert set(tags) <= {"p", "dl", "div", "dt", "dd", "code"}
    assert shown.count(hostile) == 4


# -- documents, as they are ranked -------------------------------------------------------------------------------------

RANK = """
let asked = [];
globalThis.fetch = async (url, options) => {
  asked.push([url.replace(BASE, ""), JSON.parse(options.body)]);
  return new Response(given.reply, { status: given.status, headers: { "x-embedmesh-cost-nanousd": "110" } });
};
const values = { key: "em_x", query: "Which?", documents: "a <b>\\n\\nc", "top-n": "", scores: "" };
for (const [id, value] of Object.entries(values)) Object.assign(byId(id), { value });
await rank("m");
const walk = (node) => (typeof node === "string" ? [] : [node, ...node.children.flatMap(walk)]);
return {
  asked, shown: byId("result").textContent, announced: byId("announcer").textContent,
  tags: walk(byId("result")).map((node) => node.tag),
};
"""


def test_documents_are_shown_best_first_with_a_bar_each() -> None:
    results = [{"index": 1, "relevance_score": 0.75}, {"index": 0, "relevance_score": 2e-7}]
    reply = {"results": results, "usage": {"total_tokens": 9}, "meta": {"billed_units": {"search_units": 1}}}
    got = run_script(RANK, {"status": 200, "reply": json.dumps(reply)})
    assert got["asked"] == [["/v1/rerank", {"model": "m", "query": "Which?", "documents": ["a <b>", "c"]}]]
    assert "Tokens9Searches1Cost$0.00000011" in got["shown"]
    assert "0.7500cdocument 20.0000a <b>document 1" in got["shown"]
    assert got["tags"].count("li") == 2 and "b" not in got["tags"], "markup stays text"
    assert got["announced"] == "2 documents ranked. The best: c"
    assert "This request with curl" in got["shown"] and "em_x" not in got["shown"]


def test_a_rerank_that_is_refused_is_shown_as_any_other() -> None:
    error = {"message": "No `m`.", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    got = run_script(RANK, {"status": 404, "reply": json.dumps({"error": error})})
    assert "No m." in got["shown"] and got["announced"] == "Refused with status 404"


def test_the_command_that_is_shown_sends_the_same_request() -> None:
    """Whatever a shell makes of quotes, dollars and backslashes in the texts."""
    body = {"query": """it's "so" $HOME `id` \\ \\n '' !x""", "documents": ["a\nb", "é"]}
    command = run_script("return curlOf('https://mesh.example/v1/rerank', given)", body)
    script = f"curl() {{ printf '%s\\0' \"$@\"; }}\nEMBEDMESH_API_KEY=em_x\n{command}"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    url, *options = ran.stdout.split("\0")[:-1]
    assert url == "https://mesh.example/v1/rerank"
    assert options[:-1] == ["-H", "Authorization: Bearer em_x", "-H", "Content-Type: application/json", "-d"]
    assert json.loads(options[-1]) == body


KINDS_OFFERED = """
served = given;
byId("model").value = "";
offerKinds();
showKind();
const at = byId("kinds");
return [at.hidden, at.children.map((button) => [button.textContent, button.attributes["aria-pressed"]])];
"""


def test_what_is_not_served_is_not_offered() -> None:
    """Rerank has its button where a reranker is served beside others; alone, its fields are there at once."""
    embeds = MODEL | {"id": "e", "aliases": [], "modalities": ["embeddings"]}
    reranks = RERANKER | {"id": "r", "aliases": []}
    assert run_script(KINDS_OFFERED, [embeds]) == [True, [["Embed", "true"]]]
    assert run_script(KINDS_OFFERED, [embeds, reranks]) == [False, [["Embed", "true"], ["Rerank", "false"]]]
    shown = run_script(
        "served = given; byId('model').value = 'r'; showKind();"
        "return [kind, byId('for-rerank').hidden, byId('for-embeddings').hidden, byId('send').textContent];",
        [reranks],
    )
    assert shown == ["rerank", False, True, "Rank documents"]


# -- a stream, as it is shown ------------------------------------------------------------------------------------------

TALK = """
let asked = [];
globalThis.fetch = async (url, options) => {
  asked.push(url.replace(BASE, ""));
  if (url.endsWith("/requests")) return Response.json({ data: [{ tokens: 9, cost_nanousd: 21 }] });
  if (url.includes("/account/entries")) {
    return Response.json({ data: given.charged ? [{ entry_id: 5, request_id: "req_1" }] : [] });
  }
  const encoder = new TextEncoder();
  const body = new ReadableStream({
    async pull(controller) {
      const piece = given.pieces.shift();
      if (piece === undefined) return controller.close();
      if (piece === "STOP") return underWay.abort();
      controller.enqueue(encoder.encode(piece));
    },
    start(controller) {
      options.signal.addEventListener("abort", () => controller.error(new DOMException("", "AbortError")));
    },
  }, { highWaterMark: 0 });
  return new Response(body, { headers: { "x-embedmesh-request": "req_1" } });
};
Object.assign(byId("key"), { value: "em_x" });
Object.assign(byId("message"), { value: "Hello?" });
Object.assign(byId("message-limit"), { value: "" });
await talk("chat", "m");
const walk = (node) => (typeof node === "string" ? [] : [node.tag, ...node.children.flatMap(walk)]);
return {
  shown: byId("result").textContent, turns, asked, left: byId("message").value, tags: walk(byId("result")),
  announced: byId("announcer").textContent, class: byId("result").children[0].attributes.class,
};
"""
FIRST = 'data: {"choices":[{"index":0,"delta":{"content":"Good "}}]}\n\n'
SECOND = 'data: {"choices":[{"index":0,"delta":{"content":"<b>day</b>"}}]}\n\n'
USED = 'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":6}}\n\n'
DONE = "data: [DONE]\n\n"


def test_a_chat_is_shown_as_it_comes_whatever_the_pieces() -> None:
    """With its usage and what the ledger says of it; the conversation is kept for the next message."""
    stream = ": \n\n" + FIRST + SECOND + USED + DONE
    for pieces in ([stream], list(stream), [FIRST[:20], FIRST[20:] + SECOND, USED, DONE]):
        got = run_script(TALK, {"pieces": pieces, "charged": True})
        assert "AnsweredYouHello?AnswerGood <b>day</b>Tokens3 in, 6 outCost$0.000000021" in got["shown"]
        assert got["turns"] == [
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Good <b>day</b>"},
        ]
        assert got["left"] == "" and got["announced"] == "Answered. Good <b>day</b>"
        assert "b" not in got["tags"] and "button" not in got["tags"], "markup stays text, and Stop is gone"
        assert got["asked"] == [
            "/v1/chat/completions",
            "/v1/account/entries?limit=20",
            "/v1/account/entries/5/requests",
        ]


def test_an_error_in_a_stream_is_shown_and_the_message_is_kept() -> None:
    error = (
        'data: {"error":{"message":"It `broke`.","type":"server_error","param":null,"code":"bad_node_response"}}\n\n'
    )
    for pieces in ([FIRST, error], [FIRST]):
        got = run_script(TALK, {"pieces": pieces, "charged": False})
        assert "Broken off" in got["shown"] and "Costnothing" in got["shown"] and "refusal" in got["class"]
        assert ("It broke." in got["shown"]) == (len(pieces) == 2)
        assert (got["turns"], got["left"]) == ([], "Hello?")


def test_a_stream_that_is_stopped_says_what_it_cost() -> None:
    got = run_script(TALK, {"pieces": [FIRST, "STOP"], "charged": True})
    assert "StoppedYouHello?AnswerGood You pay the input, and what you have received." in got["shown"]
    assert "Tokens9Cost$0.000000021" in got["shown"]
    assert got["turns"][-1] == {"role": "assistant", "content": "Good "}
