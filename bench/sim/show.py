"""The figures as tables for a person, the verdict last."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.sim.figures import Cell, Figures
from bench.sim.scenarios import ORACLE, SCHEDULER


def show(figures: Figures, console: Console) -> None:
    """All of it."""
    for scenario in dict.fromkeys(cell.scenario for cell in figures.cells):
        console.print(_table(scenario, [cell for cell in figures.cells if cell.scenario == scenario]))
    queue = figures.queue
    if queue is not None:
        console.print(
            f"One queue: waits of {queue.found_s:.2f} s on average, {queue.right_s:.2f} s by the formula "
            f"(standard error {queue.error_s:.2f} s); same seed, same figures: {'yes' if figures.same_twice else 'NO'}."
        )
    targets = Table("target", "at least / most", "found", "")
    for target in figures.targets:
        bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}"
        targets.add_row(
            target.what, bound, f"{target.found:.2f}", "[green]reached[/]" if target.ok else "[red]missed[/]"
        )
    console.print(targets)
    console.print(verdict(figures), markup=False, highlight=False)


def verdict(figures: Figures) -> str:
    """One line."""
    if figures.wrong:
        return f"FAILED: {'; '.join(figures.wrong)}."
    return f"Passed: the simulator is right where that can be checked, and {len(figures.targets)} targets are reached."


def _table(scenario: str, cells: list[Cell]) -> Table:
    title = f"{scenario}: {cells[0].requests:,} requests"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("load", no_wrap=True)
    table.add_column("who chooses", no_wrap=True)
    for words in ("p50", "p99", "p99.9", "small p50", "small p99", "small p99.9"):
        table.add_column(words, justify="right", no_wrap=True)
    for words in ("fairness", "Jain", "busy", "wasted", "failed", "µs"):
        table.add_column(words, justify="right", no_wrap=True)
    load = cells[0].load
    for cell in cells:
        if cell.load != load:
            table.add_section()
            load = cell.load
        shares = f"{cell.fairness:.2f}", f"{cell.jain:.3f}", f"{cell.utilisation:.0%}", f"{cell.wasted:.1%}"
        decided = f"{cell.cpu_us:,.0f}" if cell.contender == SCHEDULER else ""
        each = (cell.all, cell.small)
        table.add_row(
            f"{cell.load} %",
            cell.contender,
            *(seconds(value) for times in each for value in (times.p50, times.p99, times.p999)),
            *shares,
            f"{cell.failed:,}" if cell.failed else "",
            decided,
            style={SCHEDULER: "bold", ORACLE: "dim"}.get(cell.contender),
        )
    return table


def markdown(figures: Figures) -> str:
    """The 99th percentiles of all requests and of small ones, a table a scenario, and the time to decide."""
    lines = []
    for scenario in dict.fromkeys(cell.scenario for cell in figures.cells):
        cells = [cell for cell in figures.cells if cell.scenario == scenario]
        loads = list(dict.fromkeys(cell.load for cell in cells))
        lines += [f"| {scenario} | {' | '.join(f'{load} %: all | small' for load in loads)} |"]
        lines += ["|---|" + "---|" * (2 * len(loads))]
        for who in dict.fromkeys(cell.contender for cell in cells):
            found = [cell for cell in cells if cell.contender == who]
            values = " | ".join(f"{seconds(cell.all.p99)} | {seconds(cell.small.p99)}" for cell in found)
            lines += [f"| **{who}** | {values} |" if who == SCHEDULER else f"| {who} | {values} |"]
        lines += [""]
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time with a unit that suits it."""
    if value < 1:
        return f"{1000 * value:.3g} ms" if value < 0.1 else f"{1000 * value:.0f} ms"
    return f"{value:.3g} s" if value < 1_000 else f"{value:,.0f} s"
