"""Room in memory for engines: one that would not fit is refused before the kernel ends it, or another program.

Models that load at one time are counted together: one waits until those before it have taken what they need, and is
refused only if what is left then is too little.
"""

import asyncio
import gc
import mmap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from embedmesh.engine.kernel import available_bytes
from embedmesh.rules.errors import SetupError
from embedmesh.system import call_c

STATM = Path("/proc/self/statm")
SHARED_PAGES = 2  # its field
INSIST = "--memory-check ignore"


class MemoryRoom:
    """What all engines of a process share. `left` says how many bytes can be had, None where nobody knows."""

    def __init__(self, left: Callable[[], int | None] = available_bytes, *, insist: bool = False) -> None:
        """`insist`: load whatever it takes."""
        self._left = left
        self._insist = insist
        self._loading_bytes = 0
        self._ended = asyncio.Event()

    @asynccontextmanager
    async def taken(self, need_bytes: int, name: str) -> AsyncIterator[None]:
        """While a model loads that needs so much. Raises SetupError, in one line, where that is not to be had."""
        while (short := self._short(need_bytes)) is not None:
            if not self._loading_bytes:
                raise SetupError(
                    f"The model {name} needs about {_gb(need_bytes)} of memory, and {_gb(short)} are left (of the "
                    "machine, or of this process's group). Unload another model, give it more, serve it in the tier "
                    f"fast where the CPU can, or say {INSIST} if you know better."
                )
            await self._ended.wait()
        self._loading_bytes += need_bytes
        try:
            yield
        finally:
            self._loading_bytes -= need_bytes
            self._ended.set()
            self._ended = asyncio.Event()

    def _short(self, need_bytes: int) -> int | None:
        """What is left, where that is too little."""
        left = None if self._insist else self._left()
        return None if left is None or need_bytes <= left - self._loading_bytes else left


def file_pages_bytes(statm: Path = STATM) -> int:
    """Pages of files that this process has mapped and in memory; 0 where the system does not say."""
    try:
        return int(statm.read_bytes().split()[SHARED_PAGES]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0


def release_freed() -> None:
    """Give freed memory back to the system now: a tokenizer of 250,000 pieces leaves 0.1 GB behind."""
    frozen = gc.get_freeze_count() > 0  # what lived at the start, models among it (`embedmesh.process.quieten_gc`)
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    call_c("malloc_trim", 0)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
