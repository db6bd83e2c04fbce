"""How loaded a node is and how fast it has been: measured apart from choosing.

The tokens of a part are known before it is sent, so we learn a node's speed, not its latency: the mix of sizes and the
queue at the node distort a mean of latencies. Each stretch of busy time gives one point (tokens a part, seconds
a part), and a straight line through the recent points gives the fixed cost of a part and the tokens per second. A
stretch ends where the *oldest* outstanding part ends: while short parts pass a large one, nobody knows how much of the
large one is done.
"""

POINT_FADE = 0.95  # weight of the past at each new point: about the last twenty count
TURNED, POINT_FADE_TURNED = (
    2.0,
    0.3,
)  # the same after two points in a row this far off on one side: the node has changed
PRIOR_TOKENS_PER_S = 1_000.0  # a busy small machine; the first measurement replaces it
PRIOR_FIXED_S = 0.005
PRIOR_TOKENS = 1_000.0  # the prior is two points: a part without tokens, and one with these
PRIOR_WEIGHT = 0.001
TOKENS_PER_S_MIN = 50.0  # slower than any useful machine; an outlier must not close a node for minutes
TOKENS_PER_S_MAX = 10_000_000.0
INTERLEAVED_BATCH_TOKENS = 1_024  # of our engine: a short call waits for one batch of large ones
STRETCH_PARTS = 8  # busy time is cut into points after this many parts,
STRETCH_S = 0.25  # or seconds, so that a node which is never idle is measured, too
SURPRISE = 4.0  # a point is clipped to this factor above or below the line: a stall is not a node's speed
BEYOND = 4.0  # a token costs at least one part in this of its cost in the largest parts seen, fixed cost included
BULK_PARTS_MAX = 2  # large parts on one node: one runs, one waits behind it
WINDOW_SMALL_S = 0.1  # of work in small parts on one node: a batch that runs and one that waits
WINDOW_BULK_S = 0.01  # the next large part is sent when the last one is nearly done: late decisions are better informed
SPREAD_MIN = 0.2  # of the mean size: points that spread less say nothing of the slope


class Load:
    """One node's outstanding work and learned speed. `now` is on the monotonic clock.

    A node that `interleaves` runs short calls between the batches of large ones, as ours do (docs/reference/
    node-protocol.md): they wait for one batch, not for all earlier work.
    """

    def __init__(self, *, interleaves: bool = False) -> None:
        self.interleaves = interleaves
        self.tokens = 0  # outstanding: sent by us and not answered
        self.parts = 0
        self.bulk_tokens = 0  # of them, in parts of requests that were cut
        self.bulk_parts = 0
        self._others_tokens = 0  # the node's tokens for other gateways, by its own report,
        self._others_until = 0.0  # and until when that counts
        self._sent: list[int] = []  # tokens of the outstanding parts, the oldest first
        self._since = 0.0  # when the oldest part began: the end of the part before, or of the node's idle time
        self._passed_parts = 0  # short parts that have ended since then
        self._passed_tokens = 0
        self._stretch_parts = 0
        self._stretch_tokens = 0
        self._stretch_s = 0.0
        self.fit = Fit()

    @property
    def tokens_per_s(self) -> float:
        """The speed without the fixed cost."""
        return 1.0 / self.fit.per_token_s

    @property
    def measured(self) -> bool:
        """Whether the speed was measured, or is the prior of any node."""
        return self.fit.measured

    @property
    def fixed_s(self) -> float:
        """The cost of a part besides its tokens."""
        return self.fit.fixed_s

    def start(self, now: float, small: bool, parts_max: int) -> tuple[float, bool]:
        """Until the node would begin with one more part, a `small` one or one of a large request; whether it has room.

        Once the expected time has passed, the first value grows with the node's silence: a wedged node must not look
        idle. There is room for `parts_max`, and for no more work than a window.
        """
        parts = self.parts
        fixed_s, per_token_s = self.fit.fixed_s, self.fit.per_token_s
        begins_s = ahead_s = parts * fixed_s + self.tokens * per_token_s
        if self._passed_parts:
            begins_s += self._passed_parts * fixed_s + self._passed_tokens * per_token_s
        if now < self._others_until:
            begins_s += self._others_tokens * per_token_s
        if not parts:
            return begins_s, True
        begins_s -= now - self._since
        if not (small and self.interleaves):
            ahead_s = abs(begins_s)
        elif self.bulk_parts:
            ahead_s -= self.bulk_parts * fixed_s + self.bulk_tokens * per_token_s
            batch_s = min(self.bulk_tokens, INTERLEAVED_BATCH_TOKENS) * per_token_s
            begins_s = ahead_s + batch_s + max(0.0, -begins_s)
        window_s = fixed_s + (WINDOW_SMALL_S if small else WINDOW_BULK_S)
        room = parts < parts_max and ahead_s <= window_s and (small or self.bulk_parts < BULK_PARTS_MAX)
        return abs(begins_s), room

    def remaining_s(self, now: float, *, small: bool = False) -> float:
        """Until the node would begin with a part sent now."""
        return self.start(now, small, 0)[0]

    def finish_s(self, tokens: int, now: float, *, small: bool = False) -> float:
        """Until one more part with these tokens would be done."""
        return self.remaining_s(now, small=small) + self.fit.seconds(1, tokens)

    def others_say(self, tokens: int, until: float) -> None:
        """The node reports its tokens for other gateways, which counts until then."""
        self._others_tokens, self._others_until = tokens, until

    def began(self, tokens: int, now: float, bulk: bool = False) -> None:
        """A part was sent."""
        if bulk:
            self.bulk_parts += 1
            self.bulk_tokens += tokens
        if not self.parts:
            self._since = now
        self.parts += 1
        self.tokens += tokens
        self._sent.append(tokens)

    def ended(self, tokens: int, now: float, well: bool, bulk: bool = False, late: bool = False) -> None:
        """A part ended. If it ended well, it tells the node's speed; if it was `late`, that the node is slower."""
        if bulk:
            self.bulk_parts -= 1
            self.bulk_tokens -= tokens
        self.parts -= 1
        self.tokens -= tokens
        was_oldest = self._sent[0] == tokens
        self._sent.remove(tokens)  # the oldest of that size
        if well:
            self._passed_parts += 1
            self._passed_tokens += tokens
            if not was_oldest:
                return
        if late and was_oldest:
            parts = self._passed_parts + 1
            self.fit.add_at_least((self._passed_tokens + tokens) / parts, (now - self._since) / parts)
        if well:
            self._stretch_parts += self._passed_parts
            self._stretch_tokens += self._passed_tokens
            self._stretch_s += now - self._since
            if not self.parts or self._stretch_parts >= STRETCH_PARTS or self._stretch_s >= STRETCH_S:
                self.fit.add(self._stretch_tokens / self._stretch_parts, self._stretch_s / self._stretch_parts)
                self._forget_stretch()
        elif not self.parts:
            self._forget_stretch()
        self._passed_parts = self._passed_tokens = 0
        self._since = now

    def _forget_stretch(self) -> None:
        self._stretch_parts = self._stretch_tokens = 0
        self._stretch_s = 0.0


