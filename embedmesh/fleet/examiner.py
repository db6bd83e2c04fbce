"""Questions of our own to nodes, for probes and canaries: their texts, and the verification of the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.rules.embeddings import Counted, EmbedVectors, ServedModels
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.forwarding import NodeClient, Part, Verify
from embedmesh.rules.generation import GenerationRequest
from embedmesh.rules.ids import new_id
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Catalogue, Clock, Dice, Tokenizer

PROBE_TEXT = "The quick brown fox jumped over the lazy dog."
PROBE_WORDS = PROBE_TEXT.split()
RANDOM_TOKENS = (4, 40)  # of a random question, at least and at most
ONE_TOKEN = {"max_tokens": 1}
SHORT_QUESTIONS = {
    "chat": GenerationRequest("chat", {"messages": [{"role": "user", "content": PROBE_TEXT}], **ONE_TOKEN}, 64 * 1024),
    "completions": GenerationRequest("completions", {"prompt": PROBE_TEXT, **ONE_TOKEN}, 64 * 1024),
}
"""By modality; each reply has some hundred bytes, and some makes send the prompt again."""
PROBE_SPECIALS_MAX = 8  # special tokens that a model may add to a text, where its tokenizer is not here


class ProbeClient(NodeClient, Protocol):
    """What an examiner needs of the node client."""

    async def served(self, node_id: str) -> ServedModels: ...

    async def generate(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> bytes: ...


class _Answers(msgspec.Struct):
    choices: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Examiner:
    """What probes and canaries of one gateway share."""

    registry: Registry
    client: ProbeClient
    catalogue: Catalogue
    tokenizers: Mapping[str, Tokenizer]
    clock: Clock
    verify: Verify

    async def embed(self, part: Part, model: Model, counted: Counted) -> EmbedVectors:
        """A node's verified answer. Raises a NodeFailure."""
        reply = await self.client.embed(part, model, counted, new_id("req", self.clock))
        self.verify(reply, model, part, counted.exact)
        return reply

    async def generate(self, node: Node, model: Model) -> None:
        """Have a node make one token. Raises a NodeFailure.

        An image costs too much for a question: a server of images is believed until a request fails there. A sidecar
        takes no question in the clear: it lists what its own server has answered for of late.
        """
        if node.kind != UPSTREAM:
            return
        modality = next((each for each in model.modalities if each in SHORT_QUESTIONS), None)
        if modality is None:
            return
        asked = SHORT_QUESTIONS[modality]
        part = Part(node.node_id, (0,), 1, 1.0)
        reply = await self.client.generate(part, model, asked, new_id("req", self.clock))
        try:
            choices = msgspec.json.decode(reply, type=_Answers).choices
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            choices = []
        if len(choices) != 1:
            raise WrongAnswer("the server's reply is not of OpenAI's form")

    def model_of(self, node: Node) -> Model | None:
        """A model of the catalogue that the node serves and that encodes."""
        return next((model for model in self.catalogue.models if model.encodes and model.id in node.models), None)

    def count(self, texts: list[str], model: Model) -> Counted:
        """The same as callers' texts would be counted; see flow.count."""
        tokenizer = self.tokenizers.get(model.id)
        if tokenizer is None:
            return Counted(lengths=[len(text) + PROBE_SPECIALS_MAX for text in texts], texts=texts, exact=False)
        ids = tokenizer.ids(texts)
        return Counted(lengths=[len(each) + tokenizer.specials for each in ids], ids=ids, texts=texts)

    def random_question(self, model: Model, node: Node, dice: Dice) -> Counted:
        """An input that is new to every node: random tokens of the vocabulary, or words for a node that takes texts."""
        tokenizer = self.tokenizers.get(model.id)
        size = RANDOM_TOKENS[0] + int(dice.random() * (RANDOM_TOKENS[1] - RANDOM_TOKENS[0]))
        if tokenizer is None or not node.reads_ids:
            text = " ".join(_random_word(dice) for _ in range(size))
            if tokenizer is not None:  # several questions have to fit one part, whatever a word is in tokens
                text = tokenizer.clip(text, min(size, model.max_tokens - tokenizer.specials), end=False)
            return self.count([text], model)
        ids: list[int] = []
        while len(ids) < min(size, model.max_tokens - tokenizer.specials):
            token = int(dice.random() * tokenizer.vocab_size)
            if token not in tokenizer.special_ids:
                ids.append(token)
        return Counted(lengths=[len(ids) + tokenizer.specials], ids=[ids])


def _random_word(dice: Dice) -> str:
    at = int(dice.random() * 2 * len(PROBE_WORDS))
    return PROBE_WORDS[at] if at < len(PROBE_WORDS) else str(int(dice.random() * 10_000))


def together(questions: Sequence[Counted]) -> Counted:
    """Several questions of one input as one."""
    ids = [each for one in questions for each in one.ids or ()]
    texts = [each for one in questions for each in one.texts or ()]
    lengths = [length for one in questions for length in one.lengths]
    return Counted(lengths=lengths, ids=ids or None, texts=texts or None, exact=questions[0].exact)


def only(counted: Counted, inputs: Sequence[int]) -> Counted:
    """Some inputs of what was counted."""
    return Counted(
        lengths=[counted.lengths[at] for at in inputs],
        ids=None if counted.ids is None else [counted.ids[at] for at in inputs],
        texts=None if counted.texts is None else [counted.texts[at] for at in inputs],
        exact=counted.exact,
    )
