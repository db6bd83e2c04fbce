"""Runs inside the image: every kind of model folder gives its reference's vectors. `families.py GOLDENS`."""

import json
import sys
from pathlib import Path

import numpy as np

from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.engine.plan import pad_length
from embedmesh.engine.tokens import ModelTokenizer

DIFF_MAX = 1e-5
TOKENS_MAX = 40  # that the folders of `folders` take


def difference(folder: Path) -> float:
    """Largest of any component of unit vectors."""
    if (folder / "expected.npz").exists():
        with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
            expected, ids, lengths = arrays["vectors"], arrays["ids"], arrays["lengths"]
        sequences = [each.tolist() for each in np.split(ids, np.cumsum(lengths)[:-1])]
    else:
        said = json.loads((folder / "expected.json").read_text())
        tokenizer = ModelTokenizer(folder, TOKENS_MAX)
        sequences = [tokenizer.with_specials(ids) for ids in tokenizer.ids(said["texts"])]
        expected = np.array(said["vectors"])
    model = CompiledModel(read_folder(folder), threads=1)
    found = np.concatenate([model.run([ids], 1, pad_length(len(ids))) for ids in sequences])
    units = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9) for rows in (found, expected)]
    return float(np.abs(units[0] - units[1]).max())


def main() -> int:
    """One line; 1 where a folder is off."""
    folders = sorted(path.parent for path in Path(sys.argv[1]).rglob("expected.*"))
    found = {folder.name: difference(folder) for folder in folders}
    worst = max(found, key=found.__getitem__)
    print(f"{len(found)} kinds of folders, the worst, {worst}, off by {found[worst]:.0e}")
    return 1 if found[worst] > DIFF_MAX or not found else 0


if __name__ == "__main__":
    sys.exit(main())
