"""The inside of a node: model folder -> graph -> batches -> vectors. It knows nothing of HTTP, callers or money."""
