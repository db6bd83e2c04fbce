"""Which of the ready nodes to ask: the one that would be done first."""

from collections.abc import Sequence

from embedmesh.rules.ports import Candidate, Dice

TIE = 1.05  # nodes within five percent of the best are equal: the estimate is no better than that


def choose(candidates: Sequence[Candidate], dice: Dice) -> Candidate | None:
    """The candidate with the least expected finish time; equal ones by dice, or the first would take all the work."""
    if not candidates:
        return None
    best = min(candidate.expected_s for candidate in candidates)
    equal = [candidate for candidate in candidates if candidate.expected_s <= best * TIE]
    return equal[int(dice.random() * len(equal))]
