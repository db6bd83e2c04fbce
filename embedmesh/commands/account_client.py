"""What callers say to a gateway about their own account's files, batches and jobs, with one of its API keys."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import click

from embedmesh.commands.endpoint import GatewayAccess, find_gateway
from embedmesh.commands.http_client import HttpClient, to_url
from embedmesh.commands.operator import ADMIN_REPLY_BYTES_MAX, Operator
from embedmesh.commands.options import data_dir_option
from embedmesh.commands.output import CommandResult, prints_result
from embedmesh.rules.limits import BATCHES_PAGE_ROWS_MAX

ACCOUNT_REPLY_S = 30.0  # as long as an ordinary request may take

Row = dict[str, Any]


class AccountClient(Operator):
    """Sends requests to the API for callers. Paths are given as segments behind `/v1`."""

    AREA: ClassVar[tuple[str, ...]] = ()
    PAGE_ROWS: ClassVar[int] = BATCHES_PAGE_ROWS_MAX
    KEY_HINT: ClassVar[str] = " Give an API key: --api-key-file, or EMBEDMESH_API_KEY."


def account_client(access: GatewayAccess) -> AccountClient:
    """For this gateway, with this key."""
    client = HttpClient(
        access.base_url,
        to_url(access.base_url),
        key=access.key,
        reply_s=ACCOUNT_REPLY_S,
        reply_bytes_max=ADMIN_REPLY_BYTES_MAX,
    )
    return AccountClient(client, access.root, offline=False)


def account_command(command: Callable[..., CommandResult | None]) -> Callable[..., None]:
    """Options of a command that takes an `AccountClient` first; prints its result."""

    @prints_result
    @functools.wraps(command)
    def run(*, url: str | None, api_key_file: Path | None, data_dir: Path, **given: Any) -> CommandResult | None:
        return command(account_client(find_gateway(url, api_key_file, data_dir, "api")), **given)

    made: Callable[..., None] = run
    for option in (
        data_dir_option,
        click.option(
            "--api-key-file", type=click.Path(path_type=Path), help="File with the key. Or: EMBEDMESH_API_KEY."
        ),
        click.option("--url", help="Endpoint, as http://127.0.0.1:8080/v1. Also EMBEDMESH_BASE_URL."),
    ):
        made = option(made)
    return made
