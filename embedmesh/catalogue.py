"""The operator's catalogue of models: a TOML file, read once at start, strictly.

docs/reference/catalogue.md says what may stand in it. The built-in catalogue has the default model; a file of the
operator replaces it whole.
"""

import re
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, cast

import msgspec
from msgspec import Meta

from embedmesh.rules.embeddings import Role
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import REQUEST_TOKENS_MAX
from embedmesh.rules.models import TIERS, Model, Tier, TokenIds

FILE_BYTES_MAX = 4 * 1024 * 1024  # about ten thousand models
WIDTH_MAX = 65_536  # sixteen times the widest model we know of; bounds the size of a reply
PRICE_MAX = 10**15  # a million USD per million tokens; the dearest request then still fits 64 bits
PROMPT_CHARS_MAX = 1_024  # a prompt is a few words and is paid with every text
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")  # stands in paths, headers and file names as it is

Price = Annotated[int, Meta(ge=0, le=PRICE_MAX)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """`[[models]]` as it is written; `Model` says what each member means."""

    id: str
    width: Annotated[int, Meta(ge=1, le=WIDTH_MAX)]
    max_tokens: Annotated[int, Meta(ge=1, le=REQUEST_TOKENS_MAX)]
    folder: Annotated[str, Meta(min_length=1)] | None = None
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    price: Price | None = None
    aliases: tuple[str, ...] = ()
    token_ids: TokenIds = "cl100k"
    prompts: dict[Role, Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)]] = {}
    tier: Tier = "exact"


class _Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    price: Price | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    models: Annotated[list[_Entry], Meta(min_length=1)]
    defaults: _Defaults = _Defaults()


class Catalogue:
    """The models that may be served, findable by id, alias, and either with a tier suffix.

    A name without a suffix means the first model of that name, so that nobody's numbers change when a tier is added.
    `written` are those of `models` that somebody asked for by an entry of their own.
    """

    def __init__(self, models: tuple[Model, ...], *, written: tuple[Model, ...] | None = None) -> None:
        """Names are unique in each tier; `load_catalogue` has checked that."""
        self.models = models
        self.written = models if written is None else written
        self._by_name: dict[str, Model] = {}
        for model in models:
            for name in _plain_names(model):
                self._by_name.setdefault(f"{name}:{model.tier}", model)
                self._by_name.setdefault(name, model)

    @property
    def names(self) -> Iterable[str]:
        """Every name that finds a model: ids and aliases, with and without a tier."""
        return self._by_name.keys()

    def find(self, name: str) -> Model | None:
        """The model called `name`, or None."""
        return self._by_name.get(name)


def load_catalogue(file: Path | None, *, assets: Path) -> Catalogue:
    """Read the operator's `file`, or the built-in catalogue where it is None.

    Folders are relative to the file; those of the built-in catalogue to `assets`, where set-up puts what it fetches.
    Whether they exist is not looked at here. Raises SetupError naming file and member.
    """
    if file is None:
        text = (resources.files("embedmesh") / "data" / "catalogue.toml").read_text("utf-8")
        return parse_catalogue(text, name="the built-in catalogue", base=assets)
    return parse_catalogue(_read(file), name=str(file), base=file.absolute().parent)


def parse_catalogue(text: str, *, name: str, base: Path) -> Catalogue:
    """The catalogue that `text` (TOML) writes down. `name` is for the one line that a SetupError says."""
    try:
        written = msgspec.convert(tomllib.loads(text), _File)
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"{name} is not TOML: {error}.") from None
    except RecursionError:
        raise SetupError(f"{name} is not TOML: it is nested too deep.") from None
    except msgspec.ValidationError as error:
        raise SetupError(f"{name}: {_place_first(str(error))}.") from None
    models = [_model(entry, number, written.defaults, name, base) for number, entry in enumerate(written.models)]
    _refuse_shared_names(models, name)
    named = _with_tiers(models)
    return Catalogue((*named, *_fast_ones(named)), written=named)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            raise SetupError(f"{file} is larger than {FILE_BYTES_MAX:,} bytes: that is no catalogue.")
        return raw.decode("utf-8")
    except OSError as error:
        raise SetupError(f"The catalogue {file} cannot be read ({error.strerror}). Mend --catalogue.") from None
    except UnicodeDecodeError:
        raise SetupError(f"{file} is not UTF-8 text. Save it as UTF-8.") from None


