"""What a catalogue would say of a model folder, as `embedmesh models inspect`, `fetch` and `quantize` print it."""

from pathlib import Path

import orjson

from embedmesh.commands.output import CommandResult


def catalogue_entry(folder: Path, model_id: str, tier: str = "exact", note: str = "") -> CommandResult:
    """The entry as TOML or JSON. Raises SetupError where the folder holds no model."""
    from embedmesh.engine.folder import digest, read_folder

    read = read_folder(folder)
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
    return CommandResult({**entry, "prompts": prompts}, "\n".join(lines), note)


def _toml(value: object) -> str:
    """A number or a string in TOML (a JSON string is a basic string)."""
    return orjson.dumps(value).decode()
