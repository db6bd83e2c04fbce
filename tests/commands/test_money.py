"""Accounts, keys, prices, refunds, payouts and statements by command, on SQLite and on PostgreSQL."""

import asyncio
import csv
import io
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from embedmesh.commands.statement import STATEMENT_COLUMNS, write_csv
from embedmesh.provision.bootstrap import bootstrap, open_books
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.holds import Charge, Hold, Payable, StreamNote
from embedmesh.rules.money import plain_usd
from embedmesh.settings import secret_path, store_path
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.books.new_keys import LIMITS_EXAMPLE, NewKeys, parse_limits
from embedmesh.storage.secrets.secret import load_secret
from embedmesh.storage.sqlite.database import SqliteEngine
from embedmesh.storage.store import Store
from embedmesh.system import this_user
from tests.commands.conftest import run_offline
from tests.commands.edge import start

Run = Callable[..., Result]

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MONTH = time.strftime("%Y-%m", time.gmtime())
SERVED = {
    "req_free": None,
    "req_paid": Charge(
        cost_nanousd=140,
        tokens=7,
        model=MODEL,
        key_id="key_1",
        node_id="n1",
        price=20_000_000,
        payables=(Payable("n1", 40),),
    ),
}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    bootstrap(tmp_path / "data", "http://127.0.0.1:8080/v1")
    return tmp_path / "data"


@pytest.fixture
def run(data_dir: Path) -> Run:
    return run_offline(data_dir)


def make_secret(data_dir: Path) -> None:
    """The one of the stores that tests/conftest.py makes."""
    file = data_dir / "key.secret"
    file.write_bytes(bytes(range(32)))
    file.chmod(0o600)


def told(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def shown(result: Result) -> Any:
    return json.loads(told(result))


def serve_some(data_dir: Path, place: Path | str, account: str) -> None:
    """What a gateway does: one request is charged, with a share for node n1, another is not; both are chained."""

    async def both() -> None:
        secret = partial(load_secret, secret_path(data_dir))
        store = await Store.open(place, folder=data_dir, clock=SystemClock(), secret=secret, on_fatal=pytest.fail)
        try:
            for hold_id, paid in SERVED.items():
                hold = Hold(hold_id, account, 200, SystemClock().unix_ms() + 60_000, "key_1")
                await store.hold(hold)
                if paid is None:
                    store.release(hold)
                else:
                    store.capture(hold, paid)
            await store.drain()
            await store.extend_chain()
        finally:
            await store.close()

    asyncio.run(both())


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("accounts create team", 0, "team is there: prepaid.\n"),
        ("accounts create local", 1, "There is an account local already."),
        ("accounts create team --credit-limit -1", 2, "must not be below 0"),
        ("accounts limit local 5.50", 0, "local is postpaid, up to $5.50; $105.50 available.\n"),
        ("accounts limit revenue 1", 1, "revenue is no customer's account."),
        (
            "accounts create team --cache charged",
            0,
            "prepaid; its answers may come from memory, and cost the same then.\n",
        ),
        ("accounts create team --cache on", 2, "'on' is not one of 'off', 'charged', 'free'"),
        ("accounts cache local free", 0, "local: its answers may come from memory, and cost nothing then.\n"),
        ("accounts cache local off", 0, "local: its answers never come from memory.\n"),
        ("accounts cache local on", 2, "'on' is not one of 'off', 'charged', 'free'"),
        ("accounts cache revenue free", 1, "revenue is no customer's account."),
        ("accounts cache nobody free", 1, "There is no account nobody."),
        ("accounts statement local 2026-13", 1, "A month is written as in 2026-11."),
        ("accounts statement nobody 2026-11", 1, "There is no account nobody."),
        ("accounts statement local 2026-11 --out /none/of/it.csv", 1, "Cannot write /none/of/it.csv: No such file"),
        ("keys create --model nothing", 2, "There is no model nothing in the catalogue."),
        ("keys change key_none --days 1", 1, "There is no key key_none. `embedmesh keys list` shows them."),
        ("keys change key_none", 2, "Say what to change"),
        ("keys change key_none --days 1 --never-expires", 2, "not both"),
        ("prices set all-MiniLM-L6-v2 0.02", 0, f"A million tokens of {MODEL} cost $0.02 for all accounts from "),
        ("prices set nothing 0.02", 2, "There is no model nothing in the catalogue."),
        ("prices set all-MiniLM-L6-v2 0.02 --from 2020-01-01", 1, "cannot begin in the past"),
        ("prices set all-MiniLM-L6-v2 0.02 --from soon", 2, "'soon' is no time: write 2026-12-01"),
        ("prices end all-MiniLM-L6-v2", 1, f"No price of {MODEL} is set for all accounts."),
        ("ledger explain req_none", 1, "The ledger knows no request req_none:"),
        ("ledger refund req_none --reference r", 1, "No request req_none was charged, as far as usage is kept."),
        (f"ledger check --head {'0' * 63}", 2, "a head is 64 of the digits"),
        ("nodes payables", 0, "node  to be paid\n"),
        ("nodes pay n1 1 --reference r", 1, "n1 has earned nothing yet."),
        ("accounts credit local 1 --reference \udcff", 1, "An argument is not UTF-8 text; nothing was changed."),
        ("store migrate", 0, "Nothing was to be done: "),
    ],
)
def test_what_commands_say(run: Run, words: str, status: int, says: str) -> None:
    """A line that says what was done, or what is wrong; 1 for what the store refuses, 2 for wrong usage."""
    result = run(*words.split())
    assert result.exit_code == status, result.output
    assert says in result.output
    assert not result.stdout or status == 0


