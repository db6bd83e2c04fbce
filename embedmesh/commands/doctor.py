"""`embedmesh doctor`: what is wrong with this machine or set-up, and what to do."""

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import click
import msgspec

from embedmesh.commands import checks
from embedmesh.commands.books import books_of
from embedmesh.commands.bulk.client import decode_vectors, read_bounded
from embedmesh.commands.bulk.refusals import read_problem
from embedmesh.commands.checks import Check
from embedmesh.commands.options import WholeNumber
from embedmesh.commands.telling import print_json
from embedmesh.rules.errors import SetupError
from embedmesh.settings import Credentials, default_data_dir, read_bootstrap
from embedmesh.storage.books.new_keys import NewKeys

ANSWER_S = 10.0  # an endpoint that is well answers in milliseconds; a cold one within two seconds
REPLY_BYTES_MAX = 1024 * 1024  # one vector, or an error
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=default_data_dir, help="The server's data folder.")
@click.option("--host", help="Address that `serve` is to listen on.")
@click.option("--port", type=WholeNumber(1, 65535), help="Port that `serve` is to listen on.")
@click.option("--catalogue", type=click.Path(path_type=Path), envvar="EMBEDMESH_CATALOGUE", help="Check this one, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON object.")
def doctor(data_dir: Path, host: str | None, port: int | None, catalogue: Path | None, as_json: bool) -> None:
    """Say what is wrong with this machine or set-up, and what to do.

    Looks at Python, CPU, memory, disk, SQLite, the fetched model, the data folder, the port and, where other machines
    reach it, the limits of new keys. Where a server has run before, it is asked for its health and for a real embedding
    (which costs its account what three tokens cost).
    The exit status is 0 if nothing failed; warnings are no failures.

    \b
    Examples:
      embedmesh doctor
      embedmesh doctor --data-dir ./data --port 8099
      embedmesh doctor --json | jq '.checks[] | select(.state != "ok")'
    """
    found = [checks.check_python(), checks.check_cpu(), checks.check_memory(), checks.check_disk(data_dir)]
    found += [checks.check_sqlite(), *checks.check_assets(), checks.check_data_dir(data_dir)]
    if catalogue is not None:
        found += checks.check_catalogue(catalogue)
    found += _check_server(data_dir, host, port)
    found += _check_new_keys(data_dir, host)
    failed = any(check.state == "fail" for check in found)
    if as_json:
        print_json({"well": not failed, "checks": [_as_dict(check) for check in found]})
    else:
        _print(found)
    sys.exit(1 if failed else 0)


def _check_server(data_dir: Path, host: str | None, port: int | None) -> list[Check]:
    try:
        local = read_bootstrap(data_dir)
    except SetupError as error:
        return [Check("endpoint", "fail", str(error), "Mend it, then run this again.")]
    served = urlsplit(local.base_url) if local else None
    asked = asyncio.run(_ask(local)) if local else []
    listen = (host or (served and served.hostname) or DEFAULT_HOST, port or (served and served.port) or DEFAULT_PORT)
    if not asked or served is None or listen != (served.hostname, served.port):
        return [checks.check_port(*listen, ours=False), *asked]
    if asked[0].state == "fail":
        return asked  # something listens there and is not well: that the port is taken would say it twice
    return [checks.check_port(*listen, ours=asked[0].state == "ok"), *asked]


def _check_new_keys(data_dir: Path, host: str | None) -> list[Check]:
    said = NewKeys()
    with suppress(SetupError, click.ClickException), books_of(data_dir) as books:  # no store yet; or others tell of it
        said = books.new_keys.read()
    return checks.check_new_keys(said, host)


class _Model(msgspec.Struct):
    id: str


class _Listed(msgspec.Struct):
    """`GET /v1/models`, as far as it matters here."""

    data: list[_Model]


class _Readiness(msgspec.Struct):
    """`GET /readyz`, as far as it matters here."""

    reasons: list[str] = []


