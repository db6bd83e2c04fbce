"""`embedmesh embed` as a job: several inputs, a folder of parts or a database, other engines, a budget, an estimate."""

import functools
import hashlib
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

from embedmesh.bulk.engines import engine_for
from embedmesh.bulk.estimate import JobEstimate, estimate
from embedmesh.bulk.job import run_job
from embedmesh.bulk.joined import JOINS
from embedmesh.bulk.manifest import Manifest
from embedmesh.bulk.sinks import job_output, sink_for
from embedmesh.bulk.sources import batches_of, count_rows, open_source
from embedmesh.bulk.stops import NothingListens, RequestRefused, Stopped
from embedmesh.bulk.units import JobPlan, units_of
from embedmesh.commands.account_client import account_client
from embedmesh.commands.bulk.budget import Budget, check_has_jobs
from embedmesh.commands.bulk.job_report import JobReport
from embedmesh.commands.endpoint import GatewayAccess, find_gateway
from embedmesh.commands.output import CommandResult, WrongUsage
from embedmesh.rules.errors import SetupError
from embedmesh.rules.money import cost_nanousd, format_usd

MANIFEST_NAME = "_manifest.jsonl"  # readers of folders of Parquet pass over names that begin with an underscore
FOLDER_SINKS = ("parquet", "jsonl", "npy")
DATABASES = ("pgvector:", "qdrant:")
NAME_HEX = 16  # of a manifest that has no folder to lie in


class JobOptions(NamedTuple):
    """Options of the command line that are no members of requests."""

    ids: str | None
    engine: str | None
    concurrency: int | None
    budget: int | None
    dry_run: bool
    manifest: Path | None
    field: str | None
    column: str | None
    kind: str | None
    batch: int
    confidential: bool
    pins: Path | None
    overwrite: bool
    url: str | None
    api_key_file: Path | None
    data_dir: Path
    as_json: bool


def embed_as_job(inputs: tuple[str, ...], output: str, given: dict[str, Any]) -> str:
    """Run a job, or print its estimate; how it ended. Raises WrongUsage, SetupError, ApiRefusal."""
    options = JobOptions(**{name: given.pop(name) for name in JobOptions._fields})
    if options.confidential or options.pins is not None:
        raise WrongUsage("A job cannot be --confidential yet. Seal one input, with one file as its output.")
    if not inputs:
        raise WrongUsage("A job needs inputs that can be read again: name them.")
    sink = job_output(output) or (f"file:{output}" if Path(output).suffix in JOINS else None)
    if sink is None and not options.dry_run:
        raise WrongUsage(f"A job writes OUT/, a database, or one file that ends in {', '.join(JOINS)}: give it as -o.")
    access = find_gateway(options.url, options.api_key_file, options.data_dir, "api")
    plan = JobPlan(
        base_url=access.base_url,
        api_key=access.key,
        fields={name: value for name, value in given.items() if value is not None},
        output=sink or "",
        column=options.column or options.field,
        ids=options.ids,
        width=given["dimensions"],
    )
    if options.dry_run:
        _estimated(inputs, plan, options, access).print(options.as_json)
        return "finished"
    return _run(inputs, plan, options, access)


def _run(inputs: tuple[str, ...], plan: JobPlan, options: JobOptions, access: GatewayAccess) -> str:
    if plan.output.startswith(DATABASES) and plan.ids is None:  # row numbers would replace rows of other inputs
        raise WrongUsage("A database finds rows by their id: name the input's column of ids with --id.")
    sink, run_units = sink_for(plan.output), engine_for(options.engine or "local")
    with closing(_opened(plan, options)) as manifest:
        overwrite = options.overwrite or manifest.is_leftover
        sink.begin(resumed=not manifest.is_new, overwrite=overwrite, width=_width(plan, access))
        budget = _budget(manifest, options, access)
        manifest.begin()
        with JobReport(manifest, plan.output, _size(inputs)) as report:
            if budget is not None and not manifest.is_finished:
                plan = msgspec.structs.replace(
                    plan, ledger_job=budget.open(options.budget or 0, count_rows(inputs, options.kind))
                )
            units = units_of(batches_of(inputs, options.kind, plan.column), plan)
            go = functools.partial(
                run_job, units, plan, manifest, sink, run_units, concurrency=options.concurrency, observer=report
            )
            ended = _ended(report, manifest, go)
        charged = budget.close() if budget is not None and ended == "finished" else None
        report.summary(ended, options.as_json, charged)
        return "refused rows" if ended == "finished" and manifest.refused else ended


