"""A scripted gateway on a real socket, and nodes behind it that really open and seal."""

import base64
import contextlib
import hashlib
import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np

from embedmesh.confidential import hpke_scheme, sdk_scheme
from embedmesh.confidential.attestation import Attester
from embedmesh.confidential.documents import sign_keys
from embedmesh.confidential.failures import SealBroken
from embedmesh.confidential.node_keys import DhKey
from embedmesh.confidential.statements import request_digest, sign_answer
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME, Scheme, SealedCall, SignedKeys
from embedmesh.rules.exchange import NEXT_LOCK_HEADER
from embedmesh.signing.identity import Identity, node_id

WIDTH = 4
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
ALIAS = "all-MiniLM-L6-v2"
KEY = "em_test"
TEXT = "a sentinel that nobody else may see"
DAY_MS = 86_400_000

Members = dict[str, Any]
Change = Callable[[Members], Members | None]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def vector_of(text: str, width: int = WIDTH) -> bytes:
    """What every node answers for a text: float32, of unit length."""
    seed = hashlib.sha256(text.encode()).digest() * (width // 8 + 1)
    raw = np.frombuffer(seed[: 4 * width], "<u4").astype("<f4")
    return np.asarray(raw / np.linalg.norm(raw), "<f4").tobytes()


def embed(request: Members) -> Members:
    """The right answer to an ordinary request with base64: three tokens an input."""
    given = request["input"]
    texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    width = request.get("dimensions") or WIDTH
    as_floats = request.get("encoding_format") == "float"
    rows = [vector_of(text, width) for text in map(str, texts)]
    data = [
        {"object": "embedding", "index": at, "embedding": np.frombuffer(row, "<f4").tolist() if as_floats else b64(row)}
        for at, row in enumerate(rows)
    ]
    tokens = 3 * len(texts)
    return {
        "object": "list",
        "data": data,
        "model": request["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def score_of(query: str, document: str) -> float:
    """What every reranker gives for a pair: different for each, the same every time."""
    return int.from_bytes(hashlib.sha256(f"{query}\0{document}".encode()).digest()[:4]) / 2**32


def rank(request: Members) -> Members:
    """The right answer to a rerank request: five tokens a pair."""
    scores = [score_of(request["query"], document) for document in request["documents"]]
    order = sorted(range(len(scores)), key=lambda at: -scores[at])[: request["top_n"]]
    return {
        "id": "rerank",
        "model": request["model"],
        "results": [{"index": at, "relevance_score": scores[at]} for at in order],
        "usage": {"prompt_tokens": 5 * len(scores), "total_tokens": 5 * len(scores)},
    }


def envelope(code: str, message: str = "no", param: str | None = None, **more: Any) -> Members:
    return {"error": {"message": message, "type": "t", "param": param, "code": code, **more}}


class ScriptedNode:
    """A node: identity, keys, and what it does with a sealed request. `answer` makes the plaintext of the reply."""

    def __init__(self, attester: Attester | None = None) -> None:
        self.identity = Identity(hashlib.sha256(str(time.perf_counter_ns()).encode()).digest())
        self.node_id = node_id(self.identity.public_key)
        self.key = DhKey.new()
        self.attester = attester
        self.models = {MODEL: "digest"}
        self.not_before_ms, self.not_after_ms = now_ms() - 60_000, now_ms() + DAY_MS
        self.answer: Callable[[Members], Members] = embed
        self.refuses: Members | None = None
        self.opened: list[Members] = []

    @property
    def pin(self) -> str:
        return f"embedmesh-node ed25519:{b64(self.identity.public_key)} {self.node_id}\n"

    def keys(self, **more: Any) -> SignedKeys:
        """Its signed document; `more` replaces arguments of `sign_keys`."""
        keys: dict[Scheme, bytes] = {"hpke-1": self.key.public, "atoma-sdk-1": self.key.public}
        given: Members = {
            "models": self.models,
            "keys": keys,
            "not_before_ms": self.not_before_ms,
            "not_after_ms": self.not_after_ms,
            "attester": self.attester,
        }
        return sign_keys(self.identity, **(given | more))

    def take(self, call: SealedCall, **said: Any) -> tuple[int, Members]:
        """HTTP status and members of the answer; `said` replaces arguments of `sign_answer`."""
        try:
            body, seal_reply = self._open(call)
        except SealBroken:
            return 400, self._told(call, b"", 400, 0, {}, said)
        request = json.loads(body)
        self.opened.append(request)
        if self.refuses is not None:
            sealed, extra = seal_reply(json.dumps(self.refuses).encode())
            return 400, self._told(call, sealed, 400, 0, extra, said)
        reply = self.answer(request)
        sealed, extra = seal_reply(json.dumps(reply).encode())
        told = self._told(call, sealed, 200, 3 * len(reply["data"]), extra, said)
        tokens = said.get("tokens", 3 * len(reply["data"]))
        return 200, told | {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    def _open(self, call: SealedCall) -> tuple[bytes, Callable[[bytes], tuple[bytes, Members]]]:
        if call.scheme == HPKE_SCHEME:
            terms = hpke_scheme.Terms.of(call, self.node_id)
            opened = hpke_scheme.open_sealed(self.key, call.ciphertext, terms)
            return opened.body, lambda plaintext: (opened.seal_reply(plaintext), {})
        sdk = sdk_scheme.open_sealed(self.key, call)

        def seal(plaintext: bytes) -> tuple[bytes, Members]:
            parts = sdk.seal_reply(plaintext, self.identity)
            return parts.sealed, {
                "nonce": b64(parts.nonce),
                "response_hash": b64(parts.response_hash),
                "signature": b64(parts.response_signature),
            }

        return sdk.plaintext, seal

    def _told(
        self, call: SealedCall, sealed: bytes, status: int, tokens: int, extra: Members, said: Members
    ) -> Members:
        given: Members = {
            "identity": self.identity,
            "lock": call.lock,
            "digest": request_digest(call),
            "sealed": sealed,
            "status": status,
            "tokens": tokens,
            "time_ms": now_ms(),
            "nonce": base64.b64decode(extra.get("nonce", "")),
        }
        statement, signature = sign_answer(**(given | said))
        return {
            "ciphertext": b64(sealed),
            "statement": b64(statement),
            "statement_signature": b64(signature),
            **extra,
        }


class Received:
    """One request as it arrived. `raw` is its body."""

    def __init__(self, path: str, headers: dict[str, str], raw: bytes) -> None:
        self.path = path
        self.headers = headers
        self.raw = raw
        self.body: Members = json.loads(raw)


class Raw(bytes):
    """Bytes to write to the connection as they are, after which it is closed."""


Answer = tuple[int, Members] | tuple[int, Members, dict[str, str]] | Raw
Script = Callable[[Received], Answer | None]


class ScriptedGateway:
    """`script` may answer a request itself; `on_lock` and `on_reply` change what would be answered.

    `locks` has the node of each lock; `said` replaces what nodes sign; `drip_s` is how long it waits before each byte.
    """

    def __init__(self) -> None:
        self.nodes = [ScriptedNode()]
        self.received: list[Received] = []
        self.script: Script = lambda received: None
        self.on_lock: Change = lambda reply: reply
        self.on_reply: Change = lambda reply: reply
        self.said: Members = {}
        self.gives_ahead = True  # locks with replies, if it is asked to
        self.drip_s = 0.0
        self.locks: dict[int, ScriptedNode] = {}
        self._one_lock = threading.Lock()  # requests come in threads
        self.replies: dict[bytes, tuple[int, Members]] = {}
        self.connections = 0
        self.width: int | None = WIDTH  # in /v1/models; None for a model that it does not have
        self.asked: list[str] = []  # by GET
        self.base_url = ""

    @property
    def node(self) -> ScriptedNode:
        return self.nodes[0]

    @property
    def paths(self) -> list[str]:
        return [one.path.removeprefix("/v1") for one in self.received]

    def answer(self, received: Received) -> Answer:
        scripted = self.script(received)
        if scripted is not None:
            return scripted
        match received.path:
            case "/v1/embeddings":
                reply = embed(received.body)
                return 200, self.on_reply(reply) or reply
            case "/v1/rerank":
                reply = rank(received.body)
                return 200, self.on_reply(reply) or reply
            case "/v1/nodes/lock":
                reply = self.lock(received.body)
                return 200, self.on_lock(reply) or reply
            case "/v1/confidential/embeddings":
                ahead: Members = {}
                if received.raw not in self.replies:
                    self.replies[received.raw] = self.sealed(received.body)
                    ahead = self.ahead(received)
                status, reply = self.replies[received.raw]
                reply = reply | ahead if status == 200 else reply
                return status, self.on_reply(reply) or reply
        return 404, envelope("not_found")

    def lock(self, body: Members) -> Members:
        with self._one_lock:
            return self._lock(body)

    def _lock(self, body: Members) -> Members:
        number = 1_000 + len(self.locks)
        node = self.nodes[min(len(self.locks), len(self.nodes) - 1)]
        self.locks[number] = node
        return {
            "public_key": b64(node.key.public),
            "node_small_id": 7,
            "stack_small_id": number,
            "stack_entry_digest": None,
            "scheme": body.get("scheme", SDK_SCHEME),
            "expires_ms": now_ms() + 1000 * body.get("timeout", 30),
            "max_num_tokens": body["max_num_tokens"],
            "model": MODEL,
            "keys": msgspec.json.decode(msgspec.json.encode(node.keys())),
        }

    def ahead(self, received: Received) -> Members:
        """The lock that a sealed request has asked for."""
        asked = received.headers.get(NEXT_LOCK_HEADER)
        if asked is None or not self.gives_ahead:
            return {}
        scheme = received.body.get("scheme", SDK_SCHEME)
        return {"next_lock": self.lock({"max_num_tokens": int(asked.split(" ")[0]), "scheme": scheme})}

    def sealed(self, body: Members) -> tuple[int, Members]:
        node = self.locks[body["stack_small_id"]]
        texts = {name: base64.b64decode(body.get(name, "")) for name in ("client_dh_public_key", "salt", "nonce")}
        call = SealedCall(
            scheme=body.get("scheme", SDK_SCHEME),
            model=MODEL,
            model_name=body["model_name"],
            lock=body["stack_small_id"],
            units=8_192,
            node_key=base64.b64decode(body["node_dh_public_key"]),
            ciphertext=base64.b64decode(body["ciphertext"]),
            request_id=body.get("request_id", ""),
            expires_ms=body.get("expires_ms", 0),
            client_key=texts["client_dh_public_key"],
            salt=texts["salt"],
            nonce=texts["nonce"],
            body_hash=base64.b64decode(body.get("plaintext_body_hash", "")),
        )
        status, told = node.take(call, **self.said)
        return (status, told) if status == 200 else (status, envelope("confidential_refused", sealed=told))

    @contextmanager
    def running(self, tls: ssl.SSLContext | None = None) -> Iterator["ScriptedGateway"]:
        gateway = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError, ssl.SSLError):  # of a caller that does not trust us
                    super().handle()

            def setup(self) -> None:
                super().setup()
                gateway.connections += 1

            def do_GET(self) -> None:
                gateway.asked.append(self.path)
                found = {"id": self.path.rpartition("/")[2], "width": gateway.width}
                status, reply = (200, found) if gateway.width is not None else (404, envelope("not_found"))
                body = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                received = Received(self.path, headers, raw)
                gateway.received.append(received)
                answer = gateway.answer(received)
                if isinstance(answer, Raw):
                    self.wfile.write(answer)
                    self.close_connection = True
                    return
                body = json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                for name, value in (answer[2] if len(answer) == 3 else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("x-request-id", "req_1")
                self.end_headers()
                self._write(body)

            def _write(self, body: bytes) -> None:
                if not gateway.drip_s:
                    self.wfile.write(body)
                    return
                try:
                    for at in range(len(body)):
                        self.wfile.write(body[at : at + 1])
                        time.sleep(gateway.drip_s)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a handshake that the caller broke off

        server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        self.base_url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join(5)


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
