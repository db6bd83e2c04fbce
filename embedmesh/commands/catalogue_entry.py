"""What a catalogue would say of a model folder, as `embedmesh models inspect`, `fetch` and `quantize` print it."""

from pathlib import Path

import orjson

from embedmesh.commands.output import CommandResult
from embedmesh.rules.models import Tier


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
    entry: dict[str, object] = {
        "id": model_id,
        "folder": str(folder),
        "width": read.width,
        "max_tokens": read.max_tokens,
        "digest": digest(folder),
        "token_ids": "cl100k",
        "tier": tier,
    }
    prompts = {role: text for role, text in read.prompts.items() if role in ("query", "document")}
    lines = ["[[models]]", *(f"{name} = {_toml(value)}" for name, value in entry.items())]
    if prompts:
        lines.append("prompts = { " + ", ".join(f"{role} = {_toml(text)}" for role, text in prompts.items()) + " }")
    lines.append("# price = 10_000_000  # nano-USD per million tokens: $0.01; else the file's [defaults]")
    memory = f"{_gb(expected.memory_bytes)} of memory, {_gb(expected.loading_bytes)} while it loads"
    lines.append(f"# estimated, here, in the tier {tier}: {memory}")
    if expected.tokens_per_s is not None:
        length = min(LENGTH, read.max_tokens)
        lines.append(f"# and {expected.tokens_per_s:,} tokens a second, in texts of {length}, on {cores} cores")
    value = {**entry, "prompts": prompts, "estimate": {**expected._asdict(), "cores": cores}}
    return CommandResult(value, "\n".join(lines), note)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _toml(value: object) -> str:
    """A number or a string in TOML (a JSON string is a basic string)."""
    return orjson.dumps(value).decode()
