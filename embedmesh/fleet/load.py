"""How loaded a node is and how fast it has been: measured apart from choosing.

The cost of an embedding is known before it is sent, so what is learned is a node's speed, not its latency: a mean of
latencies is misled by the mix of sizes, and by how much else was waiting. What counts is the time a node was busy and
what it got done in it, in whatever order: each stretch of busy time gives one point (tokens a part, seconds a part),
and a straight line through the recent points gives the fixed cost of a part and the tokens per second. A stretch ends
where the *oldest* outstanding part ends: what short parts that passed a large one got done in a stretch is known, but
not how much of the large one, so no stretch may end in the middle of it.
"""

from dataclasses import dataclass

FORGET = 0.95  # weight of the past at each new point: about the last twenty count
TURNED, FORGET_TURNED = 2.0, 0.3  # once two points in a row lie so far off to the same side: the node has changed
PRIOR_TOKENS_PER_S = 1_000.0  # a busy small machine; replaced by what is measured as soon as a node is ready
PRIOR_FIXED_S = 0.005
PRIOR_TOKENS = 1_000.0  # the prior is two points: a part without tokens, and one of so many
PRIOR_WEIGHT = 0.001  # so that the first measurement replaces it
TOKENS_PER_S_MIN = 50.0  # slower than any machine worth asking; keeps an outlier from closing a node for minutes
TOKENS_PER_S_MAX = 10_000_000.0
BATCH_TOKENS = 1_024  # of our engine: what a short call waits for at a node that interleaves
STRETCH_PARTS = 8  # busy time is cut into points after so many parts,
STRETCH_S = 0.25  # or so many seconds: while a node is never idle it is learned from, too
SURPRISE = 4.0  # a point so many times above or below the line counts as that much: a stall is not a node's speed
BEYOND = 4.0  # past the largest parts seen, tokens cost at least this part of what they cost there, fixed cost included
ALIKE = 0.2  # points whose sizes spread by less than this part of their mean say nothing of the slope


class Load:
    """One node's outstanding work and learned speed. Tokens and seconds; `now` is on the monotonic clock.

    A node that `interleaves` runs short calls between the batches of large ones, as ours do (docs/reference/
    node-protocol.md): they wait for one batch there, not for all that came before.
    """

    def __init__(self, *, interleaves: bool = False) -> None:
        self.interleaves = interleaves
        self.tokens = 0  # outstanding: sent by us and not answered
        self.parts = 0
        self.bulk_tokens = 0  # those of them that are of requests which were cut
        self.bulk_parts = 0
        self._others = (0, 0.0)  # what the node says it has for other gateways, in tokens; and until when that counts
        self._sent: list[int] = []  # tokens of what is outstanding, the oldest first
        self._since = 0.0  # when the oldest was begun: when the one before it ended, or when the node ceased to be idle
        self._passed_parts = 0  # what has ended since then: short parts that passed it
        self._passed_tokens = 0
        self._stretch_parts = 0
        self._stretch_tokens = 0
        self._stretch_s = 0.0
        self._line = _Line()

    @property
    def tokens_per_s(self) -> float:
        """As fast as it is once it runs: without the fixed cost."""
        return 1.0 / self._line.per_token_s

    @property
    def measured(self) -> bool:
        """Whether that, and what follows, was learned of this node: else it is what is thought of any."""
        return self._line.measured

    @property
    def fixed_s(self) -> float:
        """What a part costs besides its tokens."""
        return self._line.fixed_s

    def remaining_s(self, now: float, *, small: bool = False) -> float:
        """Until the node would begin with what it is sent now: a `small` part, or one of a large request.

        Past the time that it should have taken a node gets worse the longer it says nothing, as a wedged one must not
        look idle.
        """
        others_tokens, until = self._others
        tokens = self.tokens + self._passed_tokens + (others_tokens if now < until else 0)
        work_s = self._line.seconds(self.parts + self._passed_parts, tokens)
        elapsed_s = now - self._since if self.parts else 0.0
        if not small or not self.interleaves or not self.bulk_parts:
            return abs(work_s - elapsed_s)
        batch_s = min(self.bulk_tokens, BATCH_TOKENS) * self._line.per_token_s
        return self.small_s() + batch_s + max(0.0, elapsed_s - work_s)

    def small_s(self) -> float:
        """How long its small parts will take, those of large requests left out."""
        return self._line.seconds(self.parts - self.bulk_parts, self.tokens - self.bulk_tokens)

    def finish_s(self, tokens: int, now: float, *, small: bool = False) -> float:
        """Until a part of so many tokens more would be done."""
        return self.remaining_s(now, small=small) + self._line.seconds(1, tokens)

    def others_say(self, tokens: int, until: float) -> None:
        """The node has so many tokens for other gateways; its word is good for a while."""
        self._others = tokens, until

    def began(self, tokens: int, now: float, *, bulk: bool = False) -> None:
        """A part was sent."""
        self.bulk_parts += bulk
        self.bulk_tokens += tokens if bulk else 0
        if not self.parts:
            self._since = now
        self.parts += 1
        self.tokens += tokens
        self._sent.append(tokens)

    def ended(self, tokens: int, now: float, *, well: bool, bulk: bool = False, late: bool = False) -> None:
        """A part ended; only what ended well says how fast the node is, and what was `late` that it is slower."""
        self.bulk_parts -= bulk
        self.bulk_tokens -= tokens if bulk else 0
        self.parts -= 1
        self.tokens -= tokens
        was_oldest = self._sent[0] == tokens
        self._sent.remove(tokens)  # the oldest of that size
        self._passed_parts += well
        self._passed_tokens += tokens if well else 0
        if well and not was_oldest:
            return
        if late and was_oldest:
            parts = self._passed_parts + 1
            self._line.add_at_least((self._passed_tokens + tokens) / parts, (now - self._since) / parts)
        if well:
            self._stretch_parts += self._passed_parts
            self._stretch_tokens += self._passed_tokens
            self._stretch_s += now - self._since
            if not self.parts or self._stretch_parts >= STRETCH_PARTS or self._stretch_s >= STRETCH_S:
                self._line.add(self._stretch_tokens / self._stretch_parts, self._stretch_s / self._stretch_parts)
                self._forget_stretch()
        elif not self.parts:
            self._forget_stretch()
        self._passed_parts = self._passed_tokens = 0
        self._since = now

    def _forget_stretch(self) -> None:
        self._stretch_parts = self._stretch_tokens = 0
        self._stretch_s = 0.0


