"""No request twice: an anti-replay window (RFC 4303 section 3.4.3) for each process that signs requests."""

WINDOW_COUNTERS = 4_096  # how far requests may overtake each other: more than are under way at one time
SIGNING_INSTANCES_MAX = 64  # gateway processes of one store, those of the last two minutes included
INSTANCE_FORGOTTEN_S = 120  # twice what clocks may differ: all that the process signed is refused for its time by then

WINDOW_MASK = (1 << WINDOW_COUNTERS) - 1


class ReplayWindow:
    """The counters seen, by instance. Use it last, when the request is known to be genuine."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def admit(self, instance: str, counter: int, now_s: int) -> bool:
        """Whether this counter is new; it is seen from now on. False too for one that is older than the window."""
        seen = self._seen.get(instance)
        if seen is None:
            if len(self._seen) >= SIGNING_INSTANCES_MAX:
                self._forget(now_s)
                if len(self._seen) >= SIGNING_INSTANCES_MAX:
                    return False
            seen = self._seen[instance] = _Seen(counter)
        elif not seen.admit(counter):
            return False
        seen.last_s = now_s
        return True

    def new(self, instance: str, counter: int) -> bool:
        """Whether this counter was not seen and is not too old."""
        seen = self._seen.get(instance)
        return seen is None or seen.new(counter)

    def _forget(self, now_s: int) -> None:
        self._seen = {name: seen for name, seen in self._seen.items() if now_s - seen.last_s <= INSTANCE_FORGOTTEN_S}


class _Seen:
    """One instance: the highest counter, and a bit for each of the 4,096 up to it, the lowest bit its own."""

    __slots__ = ("bits", "highest", "last_s")

    def __init__(self, counter: int) -> None:
        self.highest = counter
        self.bits = 1
        self.last_s = 0

    def new(self, counter: int) -> bool:
        behind = self.highest - counter
        return behind < 0 or (behind < WINDOW_COUNTERS and not self.bits >> behind & 1)

    def admit(self, counter: int) -> bool:
        if not self.new(counter):
            return False
        ahead = counter - self.highest
        if ahead > 0:
            self.bits = (self.bits << ahead | 1) & WINDOW_MASK if ahead < WINDOW_COUNTERS else 1
            self.highest = counter
        else:
            self.bits |= 1 << -ahead
        return True
