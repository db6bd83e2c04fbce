"""The operator's catalogue of models: a TOML file, read strictly, at the start and when settings are read again.

docs/reference/catalogue.md documents it. The built-in catalogue has the default model; the operator's file replaces it
whole.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from embedmesh.files import path_in
from embedmesh.rules.embeddings import Role
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import (
    CATALOGUE_BYTES_MAX,
    CONTEXT_TOKENS_MAX,
    MODEL_PRICE_MAX,
    PROMPT_CHARS_MAX,
    REQUEST_TOKENS_MAX,
    TEMPLATE_TOKENS,
    TEMPLATE_TOKENS_MAX,
    VECTOR_WIDTH_MAX,
)
from embedmesh.rules.models import EMBEDDINGS, RERANK, TIERS, Modality, Model, Scores, Tier, TokenIds

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")  # used in paths, headers and file names as it is

Price = Annotated[int, Meta(ge=0, le=MODEL_PRICE_MAX)]
ImageSize = Annotated[str, Meta(pattern="^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
OUTPUT_MAX = 1_024  # tokens of an answer whose caller sets no limit, where the catalogue does not say
GENERATES_ONLY = (
    "output_price",
    "cached_price",
    "output_max",
    "image_tokens",
    "image_prices",
    "pass_unknown",
    "affinity",
)
EMBEDS_ONLY = ("width", "prompts")
ENCODES_ONLY = ("folder", "digest")  # what our nodes run has files
RERANKS_ONLY = ("scores", "search_price")


class CatalogueEntry(msgspec.Struct, forbid_unknown_fields=True):
    """`[[models]]` as it is written; `Model` documents each field."""

    id: str
    max_tokens: Annotated[int, Meta(ge=1, le=CONTEXT_TOKENS_MAX)]
    width: Annotated[int, Meta(ge=0, le=VECTOR_WIDTH_MAX)] = 0
    folder: Annotated[str, Meta(min_length=1)] | None = None
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    price: Price | None = None
    aliases: tuple[str, ...] = ()
    token_ids: TokenIds = "cl100k"
    prompts: dict[Role, Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)]] = {}
    tier: Tier = "exact"
    modalities: Annotated[tuple[Modality, ...], Meta(min_length=1, max_length=4)] = EMBEDDINGS
    output_price: Price | None = None
    cached_price: Price | None = None
    output_max: Annotated[int, Meta(ge=1, le=CONTEXT_TOKENS_MAX)] | None = None
    template_tokens: Annotated[int, Meta(ge=0, le=TEMPLATE_TOKENS_MAX)] = TEMPLATE_TOKENS
    image_tokens: Annotated[int, Meta(ge=1, le=CONTEXT_TOKENS_MAX)] | None = None
    image_prices: dict[ImageSize, Price] = {}
    pass_unknown: bool = False
    charge_partial: bool = False
    affinity: bool = False
    scores: Scores = "sigmoid"
    search_price: Price | None = None


class CatalogueDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[defaults]`."""

    price: Price | None = None


