"""`embedmesh ledger explain` and `refund`: what became of a request, a lock or a tab; giving back what it cost."""

from typing import Any

import click

from embedmesh.commands.operator import Operator, operator_command
from embedmesh.commands.options import USD, reference_option
from embedmesh.commands.output import CommandResult, iso_time, utc
from embedmesh.rules.money import format_usd

ENDS = {
    "capture": "the reply was delivered, and {captured} of it charged",
    "release": "no reply was delivered: released, nothing is charged",
    "expire": "its deadline passed and nobody had ended it: released, nothing is charged",
    "recover": "its gateway had died while it ran: released, nothing is charged",
    "expire_noted": "its deadline passed and nobody had ended it: {captured} charged, as was last noted of its stream",
    "recover_noted": "its gateway had died while it ran: {captured} charged, as was last noted of its stream",
}

UNUSED_ENDS = ENDS | {"expire": "no request has used the lock in time: released, nothing is charged"}

Row = dict[str, Any]


TAB_ENDS = {
    "closed": "closed: what was not spent went back",
    "expired": "its deadline passed and nobody had closed it: what was not settled is not charged",
    "recovered": "its gateway had died: what was not settled is not charged",
}
TAB_ID, BATCH_ID = "tab_", "batch_"
LINE_OF_BATCH = "batch_req_"  # as a batch's output file names its lines
PIECES = {"images", "searches"}  # meters that are no tokens
PIECES_PRICED = 1_000_000  # prices are those of a million


@click.command()
@click.argument("request_id", metavar="REQUEST_ID|LOCK_ID|TAB_ID|BATCH_ID")
@operator_command
def explain(operator: Operator, request_id: str) -> CommandResult:
    """Show what the ledger knows of a request, a lock, a tab, or a batch.

    When it was held and ended, what for, and every movement of money. The requests of a busy key share a tab: money
    that is set aside for several of them, and settled for several at once. A confidential request uses a lock: money
    that was set aside for it before. A batch has a tab of its own, under which its lines are settled.

    \b
    Examples:
      embedmesh ledger explain req_019aa0b4c0de…
      embedmesh ledger explain 3177590311873215
      embedmesh ledger explain tab_019aa0b4c0de… --json
      embedmesh ledger explain batch_019aa0b4c0de…
    """
    request_id = request_id.removeprefix(BATCH_ID) if request_id.startswith(LINE_OF_BATCH) else request_id
    if request_id.startswith((TAB_ID, BATCH_ID)):
        return _explain_tab(operator, request_id)
    found = operator.get("requests", request_id)
    key = found["key_id"] or "a key that is not known"
    lines = [f"Request {found['request_id']} of {found['account']}, with {key}"]
    lines += _lines(_story(found))
    times = {name: iso_time(found[f"{name}_ms"]) for name in ("created", "deadline", "ended")}
    return CommandResult({**_ledger_names(found), **times}, "\n".join(lines))


@click.command()
@click.argument("request_id")
@click.argument("usd", type=USD, required=False)
@reference_option
@operator_command
def refund(operator: Operator, request_id: str, usd: int | None, reference: str) -> CommandResult:
    """Give back what a request cost, or USD of it. Nodes keep what they have earned.

    \b
    Examples:
      embedmesh ledger refund req_019aa0b4c0de… --reference ticket-118
      embedmesh ledger refund req_019aa0b4c0de… 0.002 --reference ticket-119
    """
    body = {"amount_nanousd": usd, "reference": reference}
    moved = operator.post("requests", request_id, "refund", body=body)
    account = operator.get("requests", request_id)["account"]
    available = operator.get("accounts", account)["available_nanousd"]
    applied, amount = moved["applied"], moved["amount_nanousd"]
    what = f"{format_usd(amount)} given back" if applied else "Nothing done: that reference was applied before"
    return CommandResult(
        {"applied": applied, "amount_nanousd": amount, "account": account, "available_nanousd": available},
        f"{what}; {account} has {format_usd(available)} available.",
    )


def _explain_tab(operator: Operator, tab_id: str) -> CommandResult:
    found = operator.get("tabs", tab_id)
    batch = found["batch"]
    whose = f"by gateway {found['gateway']}" if found["gateway"] != tab_id else "for all lines of the batch"
    opened = f"opened for {format_usd(found['amount_nanousd'])} {whose}"
    spent = f"{found['requests']:,} requests settled for {format_usd(found['captured_nanousd'])}"
    story = [(found["opened_ms"], opened)]
    story += [(move["created_ms"], _movement(move)) for move in reversed(found["moves"])]
    if found["ended_ms"] is None:
        story.append((found["deadline_ms"], f"its deadline: {spent} until now"))
    else:
        story.append((found["ended_ms"], f"{spent}; {TAB_ENDS[found['state']]}"))
    lines = [f"Tab {tab_id} of {found['account']}, with {found['key_id']}", *_lines(story)]
    if batch is not None:
        done = f"{batch['completed']:,} of {batch['lines']:,} lines completed, {batch['failed']:,} failed"
        lines.append(f"  Batch of {batch['endpoint']} with {batch['model']}: {batch['state']}, {done}")
    times = {name: iso_time(found[f"{name}_ms"]) for name in ("opened", "deadline", "ended")}
    return CommandResult({**_ledger_names(found), **times}, "\n".join(lines))


