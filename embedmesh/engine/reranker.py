"""What a folder says of a cross-encoder: which number is its score, and what computes it.

CrossEncoder of sentence-transformers writes such folders, since its version 6 with a `modules.json`; without one, any
folder is a reranker whose config.json names a class with a head for whole texts (`layout.is_classifier`).
"""

from pathlib import Path

from embedmesh.engine.jsonfile import Fields, only_known, refused
from embedmesh.engine.layout import CROSS_ENCODER
from embedmesh.engine.modules import Modules, Pooling, list_modules, read_modules
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model, Scores

OLD_ACTIVATION = "sbert_ce_default_activation_function"  # before version 4
ACTIVATIONS: dict[object, Scores] = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "raw",
    "torch.nn.Identity": "raw",
}
HEAD_POOLINGS: tuple[Pooling, ...] = ("cls", "mean")
DEFAULT_LABELS = 2  # of transformers, where config.json does not say
LABELS_TOLD_MAX = 5
SENTENCES_KNOWN: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("__version__", "prompts", "requirements", "activation_fn", "keep_in_fp32_modules"), ()),
    "default_prompt_name": (None,),
    "model_type": (CROSS_ENCODER,),
}
SENTENCE_KNOWN: dict[str, tuple[object, ...]] = {
    "transformer_task": ("sequence-classification",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "logits"}},),
    "module_output_name": ("scores",),
}
"""What a Transformer module's config has where its own head gives the scores."""


def read_scores(path: Path, config: Fields, sentences: Fields) -> Scores:
    """What the score of a pair is, by the activation function that is named last. Raises SetupError for an unknown one.

    `sentences` is config_sentence_transformers.json of a folder that CrossEncoder saved, else nothing.
    """
    named = sentences.get("activation_fn")
    if named is None:
        newer = config.get("sentence_transformers")
        if isinstance(newer, dict) and "activation_fn" in newer:
            named = newer["activation_fn"]
        else:
            named = config.get(OLD_ACTIVATION)
    if named is None:
        return "sigmoid"
    if not isinstance(named, str) or named not in ACTIVATIONS:
        raise refused(path, f"its scores' activation function is {named!r}"[:160])
    return ACTIVATIONS[named]


def check_scores(model: Model, scores: Scores | None) -> None:
    """Raises SetupError where the catalogue says another thing of a model than its folder, whose `scores` are these."""
    does = {None: "makes vectors", "sigmoid": "has scores of the kind sigmoid", "raw": "has scores of the kind raw"}
    said = model.scores if model.reranks else None
    if said != scores:
        raise SetupError(f"By the catalogue {model.id} {does[said]}; its folder {does[scores]}. Mend the catalogue.")


def read_head(path: Path, config: Fields, width: int, *, saved: bool) -> Modules:
    """What stands behind the token states, which are `width` wide. Raises SetupError for other than one score.

    Without dense layers it is the head of the architecture, on what the pooling gives. `saved`: there is a
    `modules.json`.
    """
    if saved and len(list_modules(path)) > 1:
        modules = read_modules(path, width, result="scores")
        if not modules.dense or modules.dense[-1].outputs != 1 or modules.normalize:
            raise refused(path, "its modules give no single score")
        return modules
    check_labels(path, config)
    pooling: Pooling = "cls"
    if config.get("model_type") == "modernbert":
        pooling = config.get("classifier_pooling", "cls")
        only_known({"classifier_pooling": pooling}, {"classifier_pooling": HEAD_POOLINGS}, "config.json", path)
    return Modules(pooling, (), normalize=False)


def check_labels(path: Path, config: Fields) -> None:
    """A head of several labels sorts texts into classes; none of its numbers is a score. Raises SetupError."""
    labels = config.get("id2label")
    names = [str(label) for label in labels.values()] if isinstance(labels, dict) else []
    number = len(names) if names else config.get("num_labels", DEFAULT_LABELS)
    if number != 1:
        told = f" ({', '.join(names[:LABELS_TOLD_MAX])[:80]})" if names else ""
        raise SetupError(
            f"Model folder {path.name} cannot be served: it sorts texts into {number} labels{told}. A reranker has one."
        )
