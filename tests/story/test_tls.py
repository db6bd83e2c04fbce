"""`embedmesh serve --tls-cert`: real clients over https; the admin API with a certificate of the caller's."""

import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from openai import DefaultHttpxClient, OpenAI

from embedmesh.commands.group import cli
from embedmesh.rules.errors import SetupError
from tests.http.test_tls import Pair
from tests.story.endpoint import COMMAND, MODEL, WIDTH, Endpoint, run, wait_until


def check_commands(endpoint: Endpoint, folder: Path, pair: Pair, operator: Path) -> None:
    """A certificate that nobody vouches for is told as that, by all commands, with what to do; and so by a node."""
    text = folder / "text.txt"
    text.write_text("hello\n")
    data = ("--data-dir", str(endpoint.data_dir))
    commands: list[tuple[str, ...]] = [
        ("accounts", "list"),
        ("nodes", "list"),
        ("jobs", "list"),
        ("embed", str(text), "-o", str(folder / "v.npy")),
        ("chat", "hello"),
        ("doctor",),
    ]
    for words in commands:
        done = CliRunner().invoke(cli, [*words, *data])
        told = " ".join(f"{done.output} {done.exception if isinstance(done.exception, SetupError) else ''}".split())
        assert done.exit_code != 0 and "its certificate is not trusted (self-signed certificate)" in told, (words, told)
        assert "et SSL_CERT_FILE to a file with that certificate" in told and "embedmesh serve" not in told, told
    trusted = {"SSL_CERT_FILE": str(pair.certificate), "EMBEDMESH_CLIENT_CERT": str(operator)}
    invited = CliRunner(env=trusted).invoke(cli, ["nodes", "invite", *data])
    assert f"SSL_CERT_FILE=tls.pem embedmesh node --gateway {endpoint.root} --join emj_" in invited.stderr, (
        invited.stderr
    )
    assert f"Copy {pair.certificate} there first" in invited.stderr
    assert "Another machine cannot reach this address" in invited.stderr  # it listens on 127.0.0.1
    joining = ("node", "--gateway", endpoint.root, "--gateway-key", "x" * 43, "--data-dir", folder / "node")
    with (folder / "node.log").open("wb") as log:
        node = subprocess.Popen([*COMMAND, *map(str, joining)], stdin=subprocess.DEVNULL, stderr=log)
    try:
        wait_until(
            "the node says so",
            lambda: "its certificate is not trusted" in (folder / "node.log").read_text() or node.poll() is not None,
            60.0,
        )
    finally:
        node.kill()
        node.wait()
    assert "set SSL_CERT_FILE" in (folder / "node.log").read_text()


def test_https_and_certificates_for_the_admin_api(tmp_path: Path) -> None:
    pair = Pair(tmp_path).write("ours")
    (tmp_path / "client").mkdir()
    client = Pair(tmp_path / "client").write("operator")
    both = tmp_path / "client" / "both.pem"
    both.write_bytes(client.certificate.read_bytes() + client.key.read_bytes())
    tls = ("--tls-cert", pair.certificate, "--tls-key", pair.key, "--tls-client-ca", client.certificate)
    endpoint = Endpoint(tmp_path / "data", *tls, as_json=False)
    try:
        endpoint.wait_ready("Stop: Ctrl-C")
        assert endpoint.base_url.startswith("https://127.0.0.1:")
        with OpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, http_client=DefaultHttpxClient(verify=pair.trusted())
        ) as openai:
            assert len(openai.embeddings.create(model=MODEL, input="hello").data[0].embedding) == WIDTH
        with pytest.raises(httpx.ConnectError):
            httpx.get(endpoint.base_url + "/models", headers={"Authorization": f"Bearer {endpoint.api_key}"})
        said = endpoint.said.read_text()
        assert f"curl --cacert {pair.certificate} https://" in said, said
        assert f"Store: {tmp_path}/data/embedmesh.db" in said
        printed = said[said.index("curl") : said.index("\n\n  Keys:")]
        asked_for = subprocess.run(["bash", "-c", printed], capture_output=True, timeout=60, check=False)
        assert b'"embedding"' in asked_for.stdout, asked_for.stderr
        check_commands(endpoint, tmp_path, pair, both)
        asked = ("accounts", "list", "--data-dir", tmp_path / "data")
        trusted = str(pair.certificate)
        assert b"client certificate" in run(*asked, SSL_CERT_FILE=trusted).stderr
        done = run(*asked, SSL_CERT_FILE=trusted, EMBEDMESH_CLIENT_CERT=str(both))
        assert done.returncode == 0, done.stderr
        stranger = Pair(tmp_path / "data").write("stranger")
        context = pair.trusted()
        context.load_cert_chain(stranger.certificate, stranger.key)
        with pytest.raises((httpx.TransportError, ssl.SSLError)):
            httpx.get(endpoint.base_url + "/models", verify=context)
        assert endpoint.stop() == 0
    finally:
        endpoint.kill_all()
