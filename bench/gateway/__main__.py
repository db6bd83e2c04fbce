"""The gateway's own cost, beside its peers': `python -m bench.gateway [--rounds N] [--only NAME ...] [--json]`.

Loopback only. Every gateway has one core to itself, in front of a node that costs nearly nothing; every vector is
checked. Ours is measured in stages, and beside nginx, vllm-router, LiteLLM and Portkey, each of which is installed in
an environment of its own under `.bench`; one that does not install is named and left out. All of them are measured in
turns, round by round, and the figures are medians: exit code 1 where a target that could be measured is missed.
"""

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from bench.gateway.contenders import PLAIN, Measurable, started
from bench.gateway.figures import Figures, GatewayRow, found_targets, median_row
from bench.gateway.material import made_material
from bench.gateway.ours import ALONE, SIGNED, STAGES
from bench.gateway.peers import PEERS
from bench.gateway.plot import plot
from bench.rig.command import bench, progress, save, say
from bench.rig.install import NotInstalled
from bench.rig.postgres import serving
from embedmesh.process import python_in_words

SEVERAL = 16  # texts a request
RATES = (200.0, 1_000.0)  # requests a second, open loop
TWO = 2  # workers
SOLO = (*STAGES, ALONE, PLAIN, SIGNED, *PEERS)
IN_SIXTEENS = ("hold", "nginx", "vllm-router", "LiteLLM")


def wanted(only: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """What is measured, by the name that is shown, and how it is started."""
    all_of_them: list[tuple[str, dict[str, Any]]] = [(name, {"name": name}) for name in SOLO]
    all_of_them += [(f"{name}, {SEVERAL} texts", {"name": name, "inputs": SEVERAL}) for name in IN_SIXTEENS]
    all_of_them += [
        ("count, 2 workers", {"name": "count", "workers": TWO}),
        ("hold, 2 workers", {"name": "hold", "workers": TWO}),
        ("hold, PostgreSQL", {"name": "hold", "store": "postgres"}),
        ("hold, PostgreSQL, 2 workers", {"name": "hold", "store": "postgres", "workers": TWO}),
    ]
    return [one for one in all_of_them if not only or one[0] in only]


def measure(rounds: int = 3, seconds: float = 3.0, only: Sequence[str] = ()) -> Figures:
    """All of it."""
    rows: dict[str, list[GatewayRow]] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        material = stack.enter_context(made_material())
        contenders: dict[str, Measurable] = {}
        bar = stack.enter_context(progress())
        for name, how in bar.track(wanted(only), description="starting"):
            if "store" in how:
                how |= {"store": stack.enter_context(serving(on_disk=True)).new()}
            try:
                contenders[name] = stack.enter_context(started(material=material, **how))
            except NotInstalled as error:
                left_out[name] = str(error)
            else:
                contenders[name].sleep()
        for name, contender in bar.track([*contenders.items()] * rounds, description="measuring"):
            rates = RATES if name in ("hold", ALONE) else ()
            with contender.awake():
                at_rates = [contender.load(seconds, rate) for rate in rates]
                rows.setdefault(name, []).append(GatewayRow.of(name, contender, contender.load(seconds), at_rates))
    machine = f"{platform.machine()}, {python_in_words()}"
    medians = [median_row(each) for each in rows.values()]
    figures = Figures(machine, rounds, seconds, medians, left_out, found_targets({row.name: row for row in medians}))
    say(f"Drawn: {save('gateway.svg', plot(figures))}")
    return figures


if __name__ == "__main__":
    bench(measure, seconds="of one load", only="names as the table shows them, such as hold nginx")