def test_a_limit_below_what_is_owed(run: Run, data_dir: Path) -> None:
    """What was lent cannot be called back by a smaller limit."""
    told(run("accounts", "create", "team", "--credit-limit", 1))
    serve_some(data_dir, store_path(data_dir), "team")
    refused = run("accounts", "limit", "team", 0)
    assert refused.exit_code == 1
    assert refused.stderr == "Error: team owes $0.00000014, running requests included.\n"


def test_the_cache_of_an_account_is_shown(run: Run) -> None:
    """In JSON wherever an account is, and as the last column; accounts of our own have none."""
    assert shown(run("accounts", "create", "team", "--json"))["cache"] == "off"
    assert shown(run("accounts", "create", "other", "--cache", "charged", "--json"))["cache"] == "charged"
    assert shown(run("accounts", "cache", "team", "free", "--json"))["cache"] == "free"
    assert shown(run("accounts", "limit", "team", 1, "--json"))["cache"] == "free"
    lines = [line.split() for line in told(run("accounts", "show")).splitlines()]
    last = {line[0]: line[-1] for line in lines}
    assert last == {
        "account": "cache",
        "local": "off",
        "other": "charged",
        "team": "free",
        "revenue": "-",
        "credit_source": "-",
        "payouts": "-",
    }


def test_a_key_is_limited_changed_and_rotated(run: Run) -> None:
    """What is not named stays; --no-limits takes all away first; the new key may do what the old one may."""
    limits = ("--model", "all-MiniLM-L6-v2", "--requests-a-minute", 600, "--budget-month", 50)
    made = shown(run("keys", "create", "--name", "ci", *limits, "--json"))
    assert made["limits"] == {
        "models": [MODEL],
        "requests_a_minute": 600,
        "tokens_a_minute": None,
        "concurrency": None,
        "budget_day": None,
        "budget_month": 50_000_000_000,
    }
    key_id = made["key_id"]
    said = told(run("keys", "change", key_id, "--concurrency", 4, "--days", 3))
    assert "Limits: 600 requests/min, 4 at once, $50.00/month, all-MiniLM-L6-v2. Expires: 20" in said
    said = told(run("keys", "change", key_id, "--no-limits", "--tokens-a-minute", 1000, "--never-expires"))
    assert said.endswith("(ci) is changed. Limits: 1,000 tokens/min. Expires: never.\n")
    assert "1,000 tokens/min" in told(run("keys", "list", "local"))
    rotated = shown(run("keys", "rotate", key_id, "--overlap", 2, "--json"))
    limits_left = {name: value for name, value in rotated["limits"].items() if value}
    assert limits_left == {"tokens_a_minute": 1000}
    assert rotated["key"] != made["key"] and rotated["expires"] is None
    old = next(key for key in shown(run("keys", "list", "--json")) if key["key_id"] == key_id)
    assert (old["state"], old["rotated_to"], old["expires"]) == ("active", rotated["key_id"], rotated["old_expires"])
    again = run("keys", "rotate", key_id)
    assert (again.exit_code, again.stdout) == (1, "") and "was rotated before" in again.stderr
    assert told(run("keys", "rotate", rotated["key_id"], "--overlap", 0)).startswith("em_")
    assert run("keys", "rotate", rotated["key_id"]).exit_code == 1


