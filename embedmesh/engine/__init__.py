"""The inside of a node: model folder -> graph -> batches -> vectors. It knows nothing of HTTP, callers or money."""

import sys

# `import openvino` also imports its model converter if it can. We convert nothing: without it a worker starts 50 ms
# sooner and needs 8 MB less.
sys.modules.setdefault("openvino.tools", None)  # type: ignore[arg-type]
