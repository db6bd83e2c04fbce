"""What a catalogue would say of a model folder, as `embedmesh models inspect`, `fetch` and `quantize` print it."""

from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from embedmesh.commands.output import CommandResult
from embedmesh.rules.models import Tier

if TYPE_CHECKING:  # the commands come without the engine's libraries
    from embedmesh.engine.folder import Folder

PRICE = "# price = 10_000_000  # nano-USD per million tokens: $0.01; else the file's [defaults]"
SEARCH_PRICE = "# or search_price = 100_000  # nano-USD for a query with up to 100 documents: $0.0001"


def catalogue_entry(folder: Path, model_id: str, tier: Tier = "exact", note: str = "") -> CommandResult:
    """The entry as TOML or JSON. Raises SetupError where the folder holds no model.

    What the model will take and do here stands there, too: in TOML as a comment, since people append it to a catalogue.
    """
    from embedmesh.engine.estimate import LENGTH, estimate
    from embedmesh.engine.folder import digest, read_folder
    from embedmesh.engine.threads import threads_here

    read = read_folder(folder)
    cores = threads_here()
    expected = estimate(read, tier, cores)
    entry: dict[str, object] = {"id": model_id, "folder": str(folder), **_form(read), "digest": digest(folder)}
    if not read.reranks:
        entry["token_ids"] = "cl100k"
    entry["tier"] = tier
    prompts = {role: text for role, text in read.prompts.items() if role in ("query", "document")}
    lines = ["[[models]]", *(f"{name} = {_toml(value)}" for name, value in entry.items())]
    if prompts:
        lines.append("prompts = { " + ", ".join(f"{role} = {_toml(text)}" for role, text in prompts.items()) + " }")
    lines += [PRICE, SEARCH_PRICE] if read.reranks else [PRICE]
    memory = f"{_gb(expected.memory_bytes)} of memory, {_gb(expected.loading_bytes)} while it loads"
    lines.append(f"# estimated, here, in the tier {tier}: {memory}")
    if expected.tokens_per_s is not None:
        length = min(LENGTH, read.max_tokens)
        lines.append(f"# and {expected.tokens_per_s:,} tokens a second, in texts of {length}, on {cores} cores")
    value = {**entry, **({} if read.reranks else {"prompts": prompts})}
    value["estimate"] = {**expected._asdict(), "cores": cores}
    return CommandResult(value, "\n".join(lines), note)


def _form(read: "Folder") -> dict[str, object]:
    """What the model gives, and for how much text."""
    gives: dict[str, object] = {"width": read.width}
    if read.reranks:
        gives = {"modalities": ["rerank"], "scores": read.scores}
    return gives | {"max_tokens": read.max_tokens}


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _toml(value: object) -> str:
    """A number, a string or a list of strings in TOML (in JSON they are written alike)."""
    return orjson.dumps(value).decode()
