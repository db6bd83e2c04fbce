"""`embedmesh doctor`: what is wrong with this machine or set-up, and what to do."""

import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import click
import msgspec

from embedmesh.client.bulk.replies import read_vectors
from embedmesh.client.refusals import read_problem
from embedmesh.client.rerank import read_ranked
from embedmesh.commands import checks
from embedmesh.commands.checks import HealthCheck
from embedmesh.commands.http_client import HttpClient, HttpReply, NoReply, to_url
from embedmesh.commands.offline import books_of
from embedmesh.commands.options import SettingOption, WholeNumber, data_dir_option
from embedmesh.commands.output import CommandResult, prints_result
from embedmesh.credentials import Credentials, read_bootstrap
from embedmesh.rules.errors import SetupError
from embedmesh.storage.books.new_keys import NewKeys

DOCTOR_REPLY_S = 10.0  # an endpoint that is well answers in milliseconds; a cold one within two seconds
DOCTOR_REPLY_BYTES_MAX = 1024 * 1024  # one vector, two scores, or an error
DOCTOR_DOCUMENTS = ("nurse", "potato")  # to rerank
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@data_dir_option
@click.option("--host", help="Address that `serve` is to listen on.")
@click.option("--port", type=WholeNumber(1, 65535), help="Port that `serve` is to listen on.")
@click.option(
    "--catalogue",
    cls=SettingOption,
    type=click.Path(path_type=Path),
    envvar="EMBEDMESH_CATALOGUE",
    help="Check this one, too.",
)
@prints_result
def doctor(data_dir: Path, host: str | None, port: int | None, catalogue: Path | None) -> CommandResult:
    """Say what is wrong with this machine or set-up, and what to do.

    Checks Python, CPU, threads, engine, precision tiers, memory, disk, SQLite, the fetched model, the data folder, the
    port and, if other machines reach it, the limits of new keys. If a server has run before, its health is checked, and
    a word is embedded, or two are reranked where no model embeds (a few tokens, paid by its account). The exit status
    is 0 if nothing failed; warnings are no failures.

    \b
    Examples:
      embedmesh doctor
      embedmesh doctor --data-dir ./data --port 8099
      embedmesh doctor --json | jq '.checks[] | select(.state != "ok")'
    """
    found = [checks.check_python(), checks.check_cpu(), checks.check_threads(), checks.check_engine()]
    found += [checks.check_tiers(), checks.check_memory()]
    found += [
        checks.check_disk(data_dir),
        checks.check_sqlite(),
        *checks.check_assets(),
        checks.check_data_dir(data_dir),
    ]
    if catalogue is not None:
        found += checks.check_catalogue(catalogue)
    found += _check_server(data_dir, host, port)
    found += _check_new_keys(data_dir, host)
    failed = any(check.state == "fail" for check in found)
    value = {"well": not failed, "checks": [msgspec.structs.asdict(check) for check in found]}
    return CommandResult(value, _report(found), exit_code=1 if failed else 0)


def _check_server(data_dir: Path, host: str | None, port: int | None) -> list[HealthCheck]:
    try:
        local = read_bootstrap(data_dir)
    except SetupError as error:
        return [HealthCheck("endpoint", "fail", str(error), "Mend it, then run this again.")]
    served = urlsplit(local.base_url) if local else None
    answers = _check_endpoint(local) if local else []
    listen = (host or (served and served.hostname) or DEFAULT_HOST, port or (served and served.port) or DEFAULT_PORT)
    if not answers or served is None or listen != (served.hostname, served.port):
        return [checks.check_port(*listen, ours=False), *answers]
    if answers[0].state == "fail":
        return answers  # something listens there and is not well: that the port is taken would say it twice
    return [checks.check_port(*listen, ours=answers[0].state == "ok"), *answers]


def _check_new_keys(data_dir: Path, host: str | None) -> list[HealthCheck]:
    new_keys = NewKeys()
    with suppress(SetupError, click.ClickException), books_of(data_dir) as books:  # no store yet, or checked above
        new_keys = books.new_keys.read()
    return checks.check_new_keys(new_keys, host)


class _ServedModel(msgspec.Struct):
    id: str
    modalities: tuple[str, ...] = ("embeddings",)


class _ServedModels(msgspec.Struct):
    """`GET /v1/models`, as far as it matters here."""

    data: list[_ServedModel]


class _Readiness(msgspec.Struct):
    """`GET /readyz`, as far as it matters here."""

    reasons: list[str] = []