class CatalogueFile(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    models: Annotated[list[CatalogueEntry], Meta(min_length=1)]
    defaults: CatalogueDefaults = CatalogueDefaults()


class Catalogue:
    """Implements the port `Catalogue`: the models that may be served, by id, alias, and either with a tier suffix.

    A name without a suffix means the first model of that name, so that no vectors change when a tier is added.
    `written` are the `models` that have an entry of their own.
    """

    def __init__(self, models: tuple[Model, ...], *, written: tuple[Model, ...] | None = None) -> None:
        """Names are unique in each tier; `load_catalogue` has checked that."""
        self.models = models
        self.written = models if written is None else written
        self._by_name: dict[str, Model] = {}
        self.find: Callable[[str], Model | None] = self._by_name.get  # the model of that name, without a call of ours
        for model in models:
            for name in _plain_names(model):
                self._by_name.setdefault(f"{name}:{model.tier}", model)
                self._by_name.setdefault(name, model)

    def add(self, other: "Catalogue") -> None:
        """Have what the other one has, too; its own version of what both have."""
        ids = {model.id for model in other.models}
        self.models = (*other.models, *(model for model in self.models if model.id not in ids))
        self._by_name.update(other._by_name)

    def become(self, other: "Catalogue") -> None:
        """Have what the other one has. What both have is never missing, also for threads that look meanwhile."""
        self.models, self.written = other.models, other.written
        self._by_name.update(other._by_name)
        for gone in self._by_name.keys() - other._by_name.keys():
            del self._by_name[gone]

    @property
    def names(self) -> Iterable[str]:
        """Every name that finds a model: ids and aliases, with and without a tier."""
        return self._by_name.keys()


def load_catalogue(file: Path | None, *, assets: Path) -> Catalogue:
    """Read the operator's `file`, or the built-in catalogue where it is None.

    Folders are relative to the file; those of the built-in catalogue to `assets`, where set-up puts models. They need
    not exist. Raises SetupError naming file and field.
    """
    if file is None:
        text = (resources.files("embedmesh") / "data" / "catalogue.toml").read_text("utf-8")
        return parse_catalogue(text, name="the built-in catalogue", base=assets)
    return parse_catalogue(_read(file), name=str(file), base=file.absolute().parent)


def parse_catalogue(text: str, *, name: str, base: Path) -> Catalogue:
    """The catalogue in `text` (TOML). `name` is for the one line of a SetupError."""
    try:
        written = msgspec.convert(tomllib.loads(text), CatalogueFile)
    except RecursionError:
        raise SetupError(f"{name} is not TOML: it is nested too deep.") from None
    except msgspec.ValidationError as error:
        raise SetupError(f"{name}: {_position_first(str(error))}.") from None
    except ValueError as error:  # also of a number with thousands of digits
        raise SetupError(f"{name} is not TOML: {error}.") from None
    models = [_model(entry, number, written.defaults, name, base) for number, entry in enumerate(written.models)]
    _refuse_shared_names(models, name)
    named = _with_tiers(models)
    return Catalogue((*named, *_fast_ones(named)), written=named)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(CATALOGUE_BYTES_MAX + 1)
        if len(raw) > CATALOGUE_BYTES_MAX:
            raise SetupError(f"{file} is larger than {CATALOGUE_BYTES_MAX:,} bytes, so it is no catalogue.")
        return raw.decode("utf-8")
    except OSError as error:
        raise SetupError(f"The catalogue {file} cannot be read ({error.strerror}). Correct --catalogue.") from None
    except UnicodeDecodeError:
        raise SetupError(f"{file} is not UTF-8 text. Save it as UTF-8.") from None
    except ValueError:
        raise SetupError(f"The catalogue {str(file)!r} cannot be read: its name has a NUL. Correct it.") from None


def _model(entry: CatalogueEntry, number: int, defaults: CatalogueDefaults, name: str, base: Path) -> Model:
    position = f"models[{number}]"
    for field, called in _named_fields(entry):
        if not MODEL_NAME.fullmatch(called):
            raise SetupError(
                f"{name}: {position}.{field}: a name has 1 to 200 of the characters A-Z a-z 0-9 . _ : / @ + -"
                " and begins with a letter or digit."
            )
        if called.rpartition(":")[2] in TIERS and ":" in called:
            raise SetupError(f"{name}: {position}.{field}: a name must not end in a tier; write tier = instead.")
    if entry.modalities in (EMBEDDINGS, RERANK) and entry.max_tokens > REQUEST_TOKENS_MAX:
        raise SetupError(f"{name}: {position}.max_tokens: expected `int` <= {REQUEST_TOKENS_MAX}.")
    price = 0 if entry.search_price is not None else entry.price if entry.price is not None else defaults.price
    if price is None:
        raise SetupError(f"{name}: {position}.price is missing, and [defaults] has no price either.")
    if (entry.folder is None) != (entry.digest is None):
        raise SetupError(
            f"{name}: {position} has only one of folder and digest: write both, or none for a foreign model."
        )
    try:
        folder = str(path_in(base, entry.folder)) if entry.folder is not None else ""
    except ValueError as error:
        raise SetupError(f"{name}: {position}.folder {error}.") from None
    changed = {"folder": folder, "price": price, "digest": entry.digest or ""}
    changed |= _by_modality(entry, price, f"{name}: {position}")
    return Model(**msgspec.structs.asdict(entry) | changed)


def _by_modality(entry: CatalogueEntry, price: int, position: str) -> dict[str, Any]:
    """What the fields are that only some kinds of models have, where they are not written. Raises SetupError."""
    embeds, reranks = entry.modalities == EMBEDDINGS, entry.modalities == RERANK
    if len(entry.modalities) > 1 and {"embeddings", "rerank"} & set(entry.modalities):
        raise SetupError(
            f"{position}.modalities: a model makes vectors, reranks or generates: write an entry for each."
        )
    if len(set(entry.modalities)) < len(entry.modalities):
        raise SetupError(f"{position}.modalities names one twice.")
    if embeds and not entry.width:
        raise SetupError(f"{position}.width is missing: how many components a vector has.")
    if reranks and entry.search_price is not None and entry.price is not None:
        raise SetupError(f"{position} has price and search_price: a reranker is paid by tokens or by searches.")
    owners: dict[str, tuple[bool, tuple[str, ...]]] = {
        "makes vectors": (embeds, EMBEDS_ONLY),
        "reranks": (reranks, RERANKS_ONLY),
    }
    owners["makes vectors or reranks"] = embeds or reranks, ENCODES_ONLY
    owners["generates"] = not embeds and not reranks, GENERATES_ONLY
    written = CatalogueEntry(id=entry.id, max_tokens=entry.max_tokens)
    for kind, (is_one, fields) in owners.items():
        for field in fields:
            if not is_one and getattr(entry, field) != getattr(written, field):
                raise SetupError(
                    f"{position}.{field}: only a model that {kind} has it. Leave it out, or mend `modalities`."
                )
    if embeds or reranks:
        return {"width": entry.width or 1, "output_price": 0, "output_max": 0, "template_tokens": 0}
    if entry.max_tokens < (output_max := entry.output_max or min(OUTPUT_MAX, entry.max_tokens)):
        raise SetupError(f"{position}.output_max is more than max_tokens, which bounds prompt and output together.")
    if "images" in entry.modalities and not entry.image_prices:
        raise SetupError(f'{position}.image_prices is missing: write image_prices = {{"1024x1024" = 40_000_000}}.')
    output_price = price if entry.output_price is None else entry.output_price
    return {"output_price": output_price, "output_max": output_max}


def _with_tiers(written: Sequence[Model]) -> tuple[Model, ...]:
    """The same models; an id that occurs again is named with its tier."""
    seen: set[str] = set()
    named = []
    for model in written:
        named.append(_in_tier(model, model.tier) if model.id in seen else model)
        seen.add(model.id)
    return tuple(named)


def _fast_ones(written: Sequence[Model]) -> tuple[Model, ...]:
    """Each exact model in the fast tier, where that has no entry: it is the same weights in other arithmetic."""
    written_as = {(name, model.tier) for model in written for name in _plain_names(model)}
    exact = [
        model
        for model in written
        if model.tier == "exact" and not model.foreign and (_plain_names(model)[0], "fast") not in written_as
    ]
    return tuple(_in_tier(model, "fast") for model in exact)


def _in_tier(model: Model, tier: Tier) -> Model:
    plain, *aliases = (f"{name}:{tier}" for name in _plain_names(model))
    return msgspec.structs.replace(model, id=plain, aliases=tuple(aliases), tier=tier)


def _plain_names(model: Model) -> list[str]:
    """Id and aliases, no tier suffix."""
    return [name.removesuffix(f":{model.tier}") for name in (model.id, *model.aliases)]


def _refuse_shared_names(models: Sequence[Model], name: str) -> None:
    """Every name occurs once; entries of one id, which must differ in their tier, may share their aliases."""
    owners: dict[str, tuple[str, str]] = {}  # name -> id of its model, and where it is written
    positions: dict[tuple[str, str], str] = {}  # name and tier -> where it is written
    for number, model in enumerate(models):
        for field, called in _named_fields(model):
            position = f"models[{number}].{field}"
            owner, first = owners.setdefault(called, (model.id, position))
            other = first if owner != model.id else positions.setdefault((called, model.tier), position)
            if other != position:
                raise SetupError(f"{name}: {position} is {called}, as {other} is. Every name may occur once in a tier.")


def _named_fields(entry: CatalogueEntry | Model) -> list[tuple[str, str]]:
    """Every field that holds a name of the model, and the name."""
    return [("id", entry.id), *((f"aliases[{at}]", alias) for at, alias in enumerate(entry.aliases))]


def _position_first(message: str) -> str:
    """msgspec's `Expected ... - at `$.models[0].width`` as `models[0].width: expected ...`."""
    problem, _, where = message.partition(" - at `")
    position = re.sub(r"^key` in `", "", where).strip("$.`")
    problem = problem[0].lower() + problem[1:]
    return f"{position}: {problem}" if position else problem


# What may change under a model's name while a program runs: money, more names, and what vectors do not depend on. What
# is not here makes another model: two vectors that are compared must not be of two.
MAY_CHANGE = frozenset(
    {
        "aliases",
        "folder",  # the digest is of what is in it
        "price",
        "output_price",
        "cached_price",
        "image_prices",
        "output_max",
        "template_tokens",
        "image_tokens",
        "pass_unknown",
        "charge_partial",
        "affinity",
        "search_price",
    }
)
NAMES_KNOWN_MAX = 100_000  # over all catalogues since the start: a thousand times what operators have


def refuse_new_meanings(known: Catalogue, new: Catalogue, file: str) -> None:
    """Raises SetupError where the `new` catalogue, in `file`, gives a name of the `known` one to something else."""
    for name in new.names:
        before, model = known.find(name), new.find(name)
        assert model is not None
        if before is not None and (other := differing(before, model) - MAY_CHANGE):
            plain, what = name.removesuffix(f":{model.tier}"), " and ".join(sorted(other))
            raise SetupError(
                f"{file}: {plain} has another {what} than since the start. One name must not have two kinds of "
                "vectors: give the new model a name of its own, or restart."
            )
    if len({*known.names, *new.names}) > NAMES_KNOWN_MAX:
        raise SetupError(f"{file}: there were more than {NAMES_KNOWN_MAX:,} names since the start. Restart.")


def differing(one: Model, other: Model) -> set[str]:
    """The fields in which two models differ."""
    return {field for field in one.__struct_fields__ if getattr(one, field) != getattr(other, field)}
