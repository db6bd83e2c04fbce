"""The models that a gateway serves: the catalogue, each model's tokenizer, and which vectors have unit length."""

from pathlib import Path
from typing import NamedTuple

from embedmesh.catalogue import Catalogue, load_catalogue
from embedmesh.engine.folder import read_folder
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.errors import SetupError
from embedmesh.rules.ports import Tokenizer


class Models(NamedTuple):
    """A catalogue, with what its models' folders say. `normalizing` are ids of models."""

    catalogue: Catalogue
    tokenizers: dict[str, Tokenizer]
    normalizing: frozenset[str]


def load_models(path: Path | None) -> Models:
    """The models of a catalogue's file, or of the built-in catalogue. Raises SetupError."""
    catalogue = load_catalogue(path, assets=assets_dir())
    here = [model for model in catalogue.models if not model.foreign]
    normalizing = frozenset(model.id for model in here if read_folder(Path(model.folder)).normalize)
    return Models(catalogue, _tokenizers(catalogue), normalizing)


def _tokenizers(catalogue: Catalogue) -> dict[str, Tokenizer]:
    """Each model's own tokenizer, by model id. Raises SetupError if a folder has none, or a prompt is too long."""
    tokenizers: dict[str, Tokenizer] = {}
    by_folder: dict[tuple[str, int], Tokenizer] = {}  # the tiers of a model share one
    for model in catalogue.models:
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
