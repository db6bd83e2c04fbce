"""Points in Qdrant, by its own client: in its local mode, and over HTTP where a server answers as none should."""

import http.server
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.bulk import to_qdrant
from embedmesh.bulk.stops import NothingListens, Stopped
from embedmesh.bulk.to_qdrant import QdrantSink
from embedmesh.bulk.usage import WrongUsage
from tests.bulk.sink_tables import table_of, write

WRONG_OUTPUTS = (
    "docs",
    "/docs",
    "http://host:6333",
    "http://host:6333/",
    "http://key@host:6333/docs",
    "http://h/docs?colour=red",
    "",
)
HAS_ID = "9c1de8e2-7c63-4d3a-9c60-3d0e0d9f6c11"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test has another's client."""
    yield
    to_qdrant._client.cache_clear()


@pytest.fixture
def client() -> Any:
    return pytest.importorskip(
        "qdrant_client", reason="qdrant-client is not installed: pip install 'embedmesh[qdrant]'"
    )


@pytest.mark.parametrize("output", WRONG_OUTPUTS)
def test_an_output_that_is_none_is_refused(output: str) -> None:
    with pytest.raises(WrongUsage, match=r"must look like|QDRANT_API_KEY"):
        QdrantSink(f"qdrant:{output}")


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(WrongUsage, match=r"pip install 'embedmesh\[qdrant\]'"):
        QdrantSink(f"qdrant:{tmp_path}/docs").begin(resumed=False, overwrite=False, width=4)


def test_points_are_there_once(client: Any, tmp_path: Path) -> None:
    """A missing collection is made; a unit that comes twice changes nothing; ids of any kind are found again."""
    sink = QdrantSink(f"qdrant:{tmp_path}/docs?text=body")
    sink.begin(resumed=False, overwrite=False, width=4)
    ids: list[str | int | None] = [7, "8", "doc-1", HAS_ID, "doc-1", "gone", None, -1]
    table = table_of(*ids, key=ids, size=[2**70, float("nan"), b"\1", None, [1], 6, 7, {"a": "b"}])
    table.errors[5] = table.errors[6] = "context_length_exceeded: too long"
    for _ in range(2):
        assert write(sink, table) == "docs"
    opened = to_qdrant._client(str(tmp_path), True)
    found = {point.id: point for point in opened.scroll("docs", limit=100, with_vectors=True)[0]}
    made = {key: str(uuid.uuid5(to_qdrant.ID_SPACE, key)) for key in ("doc-1", "-1")}
    assert found.keys() == {7, 8, HAS_ID, *made.values()}
    assert found[7].payload == {"key": 7, "size": str(2**70), "body": "text 0"}
    assert found[made["doc-1"]].payload == {"key": "doc-1", "size": [1], "body": "text 4"}  # the last of the two
    unit = table.vectors[0] / np.linalg.norm(table.vectors[0])
    assert np.allclose(found[7].vector, unit, atol=1e-6)  # cosine: Qdrant keeps them at unit length
    hits = opened.query_points("docs", query=table.vectors[3].tolist(), limit=1).points
    assert hits[0].id == HAS_ID
    with pytest.raises(WrongUsage, match="vectors of 4 components, and these have 5"):
        write(sink, table_of(1, width=5))
    sink.finish(["docs"])
    opened.delete_collection("docs")
    with pytest.raises(Stopped, match="was deleted during the job"):
        sink.finish(["docs"])


def test_a_folder_that_another_process_has_open(client: Any, tmp_path: Path) -> None:
    program = (
        "import sys; from qdrant_client import QdrantClient\n"
        "client = QdrantClient(path=sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], **pipes) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(WrongUsage, match="Another process has the folder"):
            QdrantSink(f"qdrant:{tmp_path}/docs").begin(resumed=False, overwrite=False, width=4)
        other.stdin.close()


@contextmanager
def scripted(*statuses: int) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """A server that answers with those statuses, then as Qdrant does. Gives its address, and what it is sent."""
    script, received = list(statuses), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            received.append((self.command, self.headers.get("api-key", ""), json.loads(raw) if raw else None))
            status = script.pop(0) if script else 200
            vectors = {"size": 4, "distance": "Cosine"}
            result: Any = {"exists": True}
            if self.command == "PUT":
                result = {"operation_id": 1, "status": "completed"}
            elif not self.path.endswith("/exists"):
                result = INFO | {"config": {**INFO["config"], "params": {"vectors": vectors}}}
            body = json.dumps({"result": result, "status": "ok", "time": 0.1}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"qdrant:http://127.0.0.1:{server.server_port}/docs", received
    finally:
        server.shutdown()
        server.server_close()


HNSW = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10_000}
OPTIMIZER = {
    "deleted_threshold": 0.2,
    "vacuum_min_vector_number": 1_000,
    "default_segment_number": 0,
    "flush_interval_sec": 5,
}
INFO: dict[str, Any] = {
    "status": "green",
    "optimizer_status": "ok",
    "segments_count": 1,
    "payload_schema": {},
    "config": {"hnsw_config": HNSW, "optimizer_config": OPTIMIZER},
}


def test_a_server_that_is_busy_is_asked_again(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDRANT_API_KEY", "k")
    with scripted(503, 429) as (output, received), pytest.warns(UserWarning, match="insecure connection"):
        write(QdrantSink(output), table_of(*range(3)))
    assert [command for command, _, _ in received[2:]] == ["GET", "GET", "PUT"]
    assert {key for _, key, _ in received} == {"k"}
    assert received[-1][2]["batch"]["ids"] == [0, 1, 2]


def test_a_key_that_is_refused_and_a_server_that_is_not_there(client: Any) -> None:
    with scripted(401) as (output, _), pytest.raises(WrongUsage, match=r"HTTP 401 .* Is QDRANT_API_KEY right"):
        QdrantSink(output).begin(resumed=False, overwrite=False, width=4)
    with pytest.raises(NothingListens, match="does not answer"):
        QdrantSink("qdrant:http://127.0.0.1:1/docs").begin(resumed=False, overwrite=False, width=4)
