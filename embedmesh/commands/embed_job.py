"""`embedmesh embed` as a job: several inputs, a folder of parts or a database, other engines, a budget, an estimate."""

import hashlib
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from embedmesh.bulk.engines import engine_for
from embedmesh.bulk.estimate import JobEstimate, estimate
from embedmesh.bulk.job import run_job
from embedmesh.bulk.manifest import Manifest
from embedmesh.bulk.sinks import sink_for
from embedmesh.bulk.sources import batches_of, open_source
from embedmesh.bulk.stops import NothingListens, RequestRefused, Stopped
from embedmesh.bulk.units import JobPlan, units_of
from embedmesh.commands.account_client import account_client
from embedmesh.commands.bulk.budget import Budget, check_has_jobs
from embedmesh.commands.bulk.job_report import JobReport
from embedmesh.commands.endpoint import GatewayAccess
from embedmesh.commands.output import CommandResult, WrongUsage
from embedmesh.rules.money import cost_nanousd, format_usd

MANIFEST_NAME = "_manifest.jsonl"  # readers of folders of Parquet pass over names that begin with an underscore
FOLDER_SINKS = ("parquet", "jsonl", "npy")
NAME_HEX = 16  # of a job at the gateway, and of a manifest that has no folder to lie in


class JobOptions(NamedTuple):
    """What the command line says of a job, beside its inputs and the members of requests."""

    output: str
    kind: str | None
    column: str | None
    ids: str | None
    engine: str
    concurrency: int | None
    budget_nanousd: int | None
    manifest: Path | None
    overwrite: bool
    as_json: bool


def embed_job(
    inputs: tuple[str, ...], fields: dict[str, Any], options: JobOptions, find: Callable[[], GatewayAccess]
) -> str:
    """Run a job; how it ended. `find` finds the gateway. Raises WrongUsage, SetupError, ApiRefusal."""
    access = find()
    plan = _plan(fields, options, access)
    sink, run_units = sink_for(plan.output), engine_for(options.engine)
    with closing(_opened(_manifest_file(options), plan, options)) as manifest:
        sink.begin(resumed=not manifest.is_new, overwrite=options.overwrite or manifest.is_leftover)
        budget = _budget(manifest, options, access)
        manifest.begin()
        with JobReport(manifest, options.output, _size(inputs)) as report:
            if budget is not None and not manifest.is_finished:
                job = budget.open(options.budget_nanousd or 0, None)
                plan = msgspec.structs.replace(plan, ledger_job=job)
            units = units_of(batches_of(inputs, options.kind, options.column), plan)
            ended = _ended(
                report,
                manifest,
                lambda: run_job(
                    units, plan, manifest, sink, run_units, concurrency=options.concurrency, observer=report
                ),
            )
        charged = budget.close() if budget is not None and ended == "finished" else None
        report.summary(ended, options.as_json, charged)
        return "refused rows" if ended == "finished" and manifest.refused else ended


def estimate_job(
    inputs: tuple[str, ...], fields: dict[str, Any], options: JobOptions, find: Callable[[], GatewayAccess]
) -> CommandResult:
    """What the job would take. The gateway is asked for the price; nothing is paid."""
    from embedmesh.commands.bulk.counting import counter_for, price_of  # brings tokenizers along

    access = find()
    count, counted_by = counter_for(fields)
    plan = _plan(fields, options, access)
    found = estimate(units_of(batches_of(inputs, options.kind, options.column), plan), count)
    return estimated(found, price_of(account_client(access), str(fields["model"])), counted_by)


def estimated(found: JobEstimate, price: int | None, counted_by: str) -> CommandResult:
    """In words, and for programs. `price` is in nano-USD a million tokens."""
    cost = None if price is None else cost_nanousd(found.tokens, price)
    spread = "" if found.spread is None else f" ± {found.spread:,}"
    lines = [
        f"units: {found.units:,}",
        f"texts: {found.texts:,}" + (f", {found.refused:,} of them cannot be sent" if found.refused else ""),
        f"tokens: about {found.tokens:,}{spread} ({found.sampled_texts:,} texts counted {counted_by})",
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


def _plan(fields: dict[str, Any], options: JobOptions, access: GatewayAccess) -> JobPlan:
    return JobPlan(
        base_url=access.base_url,
        api_key=access.key,
        fields=fields,
        output=options.output,
        column=options.column,
        ids=options.ids,
        width=fields.get("dimensions"),
    )


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


def _manifest_file(options: JobOptions) -> Path:
    """In the folder of the output, else here, under a name that follows from the output."""
    kind, _, place = options.output.partition(":")
    if options.manifest is not None:
        return options.manifest
    if kind in FOLDER_SINKS and "://" not in place:
        return Path(place) / MANIFEST_NAME
    return Path(f"embedmesh-{kind}-{_digest(options.output)}.manifest.jsonl")


def _opened(file: Path, plan: JobPlan, options: JobOptions) -> Manifest:
    try:
        return Manifest(file, plan.settings, overwrite=options.overwrite)
    except OSError as error:
        raise WrongUsage(f"{file} cannot be written ({error.strerror}). Choose another --manifest.") from None


def _budget(manifest: Manifest, options: JobOptions, access: GatewayAccess) -> Budget | None:
    if options.budget_nanousd is None:
        if manifest.ledger_jobs:
            raise WrongUsage("The job was begun with a --budget. Give it again, or a larger one.")
        return None
    account = account_client(access)
    check_has_jobs(account, access.base_url)
    return Budget(account, manifest, f"embed-{manifest.name}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_HEX]


def _size(inputs: tuple[str, ...]) -> int | None:
    """Of all inputs in bytes."""
    sizes: list[int | None] = []
    for name in inputs:
        opened = open_source(name)
        opened.file.close()
        sizes.append(None if name.endswith(".gz") else opened.size)
    return None if None in sizes else sum(one or 0 for one in sizes)