def _lines(story: list[tuple[int, str]]) -> list[str]:
    return [f"  {utc(unix_ms)}.{unix_ms % 1000:03}  {what}" for unix_ms, what in story]


def _story(found: Row) -> list[tuple[int, str]]:
    """What happened, in its order."""
    if found["tab_id"] is None:
        held = f"{format_usd(found['held_nanousd'])} held by gateway {found['gateway']}"
    elif found["line"] is not None:
        held = f"line {found['line']:,} of {found['tab_id']}, from whose money it was set aside: its batch was made"
    else:
        held = f"set aside by gateway {found['gateway']}, from tab {found['tab_id']}"
    story = [(found["created_ms"], held), *_of_lock(found["lock"], found["created_ms"])]
    if found["ended_ms"] is None or found["ended_by"] is None:
        return [*story, *_runs(found["note"], found["deadline_ms"])]
    unused = found["lock"] is not None and found["lock"]["used_ms"] is None
    ends = UNUSED_ENDS if unused else ENDS
    end = ends[found["ended_by"]].format(captured=format_usd(found["captured_nanousd"] or 0))
    story.append((found["ended_ms"], end))
    if found["state"] == "captured":
        story.append((found["ended_ms"], _what_for(found["bought"])))
    return [*story, *((move["created_ms"], _movement(move)) for move in found["moves"])]


def _runs(note: Row | None, deadline_ms: int) -> list[tuple[int, str]]:
    if note is None:
        return [(deadline_ms, "its deadline: it runs, and is released then at the latest")]
    cost = format_usd(note["cost_nanousd"])
    return [
        (note["noted_ms"], f"noted: its stream has cost {cost} until now"),
        (deadline_ms, "its deadline: it runs, and is charged what is noted then, unless it is extended"),
    ]


def _of_lock(lock: Row | None, created_ms: int) -> list[tuple[int, str]]:
    """What for, where the money was set aside before its request came; and when that did."""
    if lock is None:
        return []
    tokens = f"{lock['units']:,} tokens of {lock['model']} at {format_usd(lock['price'])} a million"
    where = f"on node {lock['node_id']} by {lock['scheme']}, until {utc(lock['expires_ms'])}"
    story = [(created_ms, f"for lock {lock['lock_id']}: up to {tokens}, {where}")]
    return story if lock["used_ms"] is None else [*story, (lock["used_ms"], "a request has used the lock")]


def _what_for(bought: Row | None) -> str:
    if bought is None:
        return "what it was for is not kept any more"
    price = "" if bought["price"] is None else f" at {format_usd(bought['price'])} a million"
    user = "" if bought["user_hash"] is None else f", for user {bought['user_hash']}"
    what = f"{bought['tokens']:,} tokens of {bought['model']}{price}"
    if used := [each for each in bought["meters"] if each["quantity"]]:
        what = f"{', '.join(map(_metered, used))} of {bought['model']}"
    return f"for {what}, by node {bought['node_id']}{user}"


def _metered(used: Row) -> str:
    quantity = f"{used['quantity']:,}"
    if used["meter"] in PIECES:
        return f"{quantity} {used['meter']} at {format_usd(used['price'] // PIECES_PRICED)}"
    whose = ", by the gateway's own count," if used["estimated"] else ""
    return f"{quantity} {used['meter']} tokens{whose} at {format_usd(used['price'])} a million"


def _movement(move: Row) -> str:
    reference = "" if move["reference"] is None else f", reference {move['reference']}"
    amount = format_usd(move["amount_nanousd"])
    several = f", for {move['requests']:,} requests" if move["requests"] > 1 else ""
    return f"{move['kind']}: {amount} from {move['source_id']} to {move['target_id']}{several}{reference}"


def _ledger_names(value: Any) -> Any:
    """With the names that the ledger has for accounts and amounts, which --json has always printed."""
    if isinstance(value, list):
        return [_ledger_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    ours = {"account": "account_id"}
    return {ours.get(name, name.removesuffix("_nanousd")): _ledger_names(item) for name, item in value.items()}
