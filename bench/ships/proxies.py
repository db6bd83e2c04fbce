"""nginx and Caddy as the examples have them, before a real gateway: streams, callers that go, large bodies, a node."""

import json
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench.faultnode import speech
from bench.rig.install import NotInstalled
from bench.rig.processes import EMBEDMESH, HOST, Process, free_port, wait_for
from bench.rig.streams import DONE, Caller, event_of, text_of
from bench.ships.tools import Checklist, run, system_tool
from tests.data import CHECKOUT
from tests.story.endpoint import run_json
from tests.story.generating import SAID, Generating, estimated, generating, streaming

PROXIES = CHECKOUT / "deploy" / "proxies"
START_S, NODE_S = 30.0, 90.0  # a node loads the default model
LEFT_AFTER = 3  # events
FILE_MB = 20
OVER_BYTES = 5 * 1024 * 1024
NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log warn; events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; include {folder}/embedmesh.conf;
}}
"""


def check_proxies(rows: Checklist) -> None:
    """Each proxy that is here, before one gateway; then before none."""
    with tempfile.TemporaryDirectory() as folder, generating(Path(folder)) as mesh:
        for name, start in (("nginx", nginx), ("Caddy", caddy)):
            try:
                home = Path(folder) / name
                home.mkdir()
                with start(home, mesh.address[1]) as port:
                    _check(rows, name, mesh, port, home)
                with start(home, free_port()) as port:
                    reply = httpx.get(f"http://{HOST}:{port}/v1/models")
                    envelope = reply.status_code == 503 and "error" in reply.json()
                    rows.check(f"{name}: no gateway is an error in our form", envelope, reply.text)
            except NotInstalled as why:
                rows.skip(f"{name} keeps our promises", why)
    rows.skip("Envoy keeps our promises", "no Envoy can be had here")


@contextmanager
def nginx(folder: Path, gateway: int) -> Iterator[int]:
    """The example on a port without TLS, and on another with it. Raises NotInstalled."""
    program = system_tool("nginx", "nginx-light")
    port, tls = free_port(), free_port()
    make_certificate(folder)
    example = (PROXIES / "nginx.conf").read_text()
    example = example.replace("server 127.0.0.1:8080;", f"server {HOST}:{gateway};")
    example = example.replace("listen 443 ssl;", f"listen {HOST}:{tls} ssl; listen {HOST}:{port};")
    (folder / "embedmesh.conf").write_text(example.replace("/etc/ssl/embedmesh", str(folder)))
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
    (folder / "tls").write_text(str(tls))
    command = [program, "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    with _started(command, folder, port):
        yield port


@contextmanager
def caddy(folder: Path, gateway: int) -> Iterator[int]:
    """The example on a port without TLS: a certificate would be fetched. Raises NotInstalled."""
    program = system_tool("caddy")
    port = free_port()
    environment = {
        "EMBEDMESH_SITE": f":{port}",
        "EMBEDMESH_GATEWAYS": f"{HOST}:{gateway}",
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
    }
    command = [program, "run", "--adapter", "caddyfile", "--config", str(PROXIES / "Caddyfile")]
    with _started(command, folder, port, environment):
        yield port


@contextmanager
def _started(
    command: list[str], folder: Path, port: int, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    with Process(command, folder / "log", environment=environment, stop_s=5.0) as process:
        if not wait_for(lambda: listens(port), START_S, lambda: process.lives):
            raise NotInstalled(f"{Path(command[0]).name} does not answer: {process.log_tail()[-300:]}")
        yield process


def listens(port: int) -> bool:
    """Raises OSError where nothing does."""
    socket.create_connection((HOST, port), 1.0).close()
    return True


def _check(rows: Checklist, name: str, mesh: Generating, port: int, folder: Path) -> None:
    _check_streams(rows, name, mesh, port)
    _check_bodies(rows, name, mesh, port)
    _check_node(rows, name, mesh, port, folder)
    if (tls := folder / "tls").exists():
        context = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
        reply = httpx.get(f"https://{HOST}:{tls.read_text()}/health", verify=context)
        rows.check(f"{name}: TLS", reply.status_code == 200, reply.status_code)


def _check_streams(rows: Checklist, name: str, mesh: Generating, port: int) -> None:
    key = mesh.endpoint.api_key
    with Caller((HOST, port), key, "/v1/chat/completions", streaming()) as caller:
        status, _ = caller.head()
        *events, last = _events(caller)
        whole = status == 200 and last == DONE and text_of([event_of(each) for each in events]) == SAID
    rows.check(f"{name}: a stream comes whole", whole, f"{len(events)} events")
    body = streaming(f"stalls at={LEFT_AFTER} tokens={speech.TOKENS}", max_tokens=speech.TOKENS)
    with Caller((HOST, port), key, "/v1/chat/completions", body) as caller:
        caller.head()
        reader = _events(caller)
        read = [event_of(next(reader)) for _ in range(LEFT_AFTER)]  # all that the node says
    rows.check(f"{name}: an event leaves when it comes", True, f"{LEFT_AFTER} before the node went silent")
    charge = mesh.charge(read[0]["id"])
    paid = charge is not None and charge.cost == estimated(body, text_of(read))
    rows.check(f"{name}: a caller that goes is noticed, and pays what it got", paid, charge)


def _events(caller: Caller) -> Iterator[bytes]:
    """One event at a time, however a proxy cuts its chunks."""
    had = b""
    for chunk in caller.chunks():
        had += chunk
        while b"\n\n" in had:
            event, _, had = had.partition(b"\n\n")
            yield event + b"\n\n"


def _check_bodies(rows: Checklist, name: str, mesh: Generating, port: int) -> None:
    root = f"http://{HOST}:{port}"
    headers = {"Authorization": f"Bearer {mesh.endpoint.api_key}"}
    with httpx.Client(headers=headers, timeout=60.0) as http:
        over = http.post(
            f"{root}/v1/embeddings", content=b"x" * OVER_BYTES, headers={"Content-Type": "application/json"}
        )
        code = (
            over.json()["error"]["code"] if over.headers["content-type"].startswith("application/json") else over.text
        )
        rows.check(f"{name}: a body of 5 MiB is refused by the gateway's own words", code == "body_too_large", code)
        line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x" * 900}})
        content = (line + "\n").encode() * (FILE_MB * 1_000_000 // len(line))
        sent = http.post(f"{root}/v1/files", files={"file": ("lines.jsonl", content)}, data={"purpose": "batch"})
        kept = sent.status_code == 200 and sent.json()["bytes"] == len(content)
        rows.check(f"{name}: a file of {FILE_MB} MB comes whole", kept, sent.text)
        model = http.get(f"{root}/v1/models/sentence-transformers%2Fall-MiniLM-L6-v2")
        rows.check(f"{name}: a path keeps its %2F", model.status_code == 200, model.status_code)
        embedded = http.post(f"{root}/v1/embeddings", json={"model": "all-MiniLM-L6-v2", "input": "Hello, world"})
        rows.check(f"{name}: a text is embedded", embedded.status_code == 200, embedded.status_code)


def _check_node(rows: Checklist, name: str, mesh: Generating, port: int, folder: Path) -> None:
    """A node that dials out through the proxy gets work."""
    admin = ("--data-dir", mesh.endpoint.data_dir)
    before = {each["node_id"] for each in run_json("nodes", "list", *admin)}
    token = run_json("nodes", "invite", "--note", name, *admin)["token"]
    command = [*EMBEDMESH, "node", "--gateway", f"http://{HOST}:{port}", "--data-dir", str(folder / "node")]
    command += ["--threads", "1", "--model", "all-MiniLM-L6-v2"]
    with Process(command, folder / "node.log", environment={"EMBEDMESH_JOIN": token}, stop_s=20.0):

        def ready() -> bool:
            nodes = run_json("nodes", "list", *admin)
            return any(each["node_id"] not in before and each["state"] == "ready" for each in nodes)

        rows.check(f"{name}: a node dials out through it", wait_for(ready, NODE_S), "ready")


def make_certificate(folder: Path) -> None:
    """`fullchain.pem` and `privkey.pem`, of two days, where they are missing. Raises NotInstalled."""
    if (folder / "fullchain.pem").exists():
        return
    if shutil.which("openssl") is None:
        raise NotInstalled("openssl is missing")
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    request += ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=IP:{HOST}"]
    run([*request, "-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem"])
