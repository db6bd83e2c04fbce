"""The gateway's own cost, beside its peers': `python -m bench.gateway [--rounds N] [--only NAME ...] [--json]`.

Loopback only. Every gateway has one core to itself, in front of nodes that cost nearly nothing; requests are as an SDK
sends them, and every vector is checked. Ours is measured in stages, with one key and many, and beside nginx,
vllm-router, sglang-router, LiteLLM and Portkey, each of which is installed in an environment of its own under `.bench`;
one that does not install is named and left out. All are measured in turns, round by round. The gates come last: exit
code 1 where one that could be measured is not passed.
"""

import platform
from collections.abc import Sequence
from contextlib import ExitStack

from bench.gateway.contenders import DIRECT, PLAIN, Measurable, Setup, started
from bench.gateway.figures import HOLD, RATES, Figures, GatewayRow, found_gates, median_row
from bench.gateway.material import made_material
from bench.gateway.ours import ALONE, SIGNED, STAGES
from bench.gateway.peers import PEERS
from bench.gateway.plot import plot
from bench.gateway.show import show
from bench.rig.command import bench, check_names, progress, save, say
from bench.rig.install import NotInstalled
from bench.rig.postgres import serving
from embedmesh.process import python_in_words

SEVERAL, MANY_KEYS, MOST_KEYS, NODES = 16, 100, 1_000, 4
NEW_DATABASE = "new"  # in place of a store that is made when it is needed
QUICK_PEERS = ("nginx", "vllm-router", "sglang-router")
SETUPS = [
    *map(Setup, (*STAGES, ALONE, PLAIN, SIGNED, DIRECT, *PEERS)),
    *(Setup(HOLD, keys=keys) for keys in (MANY_KEYS, MOST_KEYS)),
    *(Setup(name, inputs=SEVERAL) for name in (HOLD, *QUICK_PEERS, "LiteLLM")),
    *(Setup(name, floats=True) for name in (HOLD, *QUICK_PEERS)),
    *(Setup(name, nodes=NODES) for name in (HOLD, *QUICK_PEERS)),
    Setup("count", workers=2),
    Setup(HOLD, workers=2),
    Setup(HOLD, store=NEW_DATABASE),
    Setup(HOLD, store=NEW_DATABASE, workers=2),
]
AT_RATES = (HOLD, DIRECT, *QUICK_PEERS)


def measure(rounds: int = 3, seconds: float = 3.0, only: Sequence[str] = (), first: bool = False) -> Figures:
    """All of it, or some."""
    check_names(only, [setup.label for setup in SETUPS])
    setups = [setup for setup in SETUPS if not only or setup.label in only]
    rows: dict[str, list[GatewayRow]] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        material = stack.enter_context(made_material())
        contenders: dict[Setup, Measurable] = {}
        bar = stack.enter_context(progress())
        for setup in bar.track(setups, description="starting"):
            made = setup
            if setup.store:
                made = setup._replace(store=stack.enter_context(serving(on_disk=True)).new())
            try:
                contenders[setup] = stack.enter_context(started(made, material))
            except NotInstalled as error:
                left_out[setup.label] = str(error)
            else:
                contenders[setup].sleep()
        for setup, contender in bar.track([*contenders.items()] * rounds, description="measuring"):
            rates = RATES if setup.label in AT_RATES else ()
            with contender.awake(first=first):
                at_rates = [contender.load(seconds, rate) for rate in rates]
                row = GatewayRow.of(setup.label, setup.inputs, contender, contender.load(seconds), at_rates)
                rows.setdefault(setup.label, []).append(row)
    machine = f"{platform.machine()}, {python_in_words()}"
    medians = [median_row(each) for each in rows.values()]
    figures = Figures(machine, rounds, seconds, medians, left_out, found_gates(rows))
    say(f"Drawn: {save('gateway.svg', plot(figures))}")
    return figures


if __name__ == "__main__":
    bench(
        measure,
        show=show,
        file="gateway.json",
        width=130,
        seconds="of one load",
        only="labels of the table, such as hold",
        first="measure before all other work of the machine, even its disk's: for CPU, not for p99 (needs root)",
    )
