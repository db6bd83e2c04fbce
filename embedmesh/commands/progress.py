"""The progress bars of commands: on stderr, and only where that is a terminal."""

import rich.console
import rich.progress


class ProgressBar(rich.progress.Progress):
    """rich's, on stderr. Its lines are printed as they are, also without a terminal."""

    def __init__(self, *columns: str | rich.progress.ProgressColumn, transient: bool = False) -> None:
        console = rich.console.Console(stderr=True)
        super().__init__(*columns, console=console, transient=transient, disable=not console.is_terminal)

    @property
    def shown(self) -> bool:
        """Whether anybody sees it."""
        return not self.disable

    def say(self, line: str) -> None:
        """One line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, label: str, done: int, total: int) -> None:
        """How far the task of this label is; the first call adds it. Another label is another bar."""
        task = next((task.id for task in self.tasks if task.description == label), None)
        if task is None:
            task = self.add_task(label, total=total)
        self.update(task, completed=done, total=max(total, done))