@dataclass
class _Line:
    """A weighted straight line through (tokens, seconds) of single parts. Old points fade."""

    fixed_s: float = PRIOR_FIXED_S
    per_token_s: float = 1.0 / PRIOR_TOKENS_PER_S
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_squared: float = 0.0
    _tokens_seconds: float = 0.0
    _large_tokens: float = 0.0  # the last point that was at least half as large as any before it
    _large_s: float = 0.0
    _side: int = 0  # whether the last point lay far above the line (1), far below it (-1), or near it

    def __post_init__(self) -> None:
        for tokens in (0.0, PRIOR_TOKENS):
            self._sum(PRIOR_WEIGHT, tokens, PRIOR_FIXED_S + tokens / PRIOR_TOKENS_PER_S)

    @property
    def measured(self) -> bool:
        """Whether there is a point that is no prior."""
        return self._weight > 0.5

    def seconds(self, parts: float, tokens: float) -> float:
        """What so much should take."""
        return parts * self.fixed_s + tokens * self.per_token_s

    def add_at_least(self, tokens: float, seconds: float) -> None:
        """A point that would have lain higher: nobody waited for it to end."""
        if seconds > self.seconds(1, tokens):
            self.add(tokens, seconds)

    def add(self, tokens: float, seconds: float) -> None:
        """One more point. Where all points are of like size the slope stays what it was, and the fixed cost moves."""
        forget = FORGET
        if self.measured:
            expected_s = self.seconds(1, tokens)
            side = (seconds > expected_s * TURNED) - (seconds < expected_s / TURNED)
            surprise = SURPRISE
            if side and side == self._side:
                forget, surprise = FORGET_TURNED, SURPRISE**2
            self._side = side
            seconds = min(max(seconds, expected_s / surprise), expected_s * surprise)
        if tokens >= self._large_tokens / 2:
            self._large_tokens, self._large_s = tokens, seconds
        self._weight *= forget
        self._tokens *= forget
        self._seconds *= forget
        self._tokens_squared *= forget
        self._tokens_seconds *= forget
        self._sum(1.0, tokens, seconds)
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        spread = self._tokens_squared / self._weight - mean_tokens**2
        together = self._tokens_seconds / self._weight - mean_tokens * mean_s
        kept = (ALIKE * mean_tokens) ** 2 + 1.0
        slope = (together + kept * self.per_token_s) / (max(spread, 0.0) + kept)
        slope = min(slope, mean_s / mean_tokens if mean_tokens else slope)  # or the fixed cost would be negative
        slope = max(slope, self._large_s / self._large_tokens / BEYOND if self._large_tokens else slope)
        self.per_token_s = min(max(slope, 1 / TOKENS_PER_S_MAX), 1 / TOKENS_PER_S_MIN)
        self.fixed_s = max(0.0, mean_s - self.per_token_s * mean_tokens)

    def _sum(self, weight: float, tokens: float, seconds: float) -> None:
        self._weight += weight
        self._tokens += weight * tokens
        self._seconds += weight * seconds
        self._tokens_squared += weight * tokens * tokens
        self._tokens_seconds += weight * tokens * seconds
