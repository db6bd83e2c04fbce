"""`embedmesh serve --tls-cert`: real clients over https; the admin API with a certificate of the caller's."""

import ssl
from pathlib import Path

import httpx
import pytest
from openai import DefaultHttpxClient, OpenAI

from tests.http.test_tls import Pair
from tests.story.endpoint import MODEL, WIDTH, Endpoint, run


def test_https_and_certificates_for_the_admin_api(tmp_path: Path) -> None:
    pair = Pair(tmp_path).write("ours")
    (tmp_path / "client").mkdir()
    client = Pair(tmp_path / "client").write("operator")
    both = tmp_path / "client" / "both.pem"
    both.write_bytes(client.certificate.read_bytes() + client.key.read_bytes())
    tls = ("--tls-cert", pair.certificate, "--tls-key", pair.key, "--tls-client-ca", client.certificate)
    endpoint = Endpoint(tmp_path / "data", *tls)
    try:
        endpoint.wait_ready()
        assert endpoint.base_url.startswith("https://127.0.0.1:")
        with OpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, http_client=DefaultHttpxClient(verify=pair.trusted())
        ) as openai:
            assert len(openai.embeddings.create(model=MODEL, input="hello").data[0].embedding) == WIDTH
        with pytest.raises(httpx.ConnectError):
            httpx.get(endpoint.base_url + "/models", headers={"Authorization": f"Bearer {endpoint.api_key}"})
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
