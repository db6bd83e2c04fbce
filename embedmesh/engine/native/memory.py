"""Memory for the kernels: anonymous maps in huge pages, where the kernel has some, and weights packed into one."""

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

from embedmesh.engine.native.library import Linear

Array = npt.NDArray[np.float32]

LINE = 16  # floats of a cache line, and outputs of a panel
FLOAT_BYTES = 4
HUGE_PAGES = "MADV_HUGEPAGE"  # Linux's own advice


def floats(count: int) -> Array:
    """`count` zeros, in memory of their own. Raises MemoryError."""
    try:
        memory = mmap.mmap(-1, max(1, count) * FLOAT_BYTES)
    except (OSError, OverflowError):
        raise MemoryError(f"there is no memory for {count * FLOAT_BYTES:,} bytes") from None
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        memory.madvise(getattr(mmap, HUGE_PAGES))
    return np.frombuffer(memory, np.float32)


class Packed:
    """All weights of a model but its words, in one piece of memory, which is filled from its beginning."""

    def __init__(self, count: int) -> None:
        """Room for `count` floats. Raises MemoryError."""
        self._floats = floats(count)
        self._filled = 0

    def vector(self, *parts: Array) -> int:
        """The address of a copy of the parts, one behind the other."""
        at = self._filled
        for part in parts:
            self._take(part.size)[:] = part.ravel()
        return self._address(at)

    def linear(self, kernels: list[Array], biases: list[Array]) -> Linear:
        """A linear layer of kernels [outputs, inputs], one below the other, in panels of 16 outputs."""
        at = self._filled
        for kernel in kernels:
            outputs, inputs = kernel.shape
            panels = self._take(kernel.size).reshape(outputs // LINE, inputs, LINE)
            panels[...] = kernel.reshape(outputs // LINE, LINE, inputs).transpose(0, 2, 1)
        return Linear(self._address(at), self.vector(*biases))

    def _take(self, size: int) -> Array:
        begin, self._filled = self._filled, self._filled + size
        if self._filled > self._floats.size or size % LINE:
            raise ValueError("weights do not fit the memory that was counted for them")
        return self._floats[begin : self._filled]

    def _address(self, at: int) -> int:
        return int(self._floats.ctypes.data) + at * FLOAT_BYTES
