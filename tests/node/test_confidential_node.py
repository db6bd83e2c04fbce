"""Confidential calls at real node processes on a small model."""

import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from embedmesh.confidential.attestation import SignedStatement
from embedmesh.confidential.documents import read_keys
from embedmesh.node.refusals import REFUSAL_S
from embedmesh.rules.confidential import SDK_SCHEME, Scheme, SignedKeys
from embedmesh.rules.embeddings import COMPACT
from embedmesh.rules.models import Model
from embedmesh.signing.identity import Identity
from tests.engine.tiny import POISON, WORDS, catalogue_entry, make_folder, make_weights, textbook
from tests.node.live_node import Node
from tests.node.sealing import SCHEMES, SealedBy, asking, keys_of, seal

pytestmark = pytest.mark.story
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return catalogue_entry(make_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def node(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(model, tmp_path_factory.mktemp("run") / "node.sock")
    try:
        node.until(200)
        yield node
    finally:
        node.end()


def signed_keys(node: Node) -> SignedKeys:
    keys = keys_of(node.http.get("/v1/models").content)
    assert keys is not None
    return keys


def post(node: Node, sealed: SealedBy) -> httpx.Response:
    return node.http.post("/v1/confidential/embeddings", content=sealed.body, headers={"Content-Type": COMPACT})


def in_time(node: Node, scheme: Scheme, body: bytes, **words: Any) -> SealedBy:
    return seal(signed_keys(node), scheme, body, expires_ms=int(time.time() * 1000) + 30_000, **words)


@each_scheme
def test_a_sealed_request_gets_the_textbook_s_vectors(scheme: Scheme, node: Node) -> None:
    """And the very reply that the same request gets in the open."""
    body = asking(input=["w1 w2", "w3"])
    sealed = in_time(node, scheme, body)
    reply = post(node, sealed)
    assert (reply.status_code, reply.headers["content-type"]) == (200, COMPACT)
    statement, opened = sealed.read(reply.content)
    assert (statement.status, statement.tokens) == (200, 7)
    assert (
        opened == node.http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"}).content
    )
    got = np.array(sealed.reply(reply.content)["data"][1]["embedding"])
    assert np.abs(got - textbook([2, 7, 3], make_weights(), pooling="mean", normalize=True)).max() <= 1e-5


@each_scheme
def test_a_second_one_is_refused_and_not_before_its_time(scheme: Scheme, node: Node) -> None:
    sealed = in_time(node, scheme, asking())
    assert sealed.read(post(node, sealed).content)[0].status == 200
    begun = time.monotonic()
    again = post(node, sealed)
    assert time.monotonic() - begun >= REFUSAL_S
    assert again.status_code == 200
    statement, opened = sealed.read(again.content)
    assert (statement.status, statement.tokens, opened) == (400, 0, b"")


def test_many_at_one_time_among_others(node: Node) -> None:
    """Everybody gets his own vectors."""

    def one(number: int) -> bool:
        ids = [4 + number % 40, 4 + number // 40]
        expected = textbook([2, *ids, 3], make_weights(), pooling="mean", normalize=True)
        text = " ".join(WORDS[each] for each in ids)
        if number % 3:
            sealed = in_time(node, SCHEMES[number % 2], asking(input=text))
            got = sealed.reply(post(node, sealed).content)["data"][0]["embedding"]
        else:
            got = node.embed(input=text, encoding_format="float").json()["data"][0]["embedding"]
        return bool(np.abs(np.array(got) - expected).max() <= 1e-5)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(120)))


def test_what_is_no_sealed_call_is_refused_in_the_open(node: Node) -> None:
    reply = node.http.post("/v1/confidential/embeddings", content=b"\x01", headers={"Content-Type": COMPACT})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_type")
    reply = node.http.post("/v1/confidential/embeddings", json={})
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
    reply = node.http.post("/v1/confidential/embeddings", content=bytes(5 * 2**20), headers={"Content-Type": COMPACT})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_the_list_s_keys_follow_the_models(model: Model, tmp_path: Path) -> None:
    """A model that is loaded while the node runs is in the next document, one that is gone is not; the keys stay."""
    other = msgspec.structs.replace(model, id="tests/other", aliases=())
    node = Node([model, other], tmp_path / "n.sock", model="tests/tiny")
    try:
        node.until(200)
        first = read_keys(signed_keys(node))
        assert first.models == {"tests/tiny": model.digest}
        assert node.http.post("/v1/models", json={"model": "tests/other"}).status_code == 200
        second = read_keys(signed_keys(node))
        assert second.models.keys() == {"tests/tiny", "tests/other"}
        assert second.keys == first.keys
        assert node.http.delete("/v1/models/tests%2Fother").status_code == 200
        assert read_keys(signed_keys(node)).models == first.models
    finally:
        node.end()


def test_the_identity_stays_and_the_keys_do_not(model: Model, tmp_path: Path) -> None:
    """A start makes new keys, so that what was sealed for the old ones is refused. The public line is for copying."""
    documents, calls = [], []
    for _ in range(2):
        node = Node(model, tmp_path / "n.sock")
        try:
            node.until(200)
            documents.append(read_keys(signed_keys(node)))
            calls.append(in_time(node, SDK_SCHEME, asking()))
            statement, _ = calls[0].read(post(node, calls[0]).content)
            assert statement.status == (200 if len(calls) == 1 else 400)
        finally:
            assert node.end()[0] == 0
    first, second = documents
    assert first.public_key == second.public_key
    assert not {*first.keys.values()} & {*second.keys.values()}
    private, public = node.data_dir / "node.identity", node.data_dir / "node.identity.pub"
    assert Identity.load(private).public_key == first.public_key
    assert [stat.S_IMODE(file.stat().st_mode) for file in (node.data_dir, private, public)] == [0o700, 0o600, 0o644]
    assert public.read_text().startswith("embedmesh-node ed25519:")
    assert public.read_text().endswith(f" {first.node_id}\n")
    assert {*node.data_dir.iterdir()} == {private, public}


def test_the_operator_vouches_for_the_keys(model: Model, tmp_path: Path) -> None:
    operator = tmp_path / "operator.key"
    operator.write_bytes(bytes(range(32)))
    operator.chmod(0o600)
    node = Node(model, tmp_path / "n.sock", attestation_key=operator)
    try:
        node.until(200)
        signed = signed_keys(node)
        authority = Identity(bytes(range(32))).public_key
        SignedStatement(authority).verify(signed, read_keys(signed))
        assert (tmp_path / "operator.key.pub").read_text().startswith("embedmesh-attestation ed25519:")
    finally:
        node.end()


@pytest.mark.parametrize(
    ("content", "mode", "says"), [(None, 0, "No such file"), (b"", 0o600, "32 bytes"), (bytes(32), 0o644, "chmod 600")]
)
def test_a_wrong_attestation_key_ends_the_start(
    content: bytes | None, mode: int, says: str, model: Model, tmp_path: Path
) -> None:
    key = tmp_path / "operator.key"
    if content is not None:
        key.write_bytes(content)
        key.chmod(mode)
    node = Node(model, tmp_path / "n.sock", attestation_key=key)
    _, said = node.process.communicate(timeout=30)
    node.http.close()
    assert node.process.returncode == 78
    assert says in said and said.count("\n") == 1


def test_without_a_folder_the_identity_is_in_memory_only(model: Model, tmp_path: Path) -> None:
    """It works all the same, and says so."""
    (tmp_path / "file").touch()
    node = Node(model, tmp_path / "n.sock", data_dir=tmp_path / "file" / "data")
    try:
        node.until(200)
        sealed = in_time(node, SDK_SCHEME, asking())
        assert sealed.read(post(node, sealed).content)[0].status == 200
    finally:
        code, said = node.end()
    assert code == 0
    assert "a new one at each start" in said


def test_nothing_of_the_texts_is_left_and_no_core(model: Model, tmp_path: Path) -> None:
    """In what the node says and counts, and in its files, also where a text breaks the engine; nor may a core be."""
    node = Node(model, tmp_path / "n.sock")
    sentinel = "w41 w17 w41 w17"
    try:
        node.until(200)
        for scheme in SCHEMES:
            for inputs in ([sentinel], [sentinel, ""]):
                assert post(node, in_time(node, scheme, asking(input=inputs))).status_code == 200
            broken = post(node, in_time(node, scheme, asking(input=f"{sentinel} {WORDS[POISON]}")))
            assert broken.status_code == 500
            assert sentinel not in broken.text
        page = node.http.get("/metrics").text
        assert 'embedmesh_node_confidential_calls_total{outcome="answered"} 2.0' in page
        assert 'embedmesh_node_confidential_calls_total{outcome="refused"} 2.0' in page
        for pid in (node.process.pid, node.worker()):
            limits = Path(f"/proc/{pid}/limits").read_text()
            (core,) = [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size")]
            assert core == ["0", "0"]
            assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0
    finally:
        _, said = node.end()
    files = [
        path.read_bytes() for folder, _, names in os.walk(tmp_path) for path in (Path(folder, name) for name in names)
    ]
    assert sentinel not in page + said
    assert all(sentinel.encode() not in content for content in files)
