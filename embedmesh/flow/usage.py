"""How many tokens are charged for what a node has generated: its own word within bounds, else our count.

A node's word is not believed where it says more than was asked for, or less than can be; then, and where it says
nothing, our own count is charged and marked. Input and output are judged each by itself: a caller whose template says
more than the bound of its prompt allows for must not get the answer by our count, too, which sees no hidden reasoning.
Nodes of some makes count one of several answers only: a word that is nearer to that than to all is not believed.
"""

from math import ceil, sqrt
from typing import NamedTuple

from embedmesh.rules.generation import TokenCounts
from embedmesh.rules.limits import BYTES_A_TOKEN_MAX

TEXT_BYTES_A_TOKEN = 4  # of ordinary text, where nobody here has the model's tokenizer


class Most(NamedTuple):
    """The most tokens that a request can be: of its input, and of all answers together."""

    input: int
    output: int


class Used(NamedTuple):
    """What is charged, in tokens. `cached` is a part of `input`. `estimated`: it is our count, not the node's."""

    input: int
    output: int
    cached: int = 0
    reasoning: int = 0  # a part of `output`, by the node's word
    estimated: bool = False

    @property
    def usage(self) -> TokenCounts:
        """As callers are told."""
        return TokenCounts(self.input, self.output, self.cached, self.reasoning)


def used(said: TokenCounts | None, own: TokenCounts, delivered_bytes: int, most: Most, *, answers: int) -> Used:
    """What is charged. `own` is our count, `delivered_bytes` that of all text; that many `answers` were asked for."""
    spent = Used(min(own.input, most.input), min(own.output, most.output), estimated=True)
    if said is None:
        return spent
    counts_one = answers > 1 and said.output * sqrt(answers) < spent.output
    output = ceil(delivered_bytes / BYTES_A_TOKEN_MAX) <= said.output <= most.output and not counts_one
    if output:
        spent = spent._replace(output=said.output, reasoning=said.reasoning)
    if said.cached <= said.input <= most.input:
        spent = spent._replace(input=said.input, cached=said.cached, estimated=not output)
    return spent


def tokens_of(text_bytes: int, events: int = 0) -> int:
    """About how many tokens a text is, by its length; 0 only for none. Each event of a stream has one at least.

    Digits, and scripts that the vocabulary lacks, have a byte or two a token: who has what it wants, and leaves before
    the node can say its usage, shall not have them at the price of prose.
    """
    return max(ceil(text_bytes / TEXT_BYTES_A_TOKEN), events)
