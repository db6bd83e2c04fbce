"""How loaded a node is and how fast it has been: measured apart from choosing.

The cost of an embedding is known before it is sent, so what is learned is the node's speed, not its latency: a mean of
latencies is misled by the mix of sizes. Each finished attempt is one point (tokens ahead of its end, seconds); a
straight line through the recent ones gives the fixed cost and the tokens per second.
"""

from dataclasses import dataclass

FORGET = 0.95  # weight of the past at each new point: about the last twenty count
PRIOR_TOKENS_PER_S = 5_000.0  # a slow machine's exact vectors; replaced by what is measured
PRIOR_FIXED_S = 0.005
PRIOR_WEIGHT = 0.5  # half a measurement
TOKENS_PER_S_MIN = 50.0  # slower than any machine worth asking; keeps an outlier from closing a node for minutes
TOKENS_PER_S_MAX = 10_000_000.0


@dataclass
class Load:
    """One node's outstanding work and learned speed. Tokens and seconds."""

    outstanding: int = 0
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_squared: float = 0.0
    _tokens_seconds: float = 0.0

    def __post_init__(self) -> None:
        for tokens in (0.0, 2 * PRIOR_TOKENS_PER_S):
            self._add(PRIOR_WEIGHT, tokens, PRIOR_FIXED_S + tokens / PRIOR_TOKENS_PER_S)

    def finish_s(self, tokens: int) -> float:
        """Seconds until `tokens` more would be done, after what is outstanding."""
        fixed_s, per_token_s = self.line()
        return fixed_s + (self.outstanding + tokens) * per_token_s

    def learn(self, tokens_ahead: int, seconds: float) -> None:
        """An attempt ended well: it and what was ahead of it were `tokens_ahead` tokens and took `seconds`."""
        self._weight *= FORGET
        self._tokens *= FORGET
        self._seconds *= FORGET
        self._tokens_squared *= FORGET
        self._tokens_seconds *= FORGET
        self._add(1.0, float(tokens_ahead), seconds)

    def line(self) -> tuple[float, float]:
        """The fixed cost in seconds, and seconds per token (weighted least squares, kept within sane bounds)."""
        spread = self._weight * self._tokens_squared - self._tokens**2
        slope = 0.0
        if spread > 0:
            slope = (self._weight * self._tokens_seconds - self._tokens * self._seconds) / spread
        slope = min(max(slope, 1 / TOKENS_PER_S_MAX), 1 / TOKENS_PER_S_MIN)
        fixed_s = max(0.0, (self._seconds - slope * self._tokens) / self._weight)
        return fixed_s, slope

    def _add(self, weight: float, tokens: float, seconds: float) -> None:
        self._weight += weight
        self._tokens += weight * tokens
        self._seconds += weight * seconds
        self._tokens_squared += weight * tokens * tokens
        self._tokens_seconds += weight * tokens * seconds
