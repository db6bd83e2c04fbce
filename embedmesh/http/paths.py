"""Other paths of the same routes: those that clients of Azure, and clients with a base URL of another form, ask for."""

EMBEDDINGS, MODELS, MODEL = "/v1/embeddings", "/v1/models", "/v1/models/*"

OTHER_PATHS = {
    "/embeddings": EMBEDDINGS,
    "/v1/embeddings/": EMBEDDINGS,
    "/openai/v1/embeddings": EMBEDDINGS,
    "/openai/deployments/*/embeddings": EMBEDDINGS,  # the path names the model
    "/models": MODELS,
    "/v1/models/": MODELS,
    "/openai/models": MODELS,
    "/openai/v1/models": MODELS,
    "/models/*": MODEL,
    "/openai/models/*": MODEL,
    "/openai/v1/models/*": MODEL,
}
"""Path -> the route that it is, both as `embedmesh.http.server.Routes` writes them."""