def test_more_keys_than_a_page(run: Run, data_dir: Path) -> None:
    """All are listed, and the last one can be revoked; an account has no more than it may."""
    with open_books(data_dir, store_path(data_dir)) as books:
        books.accounts.create("team")
        for _ in range(998):
            books.keys.create("local", ["embeddings"])
        last = [books.keys.create("team", ["embeddings"])[0].key_id for _ in range(12)][-1]
    assert len(shown(run("keys", "list", "--json"))) == 1_012
    refused = run("keys", "create", "local")
    assert (refused.exit_code, "at most 1,000 good keys" in refused.stderr) == (1, True)
    told(run("keys", "revoke", last))


def test_a_key_that_another_made_is_listed_with_it(run: Run, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is one that was rotated; a list without any has no such column."""
    assert "draws from" not in told(run("keys", "list"))
    with open_books(data_dir, store_path(data_dir)) as books:
        parent = books.keys.create("local", ["keys"])[0].key_id
        child = books.keys.create_below(parent, ["keys"])[0].key_id
    new = shown(run("keys", "rotate", parent, "--json"))["key_id"]
    above = {key["key_id"]: key["parent"] for key in shown(run("keys", "list", "--json"))}
    assert (above[child], above[parent], above[new]) == (new, new, None)
    head, *rows = told(run("keys", "list")).splitlines()
    assert head.endswith("draws from")
    assert {row.split()[0]: row.split()[-1] for row in rows if row.endswith(new)} == {child: new, parent: new}
    told(run("keys", "revoke", new))
    assert {key["state"] for key in shown(run("keys", "list", "--json")) if key["name"] == ""} == {"revoked"}


def test_a_new_key_has_the_limits_that_the_gateway_was_told(run: Run, data_dir: Path) -> None:
    """But for those that are given; the person is told of them."""
    with open_books(data_dir, store_path(data_dir)) as books:
        books.new_keys.write(NewKeys(parse_limits("requests-a-minute=60,concurrency=8")))
    made = run("keys", "create", "--concurrency", 3, "--budget-day", 1)
    assert "Limits: 60 requests/min, 3 at once, $1.00/day." in made.stderr
    limits = shown(run("keys", "create", "--json"))["limits"]
    assert {name: value for name, value in limits.items() if value} == {"requests_a_minute": 60, "concurrency": 8}


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("", Limits()),
        (" ", Limits()),
        ("concurrency=8", Limits(concurrency=8)),
        (LIMITS_EXAMPLE, Limits(requests_a_minute=60, tokens_a_minute=1_000_000, concurrency=8)),
        (" tokens-a-minute = 5 , concurrency=1 ", Limits(tokens_a_minute=5, concurrency=1)),
    ],
)
def test_key_defaults_are_read(text: str, limits: Limits) -> None:
    assert parse_limits(text) == limits


@pytest.mark.parametrize(
    "text",
    [
        "rpm=60",
        "concurrency",
        "concurrency=",
        "concurrency=0",
        "concurrency=-1",
        "concurrency=1.5",
        "concurrency=1,concurrency=2",
        "concurrency=1,",
        ",",
        "concurrency=٣",
        "tokens-a-minute=1000000000001",
        "tokens-a-minute=" + "9" * 5_000,
        "budget-day=5",
    ],
)
def test_key_defaults_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write requests-a-minute|is a whole number from 1 to 1000000000000"):
        parse_limits(text)


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_key_defaults_that_make_no_sense_are_told_before_anything_starts(tmp_path: Path, command: str) -> None:
    """In one line, with exit code 78, as every wrong setting."""
    done = start(command, "--data-dir", str(tmp_path), "--port", "0", env={"EMBEDMESH_KEY_DEFAULTS": "rpm=60"})
    _, said = done.communicate(timeout=60)
    assert (done.returncode, len(said.splitlines())) == (78, 1)
    assert said.startswith(f"embedmesh {command}: 'rpm=60' is none of requests-a-minute,") and "--key-defaults" in said


def test_prices_of_all_times(run: Run) -> None:
    """What counts now, what is to come, what is over; a price that never began was withdrawn."""
    told(run("accounts", "create", "partner"))
    for usd, more in ((0.02, ()), (0.03, ("--from", "2999-12-01T08:00:00+08:00")), (0.01, ("--account", "partner"))):
        told(run("prices", "set", "all-MiniLM-L6-v2", usd, *more))
    told(run("prices", "end", "all-MiniLM-L6-v2", "--account", "partner"))
    found = shown(run("prices", "list", MODEL, "--json"))
    assert [(one["account"], one["price_nanousd_per_million_tokens"], one["state"]) for one in found] == [
        (None, 30_000_000, "to come"),
        ("partner", 10_000_000, "over"),
        (None, 20_000_000, "in force"),
    ]
    assert found[0]["from"] == found[2]["to"] == "2999-12-01T00:00:00Z"
    assert shown(run("prices", "list", "another", "--json")) == []
    said = told(run("prices", "end", "all-MiniLM-L6-v2"))
    assert said.endswith("has ended, and what was to follow it is withdrawn.\n")
    assert {one["state"] for one in shown(run("prices", "list", MODEL, "--json"))} == {"over", "withdrawn"}


WRITER = """
[[models]]
id = "acme/writer"
modalities = ["chat", "images"]
max_tokens = 1000
price = 150_000_000
output_price = 600_000_000
image_prices = { "1024x1024" = 40_000_000 }

[[models]]
id = "acme/reranker"
modalities = ["rerank"]
max_tokens = 512
search_price = 2_000_000
"""


def test_each_meter_has_a_price(run: Run, tmp_path: Path) -> None:
    """Said in words, with the unit of each; what a model has no price for is refused, and what is set is named."""
    (tmp_path / "models.toml").write_text(WRITER)

    def prices(*words: object) -> Result:
        return run("prices", *words, "--catalogue", tmp_path / "models.toml")

    said = told(prices("set", "acme/writer", "0.5", "--meter", "output"))
    assert said.startswith("A million output tokens of acme/writer cost $0.50 for all accounts from ")
    said = told(prices("set", "acme/writer", "0.05", "--meter", "images:1024x1024"))
    assert said.startswith("An image of 1024x1024 by acme/writer costs $0.05 for all accounts from ")
    told(prices("set", "acme/writer", "0.2"))
    refused = prices("set", "acme/writer", "0.05", "--meter", "images:1x1")
    assert "use one of input, cached, output, images:1024x1024." in refused.stderr
    by_meter = {one["meter"]: one for one in shown(prices("list", "--json"))}
    assert {meter: one["state"] for meter, one in by_meter.items()} == dict.fromkeys(by_meter, "in force")
    assert by_meter["output"]["price_nanousd_per_million_tokens"] == 500_000_000
    assert by_meter["images:1024x1024"]["price_nanousd_per_image"] == 50_000_000
    rows = [re.split(" {2,}", line)[2:4] for line in told(prices("list")).splitlines()]
    units = ["a million tokens", "$0.20"], ["an image of 1024x1024", "$0.05"], ["a million output tokens", "$0.50"]
    assert rows == [["of", "price"], *units]
    said = told(prices("set", "acme/reranker", "0.001", "--meter", "searches", "--account", "local"))
    assert said.startswith("A search by acme/reranker costs $0.001 for local from ")
    (one,) = shown(prices("list", "acme/reranker", "--json"))
    assert (one["meter"], one["price_nanousd_per_search"]) == ("searches", 1_000_000)
    assert "use one of searches." in prices("set", "acme/reranker", "0.001").stderr
    said = told(prices("end", "acme/writer", "--meter", "output"))
    assert said.startswith("The price of a million output tokens of acme/writer for all accounts has ended")
    again = prices("end", "acme/writer", "--meter", "output")
    assert "No price of acme/writer for a million output tokens is set for all accounts." in again.stderr


def test_a_stream_is_explained(tmp_path: Path) -> None:
    """While it runs: what was noted. Once its gateway is gone: that it was charged for that."""
    data_dir = tmp_path / "data"
    bootstrap(data_dir, "http://127.0.0.1:8080/v1")
    run = run_offline(data_dir)
    hold = Hold("req_stream", "local", 200, SystemClock().unix_ms() + 60_000, "key_1")
    note = SERVED["req_paid"]
    assert note is not None

    async def stream(*, fresh: bool) -> None:
        secret = partial(load_secret, secret_path(data_dir))
        store = await Store.open(store_path(data_dir), folder=data_dir, clock=SystemClock(), secret=secret)
        if fresh:
            await store.hold(hold)
            assert await store.extend([StreamNote(hold, note, hold.deadline_ms + 1_000)]) == {hold.hold_id}
        await store.close()

    asyncio.run(stream(fresh=True))
    *_, noted, deadline = told(run("ledger", "explain", "req_stream")).splitlines()
    assert noted[27:] == "noted: its stream has cost $0.00000014 until now"
    assert deadline[27:] == "its deadline: it runs, and is charged what is noted then, unless it is extended"
    explained = shown(run("ledger", "explain", "req_stream", "--json"))
    assert explained["note"]["cost"] == 140 and explained["state"] == "open"
    asyncio.run(stream(fresh=False))
    story = [line[27:] for line in told(run("ledger", "explain", "req_stream")).splitlines()[2:]]
    assert story[0] == "its gateway had died while it ran: $0.00000014 charged, as was last noted of its stream"
    assert story[2] == "charge: $0.00000014 from local to revenue"
    assert shown(run("ledger", "explain", "req_stream", "--json"))["note"] is None
    assert told(run("ledger", "check")).startswith("The money adds up: ")


def test_a_lock_is_explained(tmp_path: Path) -> None:
    """By its number, or that of its request: what it was for, whether a request has used it, and how that ended."""
    data_dir = tmp_path / "data"
    bootstrap(data_dir, "http://127.0.0.1:8080/v1")
    run = run_offline(data_dir)
    used, unused = 10**14, 10**14 + 1

    async def locks() -> None:
        secret = partial(load_secret, secret_path(data_dir))
        now_ms = SystemClock().unix_ms()
        store = await Store.open(store_path(data_dir), folder=data_dir, clock=SystemClock(), secret=secret)
        for lock_id in (used, unused):
            hold = Hold(f"req_{lock_id}", "local", 200, now_ms + 60_000, "key_1")
            lock = LockTerms(
                lock_id, "local", "key_1", hold.hold_id, "n1", bytes(32), bytes(32), "hpke-1", MODEL, 10, 20_000_000,
                hold.deadline_ms,
            )  # fmt: skip
            await store.locks.open(lock, hold)
            if lock_id == used:
                found = await store.locks.find("local", lock_id)
                mine = await store.locks.redeem(found, b"b" * 32, now_ms + 90_000)
                assert isinstance(mine, Hold) and SERVED["req_paid"] is not None
                store.capture(mine, SERVED["req_paid"])
        await store.expire(now_ms + 60_001)
        await store.close()

    asyncio.run(locks())
    story = told(run("ledger", "explain", used))
    assert story == told(run("ledger", "explain", f"req_{used}"))
    told_of, held, what, taken, captured, *_ = story.splitlines()
    assert f"req_{used}" in told_of and "$0.0000002 held" in held
    terms = f"up to 10 tokens of {MODEL} at $0.02 a million, on node n1 by hpke-1, until "
    assert what[27:].startswith(f"for lock {used}: {terms}")
    assert taken[27:] == "a request has used the lock"
    assert captured[27:] == "the reply was delivered, and $0.00000014 of it charged"
    ends = "no request has used the lock in time: released, nothing is charged\n"
    assert told(run("ledger", "explain", unused)).endswith(ends)
    assert shown(run("ledger", "explain", unused, "--json"))["lock"]["used_ms"] is None
    assert "knows no lock 7." in run("ledger", "explain", 7).stderr
    assert told(run("ledger", "check")).startswith("The money adds up: ")


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_month_of_a_team(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Everything once, on either store: money comes, is spent, explained, given back, paid out, and adds up."""
    data_dir = tmp_path / "data"
    place: str | Path = store_path(data_dir)
    if kind == "postgres":
        place = request.getfixturevalue("database")
        monkeypatch.setenv("EMBEDMESH_STORE", str(place))
        data_dir.mkdir(mode=0o700)
        make_secret(data_dir)
    run = run_offline(data_dir)
    made = shown(run("store", "init", "--json"))
    keys = (data_dir / "bootstrap.json").read_bytes()
    assert (made, keys) == (shown(run("store", "init", "--json")), (data_dir / "bootstrap.json").read_bytes())
    assert told(run("store", "migrate")).startswith("Nothing was to be done: ")
    told(run("accounts", "create", "team", "--credit-limit", 2))
    told(run("accounts", "credit", "team", 1, "--reference", "=1+1"))
    key = shown(run("keys", "create", "team", "--model", "all-MiniLM-L6-v2", "--json"))
    told(run("keys", "rotate", key["key_id"]))
    told(run("prices", "set", "all-MiniLM-L6-v2", "0.02", "--account", "team"))
    serve_some(data_dir, place, "team")
    head = shown(run("ledger", "check", "--json"))["head"]
    assert head["transfers"] == 4

    story = told(run("ledger", "explain", "req_paid")).splitlines()
    assert story[0] == "Request req_paid of team, with key_1"
    assert [line[27:] for line in story[2:]] == [
        "the reply was delivered, and $0.00000014 of it charged",
        f"for 7 tokens of {MODEL} at $0.02 a million, by node n1",
        "charge: $0.00000014 from team to revenue",
        "payable: $0.00000004 from revenue to node:n1",
    ]
    assert "no reply was delivered: released" in told(run("ledger", "explain", "req_free"))
    explained = shown(run("ledger", "explain", "req_paid", "--json"))
    assert (explained["state"], explained["captured"], explained["held"]) == ("captured", 140, 200)

    refund = ("ledger", "refund", "req_paid", "0.00000004", "--reference", "ticket 1")
    assert told(run(*refund)) == "$0.00000004 given back; team has $2.9999999 available.\n"
    assert told(run(*refund)).startswith("Nothing done: ")
    assert shown(run("ledger", "refund", "req_paid", "--reference", "ticket 2", "--json"))["amount_nanousd"] == 100
    refused = run("ledger", "refund", "req_paid", "--reference", "ticket 3")
    assert "$0.00 of this request can be given back." in refused.stderr

    assert shown(run("nodes", "payables", "--json")) == [{"node": "n1", "payable_nanousd": 40}]
    pay = ("nodes", "pay", "n1", "0.00000003", "--reference", "wire 1")
    assert told(run(*pay)) == "$0.00000003 paid out; n1 is to be paid $0.00000001.\n"
    assert told(run(*pay)).startswith("Nothing done: ")
    assert "n1 has earned $0.00000001" in run("nodes", "pay", "n1", 1, "--reference", "wire 2").stderr

    rows = list(csv.DictReader(io.StringIO(told(run("accounts", "statement", "team", MONTH)))))
    assert [(row["kind"], row["amount_usd"], row["balance_nanousd"], row["reference"]) for row in rows] == [
        ("opening balance", "", "0", ""),
        ("credit", "1.000000000", "1000000000", "'=1+1"),
        ("charge", "-0.000000140", "999999860", ""),
        ("refund", "0.000000040", "999999900", "ticket 1"),
        ("refund", "0.000000100", "1000000000", "ticket 2"),
        ("closing balance", "", "1000000000", ""),
    ]
    assert list(rows[2].values())[6:] == ["req_paid", "", "key_1", MODEL, "7", "20000000", "1", ""]
    file = tmp_path / "team.json"
    words = ("accounts", "statement", "team", MONTH, "--format", "json", "--out", file)
    told(run(*words))
    written = json.loads(file.read_text())
    assert shown(run(*words[:4], "--json"))[:-1] == written[:-1]
    assert [row["balance_nanousd"] for row in written] == [int(row["balance_nanousd"]) for row in rows]
    assert tuple(written[0]) == STATEMENT_COLUMNS and file.stat().st_mode & 0o777 == 0o600
    assert run(*words).exit_code == 2 and told(run(*words, "--overwrite")) == ""

    done = told(run("ledger", "check", "--head", head["hash"]))
    assert done.startswith("The money adds up: ")
    assert done.endswith(f"chain: 4 transfers in 1 blocks, head {head['hash']}\n")
    other = run("ledger", "check", "--head", "1" * 64)
    assert other.exit_code == 1 and other.stdout.startswith("THE CHAIN HAS NO HEAD 1111")
    assert run("ledger", "check", "--head", "1" * 64, "--json").exit_code == 1


def test_a_store_of_an_unknown_version_is_left_untouched(tmp_path: Path) -> None:
    """All commands say what to do, `store migrate` too."""
    path = store_path(tmp_path)
    db = SqliteEngine(path).connect(busy_s=0)
    db.execute("PRAGMA user_version = 5")
    db.close()
    before = path.read_bytes()
    make_secret(tmp_path)
    run = run_offline(tmp_path)
    assert "There is no store at " in str(run_offline(tmp_path / "elsewhere")("accounts", "show").exception)
    assert not (tmp_path / "elsewhere").exists()
    for words in (("accounts", "show"), ("store", "migrate")):
        assert "leaves it untouched: start with another --data-dir" in str(run(*words).exception)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [(0, "0.000000000"), (-20, "-0.000000020"), (2**62, "4611686018.427387904"), (12_500_000_000, "12.500000000")],
)
def test_plain_amounts(nanousd: int, text: str) -> None:
    """All nine decimals, no sign of a currency, no separators."""
    assert plain_usd(nanousd) == text


