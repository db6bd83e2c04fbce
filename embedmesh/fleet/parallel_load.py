"""The load of a server that generates: it works on many requests at one time, and nobody knows their length."""

from embedmesh.fleet.load import Load


class ParallelLoad(Load):
    """Room is a number of requests; the node with the fewest outstanding tokens for its speed begins soonest.

    The speed is that of all requests together, learned as for other nodes. A part's tokens are a bound of its input and
    the output that such requests have had of late.
    """

    def start(self, now: float, small: bool, parts_max: int) -> tuple[float, bool]:
        return self.tokens * self.fit.per_token_s, self.parts < parts_max
