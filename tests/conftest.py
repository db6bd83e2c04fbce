"""For every test: no setting of the person who runs them leaks in."""

import os

KEPT = {"EMBEDMESH_ASSETS_DIR", "EMBEDMESH_TEST_DATA"}  # where files are, not how we behave

for name in [name for name in os.environ if name.startswith("EMBEDMESH_") and name not in KEPT]:
    del os.environ[name]
