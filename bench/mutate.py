"""Does any test notice when the ledger, holds, keys or limits are changed? `make mutate`, or `python -m bench.mutate`.

Every small change (a mutant) of the modules below is tried against the tests that run through it, on SQLite. What no
test notices survives. The score is the share that was noticed; exit code 1 below SCORE_MIN. A run takes half an hour;
it goes on where it was stopped (`--anew` begins again), and lists what survived (`--survivors`).
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.rig.command import parser, run
from tests.data import CHECKOUT

WORK = CHECKOUT / ".bench" / "mutate"
SCORE_MIN = 0.90
MODULES = (
    "embedmesh/rules/money.py",
    "embedmesh/storage/ledger/holds.py",
    "embedmesh/storage/cached/rate_limits.py",
    "embedmesh/storage/cached/keys.py",
    "embedmesh/storage/secrets/tokens.py",
    "embedmesh/storage/ledger/chain.py",
    "embedmesh/flow/hold.py",
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


def main(arguments: Sequence[str]) -> int:
    """The command."""
    made = parser("bench.mutate", __doc__)
    made.add_argument("--anew", action="store_true", help="forget earlier runs")
    made.add_argument("--survivors", action="store_true", help="list what no test noticed, and run nothing")
    options: Any = made.parse_args(arguments)
    if options.survivors:
        return subprocess.run([sys.executable, "-m", "mutmut", "results"], cwd=WORK, check=False).returncode
    prepare(options.anew)
    subprocess.run([sys.executable, "-m", "mutmut", "run"], cwd=WORK, check=False, stdout=sys.stderr)
    share, found = score()
    if options.json:
        print(json.dumps({"ok": share >= SCORE_MIN, "score": share, **found}))
    else:
        print(", ".join(f"{name} {count:,}" for name, count in found.items() if count))
        print(f"{share:.1%} of the changes were noticed; at least {SCORE_MIN:.0%} must be.")
    return 0 if share >= SCORE_MIN else 1


if __name__ == "__main__":
    run(main)