def _check_endpoint(local: Credentials) -> list[HealthCheck]:
    """Health, readiness and one answer of the endpoint that bootstrap.json names. Health is the first."""
    root = urlsplit(local.base_url).path.rstrip("/").removesuffix("/v1")
    stranger = _client(local, key="")  # the key is only for a gateway of ours
    found: list[HealthCheck] = []
    late = f"no answer within {DOCTOR_REPLY_S:.0f} s"
    try:
        health = stranger.send("GET", root + "/health")
        if health.status != 200 or b'"ok"' not in health.body:
            return [_foreign(local)]
        ready = _ready(stranger.send("GET", root + "/readyz"))
        found = [HealthCheck("endpoint", "ok", f"{local.base_url} answers"), ready]
        return found if ready.state == "fail" else [*found, _answer(_client(local, key=local.api_key), root)]
    except NoReply as error:
        if error.kind == "connect":
            todo = "Start it: embedmesh serve"
            return [HealthCheck("endpoint", "warn", f"nothing listens at {local.base_url}", todo)]
        if error.kind == "tls":
            what, _, todo = str(error).partition("; ")
            return [HealthCheck("endpoint", "fail", what, f"{todo[:1].upper()}{todo[1:]}.")]
        if error.kind == "late" and found:
            return [*found, HealthCheck("embedding", "fail", late, found[-1].todo or "Look at the server's log.")]
        if error.kind == "late":
            todo = "Stop what listens there, then start it again: embedmesh serve"
            return [HealthCheck("endpoint", "fail", f"{local.base_url}: {late}", todo)]
        return [_foreign(local)]
    except ValueError:  # an answer that is none of ours
        return [_foreign(local)]


def _client(local: Credentials, key: str) -> HttpClient:
    return HttpClient(
        local.base_url,
        to_url(local.base_url),
        key=key,
        reply_s=DOCTOR_REPLY_S,
        reply_bytes_max=DOCTOR_REPLY_BYTES_MAX,
    )


def _ready(reply: HttpReply) -> HealthCheck:
    """The readiness by /readyz."""
    try:
        why = "; ".join(msgspec.json.decode(reply.body, type=_Readiness).reasons)
    except msgspec.DecodeError:
        why = ""
    starved = "End what takes the CPU from it, or give it more cores or a larger quota."
    if reply.status != 200:
        todo = "Wait a moment after the start; then look at what `embedmesh serve` logs."
        return HealthCheck(
            "ready",
            "fail",
            why or read_problem(reply.status, reply.body).message,
            starved if "starved" in why else todo,
        )
    if why:
        return HealthCheck("ready", "warn", f"it answers slowly: {why}", starved)
    return HealthCheck("ready", "ok", "a model answered just now")


def _foreign(local: Credentials) -> HealthCheck:
    todo = "End that program, or serve on another port: embedmesh serve --port 8099"
    return HealthCheck("endpoint", "fail", f"another program than embedmesh listens at {local.base_url}", todo)


def _answer(client: HttpClient, root: str) -> HealthCheck:
    """One vector of the first model that embeds; else two scores of the first that reranks."""
    reply = client.send("GET", root + "/v1/models")
    if reply.status != 200:
        return _refused(reply)
    served = msgspec.json.decode(reply.body, type=_ServedModels).data
    if not served:
        return HealthCheck("embedding", "fail", "no model is served", "Look at what `embedmesh serve` logs.")
    for modality, ask in (("embeddings", _embed), ("rerank", _rerank)):
        for model in served:
            if modality in model.modalities:
                return ask(client, root, model.id)
    return HealthCheck("embedding", "ok", "no model embeds or reranks here: none was asked")


def _embed(client: HttpClient, root: str, model: str) -> HealthCheck:
    request = {"model": model, "input": ["doctor"], "encoding_format": "base64"}
    began = time.monotonic()
    reply = client.send("POST", root + "/v1/embeddings", request)
    if reply.status != 200:
        return _refused(reply)
    spent_ms = (time.monotonic() - began) * 1000
    vectors = read_vectors(reply.body, 1)
    return HealthCheck("embedding", "ok", f"{vectors.width} components, {vectors.tokens} tokens, {spent_ms:.1f} ms")


def _rerank(client: HttpClient, root: str, model: str) -> HealthCheck:
    request = {"model": model, "query": "doctor", "documents": DOCTOR_DOCUMENTS}
    began = time.monotonic()
    reply = client.send("POST", root + "/v1/rerank", request)
    if reply.status != 200:
        return _refused(reply, "rerank")
    spent_ms = (time.monotonic() - began) * 1000
    ranked = read_ranked(reply.body, len(DOCTOR_DOCUMENTS), len(DOCTOR_DOCUMENTS), {})
    return HealthCheck("rerank", "ok", f"{len(ranked.results)} scores, {ranked.tokens} tokens, {spent_ms:.1f} ms")


def _refused(reply: HttpReply, name: str = "embedding") -> HealthCheck:
    problem = read_problem(reply.status, reply.body)
    keys = reply.status in (401, 403, 429)
    todo = "See `embedmesh keys` and `embedmesh accounts`." if keys else "Look at the server's log."
    return HealthCheck(name, "fail", f"{problem.message} ({problem.code})", todo)


def _report(found: list[HealthCheck]) -> str:
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        mark = click.style(f"{check.state:<4}", fg=COLOURS[check.state])
        lines.append(f"{mark}  {check.name:<{width}}  {check.found}")
        if check.todo:
            lines.append(" " * (width + 8) + check.todo)
    return "\n".join([*lines, "", _summary(found)])


def _summary(found: list[HealthCheck]) -> str:
    failures, warnings = (sum(check.state == state for check in found) for state in ("fail", "warn"))
    if not failures + warnings:
        return "All is well."
    counted = [
        f"{count} {word}{'s' * (count > 1)}" for count, word in ((failures, "failure"), (warnings, "warning")) if count
    ]
    return f"{' and '.join(counted)}: {'mend the failures first.' if failures else 'it will run.'}"
