"""Questions of our own to nodes, for probes and canaries: their texts, and the verification of the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.rules.embeddings import Counted, EmbedVectors, Ids, ServedModels, numbers_of
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.forwarding import NodeClient, Part, Verify
from embedmesh.rules.generation import GenerationRequest
from embedmesh.rules.ids import new_id
from embedmesh.rules.models import Modality, Model
from embedmesh.rules.ports import Catalogue, Clock, Dice, Tokenizer

PROBE_TEXT = "The quick brown fox jumped over the lazy dog."
PROBE_WORDS = PROBE_TEXT.split()
PROBE_QUERY, FAR_TEXT = "Which animal jumped over the dog?", "Interest is paid twice a year."
"""A reranker scores PROBE_TEXT and FAR_TEXT for that query: the scores of trained models lie far apart."""
RANDOM_TOKENS = (4, 40)  # of a random input, at least and at most
RANDOM_QUERY_TOKENS_MAX = 8  # of a pair: twelve pairs have to fit one part, and some documents repeat the query
REPEATED_SHARE = 0.5  # of random documents
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

    def models_of(self, node: Node) -> list[Model]:
        """Models of the catalogue that the node serves and that encode: the first one that embeds, that reranks."""
        models: dict[tuple[Modality, ...], Model] = {}
        for model in self.catalogue.models:
            if model.encodes and model.id in node.models:
                models.setdefault(model.modalities, model)
        return list(models.values())

    def probe(self, model: Model) -> Counted:
        """The short question by which a node shows that a model works."""
        if not model.reranks:
            return self.count([PROBE_TEXT], model)
        texts, tokenizer = [PROBE_TEXT, FAR_TEXT], self.tokenizers.get(model.id)
        if tokenizer is not None:  # some models take few tokens
            around = tokenizer.specials + len(tokenizer.between)
            room = max(1, model.max_tokens - around - len(tokenizer.ids([PROBE_QUERY])[0]))
            texts = [tokenizer.clip(text, room, end=False) for text in texts]
        return self.count(texts, model)

    def count(self, texts: list[str], model: Model, query: str = PROBE_QUERY) -> Counted:
        """The same as callers' texts would be counted, see flow.count. A reranker's are documents for the query."""
        tokenizer = self.tokenizers.get(model.id)
        asked = query if model.reranks else None
        if tokenizer is None:
            more = PROBE_SPECIALS_MAX + len(asked or "")
            return Counted([len(text) + more for text in texts], texts=texts, exact=False, query=asked)
        ids: list[Ids] = list(tokenizer.ids(texts))
        if asked is not None:
            (first,) = tokenizer.ids([asked])
            ids = [tokenizer.pair(first, each) for each in ids]
        return Counted([len(numbers_of(each)) + tokenizer.specials for each in ids], ids, texts, query=asked)

    def random_question(self, model: Model, node: Node, dice: Dice, inputs: int = 1) -> Counted:
        """Inputs that are new to every node: random tokens of the vocabulary, or words for a node that takes texts."""
        tokenizer = self.tokenizers.get(model.id)
        if model.reranks:
            return self._random_pairs(model, dice, inputs)
        if tokenizer is None or not node.reads_ids:
            most = RANDOM_TOKENS[1] if tokenizer is None else model.max_tokens - tokenizer.specials
            return self.count([_random_text(dice, most, tokenizer) for _ in range(inputs)], model)
        many: list[Ids] = []
        for _ in range(inputs):
            ids: list[int] = []
            size = min(_random_size(dice), model.max_tokens - tokenizer.specials)
            while len(ids) < size:
                token = int(dice.random() * tokenizer.vocab_size)
                if token not in tokenizer.special_ids:
                    ids.append(token)
            many.append(ids)
        return Counted([len(ids) + tokenizer.specials for ids in many], many)

    def _random_pairs(self, model: Model, dice: Dice, inputs: int) -> Counted:
        """One query with some documents, of which about half repeat it: right scores lie far apart then."""
        tokenizer = self.tokenizers.get(model.id)
        room = model.max_tokens - (
            PROBE_SPECIALS_MAX if tokenizer is None else tokenizer.specials + len(tokenizer.between)
        )
        query = _random_text(dice, min(RANDOM_QUERY_TOKENS_MAX, room // 4), tokenizer)
        room -= len(query if tokenizer is None else tokenizer.ids([query])[0])
        texts = []
        for _ in range(inputs):
            text = _random_text(dice, room, tokenizer)
            if dice.random() < REPEATED_SHARE:
                text = f"{query} {text}"
                text = text if tokenizer is None else tokenizer.clip(text, room, end=False)
            texts.append(text)
        return self.count(texts, model, query)


def _random_size(dice: Dice) -> int:
    return RANDOM_TOKENS[0] + int(dice.random() * (RANDOM_TOKENS[1] - RANDOM_TOKENS[0]))


def _random_text(dice: Dice, most: int, tokenizer: Tokenizer | None) -> str:
    """Random words, and of them at most `most` tokens, where these can be counted: questions have to fit one part."""
    size = max(1, min(_random_size(dice), most))
    text = " ".join(_random_word(dice) for _ in range(size))
    return text if tokenizer is None else tokenizer.clip(text, size, end=False)


def _random_word(dice: Dice) -> str:
    at = int(dice.random() * 2 * len(PROBE_WORDS))
    return PROBE_WORDS[at] if at < len(PROBE_WORDS) else str(int(dice.random() * 10_000))


def only(counted: Counted, inputs: Sequence[int]) -> Counted:
    """Some inputs of what was counted."""
    return Counted(
        lengths=[counted.lengths[at] for at in inputs],
        ids=None if counted.ids is None else [counted.ids[at] for at in inputs],
        texts=None if counted.texts is None else [counted.texts[at] for at in inputs],
        exact=counted.exact,
        query=counted.query,
        queries=None if counted.queries is None else [counted.queries[at] for at in inputs],
    )
