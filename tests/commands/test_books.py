"""`accounts`, `keys`, `ledger` and `store` on a store of their own, in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from embedmesh.provision.bootstrap import bootstrap, open_books
from embedmesh.settings import store_path
from tests.commands.conftest import run_offline

Run = Callable[..., Result]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """What a first `serve` makes."""
    bootstrap(tmp_path / "data", "http://127.0.0.1:8080/v1")
    return tmp_path / "data"


@pytest.fixture
def run(data_dir: Path) -> Run:
    return run_offline(data_dir)


def test_customers_come_first_and_the_others_are_marked(run: Run) -> None:
    """A newcomer sees the own account at the top; times of accounts that were never made are null."""
    lines = run("accounts", "show").stdout.splitlines()
    assert lines[1].split()[:3] == ["local", "customer", "$100.00"]
    assert all(" internal: " in line for line in lines[2:])
    created = {each["account"]: each["created"] for each in json.loads(run("accounts", "show", "--json").stdout)}
    assert created["revenue"] is None
    assert created["local"].endswith("Z") and "T" in created["local"]


@pytest.mark.parametrize(
    "usd, status, says",
    [
        ("25", 0, "$25.00 credited; local has $125.00 available."),
        ("-5.50", 0, "$5.50 taken back; local has $94.50 available."),
        ("-101", 1, "local has $100.00 available; $101.00 cannot be taken back."),
        ("0", 1, "at most $4,611,686,018.427387904"),
        ("lots", 2, "not an amount of US dollars"),
        ("--refrence", 2, "not an amount of US dollars"),
    ],
)
def test_credit(run: Run, usd: str, status: int, says: str) -> None:
    """A negative amount needs no `--`; what is refused comes with its numbers."""
    result = run("accounts", "credit", "local", usd)
    assert result.exit_code == status
    assert says in result.output


def test_keys_are_listed_with_their_expiry(run: Run) -> None:
    """Columns fit their content; programs get null where a key never expires."""
    name = "a name that is longer than any heading"
    made = json.loads(run("keys", "create", "--name", name, "--days", 2, "--json").stdout)
    lines = run("keys", "list", "local").stdout.splitlines()
    at = lines[0].index("expires")
    assert [line[at:].split()[0] == "-" for line in lines[1:]] == [True, True, False]
    assert lines[-1].endswith(name) and all(line == line.rstrip() for line in lines)
    listed = {key["key_id"]: key for key in json.loads(run("keys", "list", "--json").stdout)}
    assert listed[made["key_id"]]["expires"].endswith("Z")
    assert sorted(key["expires"] is None for key in listed.values()) == [False, True, True]
    assert {key["state"] for key in listed.values()} == {"active"}


def test_keys_and_accounts_that_are_not_there(run: Run) -> None:
    """An unknown account fails alike everywhere; an unknown key and one revoked before are told apart."""
    failures = [run(*words) for words in (("accounts", "show", "nobody"), ("keys", "list", "nobody"))]
    assert [(failed.exit_code, failed.stderr) for failed in failures] == [
        (1, "Error: There is no account nobody.\n")
    ] * 2
    key_id = json.loads(run("keys", "create", "--name", "ci", "--json").stdout)["key_id"]
    said = [run("keys", "revoke", which) for which in (key_id, key_id, "key_none")]
    assert [result.exit_code for result in said] == [0, 1, 1]
    assert said[0].stdout == f"Key {key_id} of local (ci) is revoked.\n"
    assert said[1].stderr == f"Error: Key {key_id} of local (ci) was revoked before.\n"
    assert said[2].stderr.startswith("Error: There is no key key_none.")


@pytest.mark.parametrize("name", ["embedmesh.db", "embedmesh.db-wal", "embedmesh.db.lock", "key.secret", "serve.lock"])
def test_a_backup_never_takes_the_place_of_the_store(run: Run, data_dir: Path, name: str) -> None:
    """Not even with --overwrite, nor by another path to the same file."""
    before = (data_dir / "embedmesh.db").read_bytes()
    (data_dir / name).touch(mode=0o600)
    (data_dir.parent / "link").symlink_to(data_dir / name)
    (data_dir.parent / "hard").hardlink_to(data_dir / name)
    for target in (
        data_dir / name,
        data_dir / ".." / "data" / name,
        data_dir.parent / "link",
        data_dir.parent / "hard",
    ):
        refused = run("store", "backup", target, "--overwrite")
        assert refused.exit_code == 2
        assert "belongs to the server itself" in refused.stderr and refused.stderr.count("\n") == 1
    assert (data_dir / "embedmesh.db").read_bytes() == before


def test_a_backup_replaces_an_older_one_only_when_asked(run: Run, data_dir: Path, tmp_path: Path) -> None:
    """A file that is there stays; with --overwrite the copy is whole."""
    target = tmp_path / "copy" / "embedmesh.db"
    target.parent.mkdir()
    target.write_text("precious")
    refused = run("store", "backup", target)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert target.read_text() == "precious"
    done = run("store", "backup", target, "--overwrite")
    assert done.exit_code == 0, done.output
    (target.parent / "key.secret").write_bytes((data_dir / "key.secret").read_bytes())
    (target.parent / "key.secret").chmod(0o600)
    with open_books(target.parent, store_path(target.parent)) as books:
        assert books.check().ok


def test_the_verdict_comes_first(run: Run) -> None:
    """Whoever runs the check reads on its first line what came out."""
    done = run("ledger", "check")
    assert done.exit_code == 0
    assert done.stdout.startswith("The money adds up: ")
