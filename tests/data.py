"""Where tests find what is not committed: other people's test data, and the default model's files. And how many
examples they try of one kind: a part of them, or all by `make thorough`.

Each has a `find_` form that answers None, and a form for tests that skips and says why.
"""

import os
from pathlib import Path

import pytest

from embedmesh.provision import assets

CHECKOUT = Path(__file__).parent.parent
DATA_FOLDER = "EMBEDMESH_TEST_DATA"
DEFAULT_MODEL = "all-MiniLM-L6-v2"
THOROUGH = os.environ.get("THOROUGH") == "1"


def quick_or(thorough: int, *, quick: int) -> int:
    """How many examples: more of the same kind, where somebody has the minutes for them."""
    return thorough if THOROUGH else quick


def find_outside_data(name: str) -> Path | None:
    """A file or folder of the outside test data: in $EMBEDMESH_TEST_DATA, else ../shared/data beside the checkout."""
    path = Path(os.environ.get(DATA_FOLDER) or CHECKOUT.parent / "shared" / "data") / name
    return path if path.exists() else None


def outside_data(name: str) -> Path:
    """As `find_outside_data`; skips the test where it is absent."""
    path = find_outside_data(name)
    if path is None:
        pytest.skip(f"{name} is not part of the product; set {DATA_FOLDER} to the folder that has it")
    return path


def find_model_folder(name: str = DEFAULT_MODEL) -> Path | None:
    """The folder of a model that `embedmesh setup` fetched, where the product itself looks for it."""
    folder = assets.model_folder(name)
    return folder if (folder / "model.safetensors").exists() else None


def model_folder(name: str = DEFAULT_MODEL) -> Path:
    """As `find_model_folder`; skips the test where it is absent."""
    folder = find_model_folder(name)
    if folder is None:
        pytest.skip(f"the files of {name} are not here; run `embedmesh setup`, or set EMBEDMESH_ASSETS_DIR")
    return folder