def _model(entry: _Entry, number: int, defaults: _Defaults, name: str, base: Path) -> Model:
    place = f"models[{number}]"
    for member, called in [("id", entry.id), *((f"aliases[{i}]", alias) for i, alias in enumerate(entry.aliases))]:
        if not NAME.fullmatch(called):
            raise SetupError(
                f"{name}: {place}.{member}: a name has 1 to 200 of the characters A-Z a-z 0-9 . _ : / @ + -"
                " and begins with a letter or digit."
            )
        if called.rpartition(":")[2] in TIERS and ":" in called:
            raise SetupError(f"{name}: {place}.{member}: a name must not end in a tier; write tier = instead.")
    price = entry.price if entry.price is not None else defaults.price
    if price is None:
        raise SetupError(f"{name}: {place}.price is missing, and [defaults] has no price either.")
    if (entry.folder is None) != (entry.digest is None):
        raise SetupError(f"{name}: {place} has one of folder and digest: write both, or neither for a foreign model.")
    return Model(
        id=entry.id,
        folder=str(base / Path(entry.folder).expanduser()) if entry.folder is not None else "",
        width=entry.width,
        max_tokens=entry.max_tokens,
        price=price,
        digest=entry.digest or "",
        aliases=entry.aliases,
        token_ids=entry.token_ids,
        prompts=cast(dict[str, str], entry.prompts),
        tier=entry.tier,
    )


def _with_tiers(written: Sequence[Model]) -> tuple[Model, ...]:
    """The same, an id that comes again under the name of its tier."""
    seen: set[str] = set()
    named = []
    for model in written:
        named.append(_in_tier(model, model.tier) if model.id in seen else model)
        seen.add(model.id)
    return tuple(named)


def _fast_ones(written: Sequence[Model]) -> tuple[Model, ...]:
    """Each exact model in the fast tier, where that has no entry: the same weights in other arithmetic need none."""
    there = {(name, model.tier) for model in written for name in _plain_names(model)}
    exact = [
        model
        for model in written
        if model.tier == "exact" and not model.foreign and (_plain_names(model)[0], "fast") not in there
    ]
    return tuple(_in_tier(model, "fast") for model in exact)


def _in_tier(model: Model, tier: Tier) -> Model:
    plain, *aliases = (f"{name}:{tier}" for name in _plain_names(model))
    return msgspec.structs.replace(model, id=plain, aliases=tuple(aliases), tier=tier)


def _plain_names(model: Model) -> list[str]:
    """Id and aliases, no tier suffix."""
    return [name.removesuffix(f":{model.tier}") for name in (model.id, *model.aliases)]


def _refuse_shared_names(models: Sequence[Model], name: str) -> None:
    """A name may stand once; entries of one id, which must differ in their tier, may share their aliases."""
    owners: dict[str, tuple[str, str]] = {}  # name -> id of the model that has it, and where that stands
    places: dict[tuple[str, str], str] = {}  # name and tier -> where it stands
    for number, model in enumerate(models):
        members = [("id", model.id), *((f"aliases[{i}]", alias) for i, alias in enumerate(model.aliases))]
        for member, called in members:
            place = f"models[{number}].{member}"
            owner, first = owners.setdefault(called, (model.id, place))
            other = first if owner != model.id else places.setdefault((called, model.tier), place)
            if other != place:
                raise SetupError(f"{name}: {place} is {called}, as {other} is. Every name may stand once in a tier.")


def _place_first(message: str) -> str:
    """msgspec's `Expected ... - at `$.models[0].width`` as `models[0].width: expected ...`."""
    said, _, where = message.partition(" - at `")
    place = re.sub(r"^key` in `", "", where).strip("$.`")
    said = said[0].lower() + said[1:]
    return f"{place}: {said}" if place else said
