"""The inside of a node: model folder -> graph -> batches -> vectors. It knows nothing of HTTP, callers or money."""

import sys

# `import openvino` brings its model converter along, and goes on without where that is not to be had. We convert
# nothing: 50 ms of a worker's start and 8 MB of its memory.
sys.modules.setdefault("openvino.tools", None)  # type: ignore[arg-type]
