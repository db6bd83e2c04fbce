"""Does any test notice when the ledger, holds, keys or limits are changed? `make mutate`, or `python -m bench.mutate`.

Every small change (a mutant) of the modules below is tried against the tests that run through it, on SQLite. What no
test notices survives. The score is the share that was noticed; exit code 1 below SCORE_MIN. A run takes half an hour;
it goes on where it was stopped (`--anew` begins again), and lists what survived (`--survivors`).
"""

import json
import shutil
import subprocess
import sys

import msgspec

from bench.rig.command import bench
from tests.data import CHECKOUT

WORK = CHECKOUT / ".bench" / "mutate"
SCORE_MIN = 0.90
MODULES = (
    "embedmesh/rules/money.py",
    "embedmesh/rules/spending.py",
    "embedmesh/storage/ledger/end_hold.py",
    "embedmesh/storage/ledger/place_hold.py",
    "embedmesh/storage/ledger/open_lock.py",
    "embedmesh/storage/ledger/redeem_lock.py",
    "embedmesh/storage/ledger/room.py",
    "embedmesh/storage/ledger/tab_keeper.py",
    "embedmesh/storage/ledger/recalls.py",
    "embedmesh/storage/cached/rate_limits.py",
    "embedmesh/storage/cached/slots.py",
    "embedmesh/storage/cached/keys.py",
    "embedmesh/storage/secrets/tokens.py",
    "embedmesh/storage/ledger/chain.py",
    "embedmesh/flow/bill.py",
)
TESTS = ("tests/storage", "tests/flow", "tests/rules")
# The same rules again on a server, by chance, or in processes of their own: slower, and seeing no more.
WITHOUT = "not postgres and not kill and not test_model and not faults and not migrations and not verify and not copy"
CONFIG = f"""

[tool.mutmut]
source_paths = ["embedmesh/"]
only_mutate = {json.dumps(MODULES)}
pytest_add_cli_args_test_selection = {json.dumps(TESTS)}
pytest_add_cli_args = {json.dumps(["-p", "no:schemathesis", "-p", "no:xdist", "-k", WITHOUT])}
also_copy = ["bench", "tests"]
"""


def prepare(anew: bool) -> None:
    """A copy of what is committed, with the configuration of the mutations."""
    if anew and WORK.exists():
        shutil.rmtree(WORK)
    WORK.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=CHECKOUT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(WORK)], input=archive.stdout, check=True)
    project = WORK / "pyproject.toml"
    project.write_text(project.read_text() + CONFIG)


def score() -> tuple[float, dict[str, int]]:
    """The share that was noticed, and how many mutants ended how."""
    subprocess.run([sys.executable, "-m", "mutmut", "export-cicd-stats"], cwd=WORK, check=True, capture_output=True)
    found: dict[str, int] = json.loads((WORK / "mutants" / "mutmut-cicd-stats.json").read_text())
    noticed = found["killed"] + found["timeout"]
    return noticed / max(1, found["total"] - found.get("skipped", 0)), found


class Figures(msgspec.Struct, frozen=True):
    """The share of mutants that was noticed, and how many ended how."""

    score: float
    mutants: dict[str, int]

    @property
    def broken(self) -> list[str]:
        """Whether too few were noticed."""
        return [f"{self.score:.1%} were noticed, not {SCORE_MIN:.0%}"] if self.score < SCORE_MIN else []


def measure(anew: bool = False, survivors: bool = False) -> Figures:
    """Go on where the last run stopped."""
    if survivors:
        subprocess.run([sys.executable, "-m", "mutmut", "results"], cwd=WORK, check=False)
    else:
        prepare(anew)
        subprocess.run([sys.executable, "-m", "mutmut", "run"], cwd=WORK, check=False, stdout=sys.stderr)
    return Figures(*score())


if __name__ == "__main__":
    bench(measure, anew="forget earlier runs", survivors="list what no test noticed, and run nothing")
