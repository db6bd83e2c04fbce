"""The real clock. Tests hand in their own."""

import time


class SystemClock:
    """Implements the port `Clock`."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000