class Fit:
    """A weighted straight line through (tokens, seconds) of single parts. Old points fade."""

    def __init__(self) -> None:
        self.fixed_s = PRIOR_FIXED_S
        self.per_token_s = 1.0 / PRIOR_TOKENS_PER_S
        self._weight = self._tokens = self._seconds = self._tokens_squared = self._tokens_seconds = 0.0  # sums
        self._large_tokens = self._large_s = 0.0  # the last point that was at least half as large as any before it
        self._side = 0  # whether the last point lay far above the line (1), far below it (-1), or near it
        for tokens in (0.0, PRIOR_TOKENS):
            self._sum(1.0, PRIOR_WEIGHT, tokens, PRIOR_FIXED_S + tokens / PRIOR_TOKENS_PER_S)

    @property
    def measured(self) -> bool:
        """Whether there is a point beside the prior."""
        return self._weight > 0.5

    def seconds(self, parts: float, tokens: float) -> float:
        """The expected time of some parts."""
        return parts * self.fixed_s + tokens * self.per_token_s

    def add_at_least(self, tokens: float, seconds: float) -> None:
        """A point whose true seconds are more: the part was not waited for."""
        if seconds > self.seconds(1, tokens):
            self.add(tokens, seconds)

    def add(self, tokens: float, seconds: float) -> None:
        """One more point. If all points are of like size, the slope stays and the fixed cost moves."""
        fade = POINT_FADE
        if self.measured:
            expected_s = self.seconds(1, tokens)
            side = (seconds > expected_s * TURNED) - (seconds < expected_s / TURNED)
            surprise = SURPRISE
            if side and side == self._side:
                fade, surprise = POINT_FADE_TURNED, SURPRISE**2
            self._side = side
            seconds = min(max(seconds, expected_s / surprise), expected_s * surprise)
        if tokens >= self._large_tokens / 2:
            self._large_tokens, self._large_s = tokens, seconds
        self._sum(fade, 1.0, tokens, seconds)
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        spread = self._tokens_squared / self._weight - mean_tokens**2
        together = self._tokens_seconds / self._weight - mean_tokens * mean_s
        kept = (SPREAD_MIN * mean_tokens) ** 2 + 1.0
        slope = (together + kept * self.per_token_s) / (max(spread, 0.0) + kept)
        slope = min(slope, mean_s / mean_tokens if mean_tokens else slope)  # or the fixed cost would be negative
        slope = max(slope, self._large_s / self._large_tokens / BEYOND if self._large_tokens else slope)
        self.per_token_s = min(max(slope, 1 / TOKENS_PER_S_MAX), 1 / TOKENS_PER_S_MIN)
        self.fixed_s = max(0.0, mean_s - self.per_token_s * mean_tokens)

    def _sum(self, fade: float, weight: float, tokens: float, seconds: float) -> None:
        self._weight = fade * self._weight + weight
        self._tokens = fade * self._tokens + weight * tokens
        self._seconds = fade * self._seconds + weight * seconds
        self._tokens_squared = fade * self._tokens_squared + weight * tokens * tokens
        self._tokens_seconds = fade * self._tokens_seconds + weight * tokens * seconds
