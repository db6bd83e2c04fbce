"""How much the answers of each model have been of late: for the choice of nodes, never for money."""

FADE = 0.95  # weight of the past at each answer: about the last twenty count
FIRST = 0.25  # of the output limit, until a first answer has ended; few are cut off by their limit


class ExpectedOutput:
    """Tokens of one answer, by model: as many entries as the catalogue has."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def of(self, model_id: str, output_max: int) -> float:
        """About how many tokens an answer of at most `output_max` has."""
        return min(self._means.get(model_id, FIRST * output_max), output_max)

    def learn(self, model_id: str, tokens: float) -> None:
        """An answer had that many tokens."""
        before = self._means.get(model_id)
        self._means[model_id] = tokens if before is None else FADE * before + (1 - FADE) * tokens