async def _ask(local: Credentials) -> list[Check]:
    """Health, readiness and one embedding of the endpoint that bootstrap.json names. Health is the first."""
    root = local.base_url.rstrip("/").removesuffix("/v1")
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            status, body = await _fetch(session, "GET", root + "/health")
            if status != 200 or b'"ok"' not in body:
                return [_foreign(local)]
            status, body = await _fetch(session, "GET", root + "/readyz")
            health = Check("endpoint", "ok", f"{local.base_url} answers")
            ready = _ready(status, body)
            if ready.state == "fail":
                return [health, ready]
            try:
                return [health, ready, await _embed(session, local)]
            except TimeoutError:
                late = f"no answer within {ANSWER_S:.0f} s"
                return [health, ready, Check("embedding", "fail", late, ready.todo or "Look at the server's log.")]
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL):
        return [Check("endpoint", "warn", f"nothing listens at {local.base_url}", "Start it: embedmesh serve")]
    except TimeoutError:
        todo = "Stop what listens there, then start it again: embedmesh serve"
        return [Check("endpoint", "fail", f"{local.base_url} did not answer within {ANSWER_S:.0f} s", todo)]
    except (aiohttp.ClientError, ValueError):  # ValueError: an answer that is none of ours
        return [_foreign(local)]


def _ready(status: int, body: bytes) -> Check:
    """What /readyz says."""
    try:
        why = "; ".join(msgspec.json.decode(body, type=_Readiness).reasons)
    except msgspec.DecodeError:
        why = ""
    starved = "End what takes the CPU from it, or give it more cores or a larger quota."
    if status != 200:
        todo = "Wait a moment after the start; then look at what `embedmesh serve` logs."
        return Check("ready", "fail", why or read_problem(status, body).message, starved if "starved" in why else todo)
    if why:
        return Check("ready", "warn", f"it answers slowly: {why}", starved)
    return Check("ready", "ok", "a model was embedded just now")


def _foreign(local: Credentials) -> Check:
    todo = "End that program, or serve on another port: embedmesh serve --port 8099"
    return Check("endpoint", "fail", f"another program than embedmesh listens at {local.base_url}", todo)


async def _embed(session: aiohttp.ClientSession, local: Credentials) -> Check:
    headers = {"Authorization": f"Bearer {local.api_key}"}
    status, body = await _fetch(session, "GET", local.base_url + "/models", headers=headers)
    if status != 200:
        return _refused(status, body)
    listed = msgspec.json.decode(body, type=_Listed).data
    if not listed:
        return Check("embedding", "fail", "no model is served", "Look at what `embedmesh serve` logs.")
    question = {"model": listed[0].id, "input": ["doctor"], "encoding_format": "base64"}
    began = time.monotonic()
    status, body = await _fetch(session, "POST", local.base_url + "/embeddings", headers=headers, json=question)
    if status != 200:
        return _refused(status, body)
    spent_ms = (time.monotonic() - began) * 1000
    vectors, tokens = decode_vectors(body, 1)
    return Check("embedding", "ok", f"{len(vectors[0])} components, {tokens} tokens, {spent_ms:.1f} ms")


async def _fetch(session: aiohttp.ClientSession, method: str, url: str, **more: Any) -> tuple[int, bytes]:
    async with session.request(method, url, allow_redirects=False, **more) as response:
        return response.status, await read_bounded(response, REPLY_BYTES_MAX)


def _refused(status: int, body: bytes) -> Check:
    problem = read_problem(status, body)
    todo = (
        "See `embedmesh keys` and `embedmesh accounts`." if status in (401, 403, 429) else "Look at the server's log."
    )
    return Check("embedding", "fail", f"{problem.message} ({problem.code})", todo)


def _as_dict(check: Check) -> dict[str, str]:
    return {"name": check.name, "state": check.state, "found": check.found, "todo": check.todo}


def _print(found: list[Check]) -> None:
    width = max(len(check.name) for check in found)
    for check in found:
        mark = click.style(f"{check.state:<4}", fg=COLOURS[check.state])
        click.echo(f"{mark}  {check.name:<{width}}  {check.found}")
        if check.todo:
            click.echo(" " * (width + 8) + check.todo)
    click.echo(f"\n{_summary(found)}")


def _summary(found: list[Check]) -> str:
    failures, warnings = (sum(check.state == state for check in found) for state in ("fail", "warn"))
    if not failures + warnings:
        return "All is well."
    counted = [
        f"{count} {word}{'s' * (count > 1)}" for count, word in ((failures, "failure"), (warnings, "warning")) if count
    ]
    return f"{' and '.join(counted)}: {'mend the failures first.' if failures else 'it will run.'}"
