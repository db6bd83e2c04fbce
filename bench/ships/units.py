"""The units of systemd: verified, and scored for what they may do."""

import re
import sys
import tempfile
from pathlib import Path

from bench.rig.install import NotInstalled
from bench.ships.tools import Checklist, ToolFailed, run, system_tool
from tests.data import CHECKOUT

UNITS = CHECKOUT / "deploy" / "systemd"
EXPOSURE_MAX = 2.0  # systemd calls what is below this OK


def check_units(rows: Checklist) -> None:
    """Each unit. They are not started here: that needs a system that systemd runs."""
    try:
        analyze = system_tool("systemd-analyze", "systemd")
    except NotInstalled as why:
        rows.skip("the units are right", why)
        return
    with tempfile.TemporaryDirectory() as folder:
        for unit in sorted(UNITS.glob("*.service")):
            copy = Path(folder) / unit.name  # its program is not installed here: one that is stands for it
            copy.write_text(unit.read_text().replace("/opt/embedmesh/bin/embedmesh", sys.executable))
            try:
                said = run([analyze, "verify", "--man=no", "--recursive-errors=no", copy])
                rows.check(f"{unit.name}: systemd-analyze verify", True, said)
            except ToolFailed as why:
                rows.check(f"{unit.name}: systemd-analyze verify", False, why)
            said = run([analyze, "security", "--offline=true", "--no-pager", copy])
            found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
            exposure = float(found[1]) if found else 10.0
            rows.check(f"{unit.name}: exposure below {EXPOSURE_MAX}", exposure < EXPOSURE_MAX, exposure)
    rows.skip("the units start", "they were, by hand, in a container of systemd-nspawn")
