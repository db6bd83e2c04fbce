"""What to say to a caller whose model does something else."""

from embedmesh.rules.errors import UnsupportedModality
from embedmesh.rules.generation import PATHS
from embedmesh.rules.models import Modality, Model

DOES: dict[Modality, str] = {
    "embeddings": "makes vectors (POST /v1/embeddings)",
    "rerank": "reranks documents (POST /v1/rerank)",
    "chat": f"chats (POST /v1/{PATHS['chat']})",
    "completions": f"completes text (POST /v1/{PATHS['completions']})",
    "images": f"makes images (POST /v1/{PATHS['images']})",
}


def unsupported_modality(model: Model) -> UnsupportedModality:
    """The failure says what the model does, and on which path."""
    does = " and ".join(DOES[modality] for modality in model.modalities)
    return UnsupportedModality(f"{model.id} {does}. Use that path, or another model.", param="model")
