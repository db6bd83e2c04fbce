"""The pages on engines: their programs run as they are, where the engine is installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.gateway import KEY, ScriptedGateway

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = [
    pytest.param(engine, program, id=f"{engine} {number}")
    for engine in ("daft", "ray", "pyspark", "datasets")
    for number, program in enumerate(
        re.findall(
            r"```python\n(.+?)```", (ROOT / f"docs/how-to/{engine.removeprefix('py')}.md").read_text("utf-8"), re.S
        )
    )
    if "with nodes(" not in program  # tests/engines/test_nodes.py
]

RUN_S = 280  # of a starved machine; Spark starts in ten seconds on another


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("engine", "program"), PROGRAMS)
def test_a_program_runs_as_it_is(gateway: ScriptedGateway, tmp_path: Path, engine: str, program: str) -> None:
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed here: `make bench-engines` has it")
    import pyarrow
    import pyarrow.parquet

    texts = [f"line {number}" for number in range(1_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "texts.parquet")
    program = program.replace("http://127.0.0.1:8080/v1", gateway.base_url).replace("em_…", KEY)
    variables = {"EMBEDMESH_BASE_URL": gateway.base_url, "EMBEDMESH_API_KEY": KEY, "HOME": str(tmp_path)}
    variables["PYSPARK_PYTHON"] = sys.executable
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | variables, capture_output=True, timeout=RUN_S
    )
    assert done.returncode == 0, done.stderr.decode()
    assert sorted(text for one in gateway.received for text in one.body["input"]) == sorted(texts)
    written = list((tmp_path / "vectors").rglob("*")) if (tmp_path / "vectors").exists() else []
    assert written or b"(" in done.stdout
