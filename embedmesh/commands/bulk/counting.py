"""Tokens of texts, where this machine has the model's tokenizer, and what a million cost: for `--dry-run`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from embedmesh.bulk.estimate import CountTokens
from embedmesh.catalogue import load_catalogue
from embedmesh.commands.account_client import AccountClient
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.errors import SetupError

TEXT_BYTES_A_TOKEN = 4  # of English; of other languages half of it


def counter_for(fields: dict[str, Any]) -> tuple[CountTokens, str]:
    """Counts as the gateway does, if the catalogue here has the model; and in words how it counts."""
    given = os.environ.get("EMBEDMESH_CATALOGUE")
    try:
        model = load_catalogue(Path(given) if given else None, assets=assets_dir()).find(str(fields["model"]))
        if model is None or model.foreign:
            return _by_size, f"as {TEXT_BYTES_A_TOKEN} bytes a token: the model's tokenizer is not on this machine"
        tokenizer = ModelTokenizer(Path(model.folder), model.max_tokens)
    except SetupError:
        return _by_size, f"as {TEXT_BYTES_A_TOKEN} bytes a token: the model's tokenizer is not on this machine"
    prompt = model.prompts.get(fields["input_type"], "") if "input_type" in fields else ""
    is_cut = fields.get("truncate", "none") != "none"
    most = model.max_tokens

    def count(texts: Sequence[str]) -> list[int]:
        counts = [len(ids) + tokenizer.specials for ids in tokenizer.ids([prompt + text for text in texts])]
        return [tokens if tokens <= most else most * is_cut for tokens in counts]  # else it is refused

    return count, "by the model's own tokenizer"


def price_of(account: AccountClient, model: str) -> int | None:
    """Of a million tokens, in nano-USD; None where the server does not tell."""
    try:
        found = account.get("models", model)
        return int(found["price_nanousd_per_million_tokens"])
    except (click.ClickException, SetupError, KeyError, TypeError, ValueError):
        return None


def _by_size(texts: Sequence[str]) -> list[int]:
    return [len(text.encode()) // TEXT_BYTES_A_TOKEN + 1 for text in texts]