def _width(plan: JobPlan, access: GatewayAccess) -> int | None:
    """Of the vectors, if the server tells: a database that cannot take them is then refused before anything is paid."""
    if plan.width is not None or not plan.output.startswith(DATABASES):
        return plan.width
    try:
        return int(account_client(access).get("models", str(plan.fields["model"]))["width"]) or None
    except (click.ClickException, SetupError, KeyError, TypeError, ValueError):
        return None


def _estimated(inputs: tuple[str, ...], plan: JobPlan, options: JobOptions, access: GatewayAccess) -> CommandResult:
    """What the job would take, in words and for programs. The gateway is asked for the price; nothing is paid."""
    from embedmesh.commands.bulk.counting import counter_for, price_of  # brings tokenizers along

    count, counted = counter_for(plan.fields)
    price = price_of(account_client(access), str(plan.fields["model"]))
    found = estimate(units_of(batches_of(inputs, options.kind, plan.column), plan), count)
    cost = None if price is None else cost_nanousd(found.tokens, price)
    spread = "" if found.spread is None else f" ± {found.spread:,}"
    lines = [
        f"units: {found.units:,}",
        f"texts: {found.texts:,}" + (f", {found.refused:,} of them cannot be sent" if found.refused else ""),
        f"tokens: about {found.tokens:,}{spread} ({found.sampled_texts:,} texts counted {counted})",
        f"money: {_money(found, price)}",
        f"time: {_time(found.tokens, 10_000)} at 10,000 tokens a second, {_time(found.tokens, 100_000)} at 100,000",
    ]
    value = {**found._asdict(), "price_nanousd_per_million_tokens": price, "cost_nanousd": cost}
    return CommandResult(value, "\n".join(lines))


def _money(found: JobEstimate, price: int | None) -> str:
    if price is None:
        return "not known: the server tells no price"
    spread = "" if found.spread is None else f" ± {format_usd(cost_nanousd(found.spread, price))}"
    return f"about {format_usd(cost_nanousd(found.tokens, price))}{spread}, at {format_usd(price)} a million tokens"


def _time(tokens: int, tokens_a_second: int) -> str:
    minutes = math.ceil(tokens / tokens_a_second / 60)
    return f"{minutes:,} min" if minutes < 120 else f"{minutes / 60:,.0f} h"


def _ended(report: JobReport, manifest: Manifest, run: Callable[[], None]) -> str:
    """How it ends; what stopped it is printed."""
    try:
        run()
    except KeyboardInterrupt:
        report.stopped("interrupted")
        return "interrupted"
    except NothingListens as nobody:
        report.bar.say(f"embedmesh: {nobody}")
        return "unreachable"
    except Stopped as stopped:
        if isinstance(stopped, RequestRefused) and not manifest.keys:
            report.bar.say(f"embedmesh: {stopped}")
            return "refused"
        report.stopped(str(stopped))
        return "stopped"
    except OSError as error:
        report.stopped(f"input or output failed ({error.strerror or type(error).__name__})")
        return "stopped"
    return "finished"


def _opened(plan: JobPlan, options: JobOptions) -> Manifest:
    """The manifest: in the output's folder or beside its file, else here, under a name that follows from it."""
    kind, _, place = plan.output.partition(":")
    file = options.manifest
    if file is None and kind == "file":
        file = Path(f"{place}.manifest.jsonl")
    elif file is None and kind in FOLDER_SINKS and "://" not in place:
        file = Path(place) / MANIFEST_NAME
    elif file is None:
        file = Path(f"embedmesh-{kind}-{hashlib.sha256(plan.output.encode()).hexdigest()[:NAME_HEX]}.manifest.jsonl")
    try:
        return Manifest(file, plan.settings, overwrite=options.overwrite)
    except OSError as error:
        raise WrongUsage(f"{file} cannot be written ({error.strerror}). Choose another --manifest.") from None


def _budget(manifest: Manifest, options: JobOptions, access: GatewayAccess) -> Budget | None:
    if options.budget is None:
        if manifest.ledger_jobs:
            raise WrongUsage("The job was begun with a --budget. Give it again, or a larger one.")
        return None
    account = account_client(access)
    check_has_jobs(account, access.base_url)
    return Budget(account, manifest, f"embed-{manifest.name}")


def _size(inputs: tuple[str, ...]) -> int | None:
    """Of all inputs in bytes."""
    sizes: list[int | None] = []
    for name in inputs:
        opened = open_source(name)
        opened.file.close()
        sizes.append(None if name.endswith(".gz") else opened.size)
    return None if None in sizes else sum(one or 0 for one in sizes)
