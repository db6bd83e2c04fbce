"""Aliases of routes, for clients of Azure's API and clients with a base URL of another form."""

EMBEDDINGS_PATH, MODELS_PATH, MODEL_PATH = "/v1/embeddings", "/v1/models", "/v1/models/*"

OTHER_PATHS = {
    "/embeddings": EMBEDDINGS_PATH,
    "/v1/embeddings/": EMBEDDINGS_PATH,
    "/openai/v1/embeddings": EMBEDDINGS_PATH,
    "/openai/deployments/*/embeddings": EMBEDDINGS_PATH,  # the path names the model
    "/models": MODELS_PATH,
    "/v1/models/": MODELS_PATH,
    "/openai/models": MODELS_PATH,
    "/openai/v1/models": MODELS_PATH,
    "/models/*": MODEL_PATH,
    "/openai/models/*": MODEL_PATH,
    "/openai/v1/models/*": MODEL_PATH,
}
"""Alias -> path of the route, both as `embedmesh.http.routing.Routes` writes them."""