@pytest.mark.parametrize("first", "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
def test_no_text_of_a_statement_can_be_run_by_a_spreadsheet(first: str) -> None:
    """The last four are the wide forms of the first, which some spreadsheets take for them."""
    file = io.StringIO(newline="")
    write_csv(file, [dict.fromkeys(STATEMENT_COLUMNS) | {"reference": f"{first}1+1", "amount_usd": "-1.0"}])
    _, cells = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert cells[STATEMENT_COLUMNS.index("reference")] == f"'{first}1+1"
    assert cells[STATEMENT_COLUMNS.index("amount_usd")] == "-1.0"


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_no_text_of_a_statement_begins_a_row(end: str) -> None:
    """It would be the first cell of it, and could be a formula."""
    file = io.StringIO(newline="")
    write_csv(file, [dict.fromkeys(STATEMENT_COLUMNS) | {"reference": f"paid{end}=1+1"}])
    _, cells = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert cells[STATEMENT_COLUMNS.index("reference")] == f"paid{end}=1+1"


def test_what_is_done_without_a_gateway_is_in_the_audit(run: Run) -> None:
    """By the user of the machine: the first start, too; the table and JSON say the same."""
    told(run("accounts", "create", "team", "--credit-limit", "2"))
    key = shown(run("keys", "create", "team", "--name", "a private name", "--json"))
    told(run("keys", "revoke", key["key_id"]))
    told(run("accounts", "credit", "team", "1", "--reference", "\x1b[2Jwire"))
    rows = shown(run("audit", "--json"))
    me = this_user()
    assert {(row["actor"], row["origin"]) for row in rows} == {(me.name, me.origin)}
    assert [row["act"] for row in reversed(rows)] == [
        "account.create", "account.credit", "key.create", "key.create",  # the first start
        "account.create", "key.create", "key.revoke", "account.credit",
    ]  # fmt: skip
    assert [row["act"] for row in shown(run("audit", "--object", key["key_id"], "--limit", "1", "--json"))] == [
        "key.revoke"
    ]
    text = told(run("audit"))
    assert "\x1b" not in text and "a private name" not in text
    assert "credit_limit_nanousd 2000000000" in text and f"key.revoke      {key['key_id']}" in text
    assert told(run("audit", "--act", "price")) == "No such act.\n"
    refused = run("audit", "--act", "key.forget")
    assert refused.exit_code == 2 and "key.revoke" in refused.stderr
    assert f"audit: {len(rows)} acts, head {rows[0]['hash']}\n" in told(run("ledger", "check"))
    told(run("ledger", "check", "--head", rows[3]["hash"]))
