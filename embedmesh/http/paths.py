"""Aliases of routes, for clients of Azure's API and clients with a base URL of another form."""

EMBEDDINGS_PATH, MODELS_PATH, MODEL_PATH = "/v1/embeddings", "/v1/models", "/v1/models/*"
GENERATING_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/images/generations")

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
    **{f"/v1/models/*:{verb}": f"/v1beta/models/*:{verb}" for verb in ("embedContent", "batchEmbedContents")},
    **{path.removeprefix("/v1"): path for path in GENERATING_PATHS},
    **{f"/openai{path}": path for path in GENERATING_PATHS},
}
"""Alias -> path of the route, both as `embedmesh.http.routing.Routes` writes them."""
