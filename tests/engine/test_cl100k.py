"""The table of ranks: what is none is refused in one line."""

from pathlib import Path

import pytest

from embedmesh.engine.cl100k import Cl100k
from embedmesh.rules.errors import SetupError


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), (b"", "damaged"), (b"IQ== 0\n", "damaged"), (b"A", "damaged")]
)
def test_a_file_that_is_no_table_of_ranks_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    """Missing, empty, cut short, or no base64."""
    path = tmp_path / "ranks"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SetupError, match=says):
        Cl100k(path)
