"""The models that a gateway serves: the catalogue, each model's tokenizer, and which vectors have unit length."""

from collections.abc import Iterable
from pathlib import Path

from embedmesh.catalogue import Catalogue, load_catalogue, refuse_new_meanings
from embedmesh.engine.folder import read_folder
from embedmesh.engine.reranker import check_scores
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Tokenizer


class Models:
    """A catalogue, with what its models' folders say, by model id. All of it may change while it is used.

    `known` has every model and name since the start, and so have the other two: what has begun with one goes on.
    """

    def __init__(self, catalogue: Catalogue, tokenizers: dict[str, Tokenizer], normalizing: Iterable[str]) -> None:
        self.catalogue = catalogue
        self.known = Catalogue(catalogue.models)
        self.tokenizers = tokenizers
        self.normalizing = set(normalizing)

    def read_again(self, path: Path | None) -> "Models":
        """What the catalogue's file holds now. Takes long where there are new models. Raises SetupError."""
        catalogue = load_catalogue(path, assets=assets_dir())
        refuse_new_meanings(self.known, catalogue, "the built-in catalogue" if path is None else str(path))
        new = [model for model in catalogue.models if model.id not in self.tokenizers]
        return Models(catalogue, _tokenizers(new), _normalizing(new))

    def become(self, other: "Models") -> None:
        """Have what the other one has, which `read_again` made. First what belongs to a model, then the model."""
        self.tokenizers |= other.tokenizers
        self.normalizing |= other.normalizing
        self.known.add(other.catalogue)
        self.catalogue.become(other.catalogue)


def load_models(path: Path | None) -> Models:
    """The models of a catalogue's file, or of the built-in catalogue. Raises SetupError."""
    catalogue = load_catalogue(path, assets=assets_dir())
    return Models(catalogue, _tokenizers(catalogue.models), _normalizing(catalogue.models))


def _normalizing(models: Iterable[Model]) -> set[str]:
    """Raises SetupError where a model's folder gives other numbers than the catalogue says: callers would see them."""
    normalizing: set[str] = set()
    for model in models:
        if model.foreign:
            continue
        folder = read_folder(Path(model.folder))
        check_scores(model, folder.scores)
        if folder.normalize:
            normalizing.add(model.id)
    return normalizing


def _tokenizers(models: Iterable[Model]) -> dict[str, Tokenizer]:
    """Each model's own tokenizer, by model id. Raises SetupError if a folder has none, or a prompt is too long."""
    tokenizers: dict[str, Tokenizer] = {}
    by_folder: dict[tuple[str, int], Tokenizer] = {}  # the tiers of a model share one
    for model in models:
        if model.foreign:
            continue
        tokenizer = by_folder.get((model.folder, model.max_tokens))
        if tokenizer is None:
            tokenizer = made = ModelTokenizer(Path(model.folder), model.max_tokens)
            made.prepare()
            by_folder[model.folder, model.max_tokens] = tokenizer
        for role, prompt in model.prompts.items():
            if len(tokenizer.ids([prompt])[0]) + tokenizer.specials >= model.max_tokens:
                raise SetupError(f"The prompt `{role}` of {model.id} leaves no room for a text. Mend the catalogue.")
        tokenizers[model.id] = tokenizer
    return tokenizers
