"""How many tokens a call is, in the model's own vocabulary, and the ids that the node will embed.

The gateway's count is what is charged, so it counts exactly what is sent: prompt added, input cut, special tokens in.
Texts are counted piece by piece, and counting stops once they do not fit or cannot be paid.
"""

from collections.abc import Awaitable, Callable, Generator, Iterator
from itertools import repeat
from operator import add, floordiv

from embedmesh.flow.beginnings import Beginning, beginnings
from embedmesh.flow.turns import Turns
from embedmesh.rules.embeddings import ID_BYTES, Call, Counted
from embedmesh.rules.errors import ContextLengthExceeded, EmptyInput, InvalidValue, MaxTokensPerRequest
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, REQUEST_TOKENS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Decoder, Tokenizer

SOON_IDS_MAX = 512  # of a foreign vocabulary: decoded within microseconds
SPECIALS_MAX = 8  # special tokens that a model may add to an input; two or three in all that we know

CanPay = Callable[[int], None]
"""Raises InsufficientQuota if the caller cannot pay that many tokens."""
CanPayFor = Callable[[Model], Awaitable[CanPay | None]]
"""`CanPay` for a model; None if only the ledger can say."""


async def count(
    call: Call,
    model: Model,
    tokenizer: Tokenizer | None,
    cl100k: Decoder | None,
    turns: Turns,
    account_id: str,
    can_pay_for: CanPayFor | None = None,
) -> Counted:
    """Token ids and their number. Raises a CallerFailure that names the input at fault.

    Without a tokenizer the bytes of each text bound its tokens. Counting that may take longer than a millisecond is
    done off the event loop, in turns, and only as far as the caller can pay.
    """
    counted = count_soon(call, model, tokenizer, cl100k)
    if counted is not None:
        return counted
    can_pay = await can_pay_for(model) if can_pay_for is not None else None
    return await turns.run(account_id, _count(call, model, tokenizer, cl100k, can_pay))


def count_now(call: Call, model: Model, tokenizer: Tokenizer | None, cl100k: Decoder | None) -> Counted:
    """Count at once, however long it takes."""
    work = _count(call, model, tokenizer, cl100k, None)
    while True:
        try:
            next(work)
        except StopIteration as end:
            counted: Counted = end.value
            return counted


def count_soon(call: Call, model: Model, tokenizer: Tokenizer | None, cl100k: Decoder | None) -> Counted | None:
    """Count short texts that fit at once; None for anything else."""
    if tokenizer is None:
        return None
    texts = call.texts
    if call.ids:
        if sum(map(len, call.ids)) > SOON_IDS_MAX or model.token_ids == "native":
            return None
        texts = list(_texts(call, cl100k))
    if call.role and (prompt := _prompt(call, model)):
        texts = list(map(add, repeat(prompt), texts))
    ids = tokenizer.packed(texts)
    if ids is None:
        return None
    if len(ids) == 1:  # the ordinary case, in half the time
        least = most = total = len(ids[0]) // ID_BYTES + tokenizer.specials
        lengths = [total]
    else:
        lengths = list(map(add, map(floordiv, map(len, ids), repeat(ID_BYTES)), repeat(tokenizer.specials)))
        least, most, total = min(lengths), max(lengths), sum(lengths)
    if not least or most > (call.keep or model.max_tokens) or total > REQUEST_TOKENS_MAX:
        return None
    return Counted(lengths, ids, texts)


def _count(
    call: Call, model: Model, tokenizer: Tokenizer | None, cl100k: Decoder | None, can_pay: CanPay | None
) -> Generator[None, None, Counted]:
    """Yields every few milliseconds."""
    if tokenizer is None:
        if call.ids and model.token_ids == "native":
            raise InvalidValue("Token ids of this model cannot be checked here. Send the text itself.", param="input")
        yield
        return _bound(call, _prompt(call, model), list(_texts(call, cl100k)))
    counting = _Counting(call, model, tokenizer, can_pay)
    if call.ids and model.token_ids == "native":
        yield from counting.take_ids()
    else:
        yield from counting.take_texts(_texts(call, cl100k))
    return counting.counted()


class _Counting:
    """The progress of counting one call."""

    def __init__(self, call: Call, model: Model, tokenizer: Tokenizer, can_pay: CanPay | None) -> None:
        self._call = call
        self._model = model
        self._tokenizer = tokenizer
        self._can_pay = can_pay
        self._prompt = _prompt(call, model)
        self._room = (call.keep or model.max_tokens) - tokenizer.specials
        if call.keep is not None and self._room <= (len(tokenizer.ids([self._prompt])[0]) if self._prompt else 0):
            raise InvalidValue(
                "So few tokens leave no room for a text beside the model's special tokens and prompt.",
                param="truncate_prompt_tokens",
            )
        self._tokens = 0
        self._truncated = 0
        self._ids: list[list[int]] = []
        self._texts: list[str] | None = None
        self._check(len(call.texts or call.ids) * max(1, tokenizer.specials))  # at least

    def counted(self) -> Counted:
        lengths = [len(ids) + self._tokenizer.specials for ids in self._ids]
        return Counted(lengths=lengths, ids=self._ids, texts=self._texts, truncated=self._truncated)

    def take_ids(self) -> Generator[None, None, None]:
        """Ids of the model's own vocabulary."""
        before = self._tokenizer.ids([self._prompt])[0] if self._prompt else []
        for index, tokens in enumerate(self._call.ids):
            _check_native(self._call, index, self._tokenizer)
            ids, more = before + tokens, len(before) + len(tokens) - self._room
            if more > 0:
                self._may_cut(len(ids), exact=True)
                ids = [*before, *tokens[more:]] if self._call.truncate == "start" else ids[: self._room]
            self._add(ids, None, cut=more > 0)
            yield

    def take_texts(self, texts: Iterator[str]) -> Generator[None, None, None]:
        """Texts, the prompt not yet added."""
        self._texts = []
        for beginning in beginnings(self._tokenizer, map(self._prompt.__add__, texts), self._room):
            yield from self._take(beginning)
            yield

    def _take(self, beginning: Beginning) -> Generator[None, None, None]:
        while beginning.wants_more:
            beginning.read_on(self._tokenizer, self._name())
            yield
        if beginning.count <= self._room:
            self._add(beginning.ids, beginning.text, cut=False)
            return
        self._may_cut(beginning.count, exact=beginning.is_whole)
        if self._call.truncate == "end":
            self._add(beginning.ids[: self._room], beginning.clip(self._tokenizer, self._room), cut=True)
            return
        kept = len(self._tokenizer.ids([self._prompt])[0]) if self._prompt else 0
        while not beginning.is_whole:
            beginning.skip(self._tokenizer, self._name())
            yield
        tail, clipped = yield from self._find_tail(beginning.text, beginning.cuts, self._room - kept)
        self._add(beginning.ids[:kept] + tail, self._prompt + clipped if kept else clipped, cut=True)

    def _find_tail(self, text: str, cuts: list[int], tokens: int) -> Generator[None, None, tuple[list[int], str]]:
        """The last ids of a text that has more, and what they stand for."""
        parts: list[list[int]] = []
        missing, at = tokens, len(cuts) - 1
        while True:
            piece = text[cuts[at - 1] : cuts[at]]
            part = self._tokenizer.ids([piece])[0]
            if len(part) >= missing:
                parts.append(part[len(part) - missing :])
                clipped = self._tokenizer.clip(piece, missing, end=True) + text[cuts[at] :]
                return [token for each in reversed(parts) for token in each], clipped
            parts.append(part)
            missing, at = missing - len(part), at - 1
            yield

    def _add(self, ids: list[int], text: str | None, *, cut: bool) -> None:
        """Add the next input."""
        if not ids and not self._tokenizer.specials:
            raise EmptyInput("This input has no token that the model knows.", param=self._name())
        self._truncated += cut
        self._ids.append(ids)
        if self._texts is not None and text is not None:
            self._texts.append(text)
        self._tokens += len(ids) + self._tokenizer.specials
        self._check(self._tokens)

    def _check(self, tokens: int) -> None:
        """Raise a CallerFailure if a request cannot have that many tokens, or the caller cannot pay them."""
        if tokens > REQUEST_TOKENS_MAX:
            raise MaxTokensPerRequest(
                f"All inputs together have more than {REQUEST_TOKENS_MAX:,} tokens, which is what one request takes. "
                "Split it.",
                param="input",
            )
        if self._can_pay is not None:
            self._can_pay(tokens)

    def _may_cut(self, tokens: int, *, exact: bool) -> None:
        """Raise ContextLengthExceeded if the next input must not be cut."""
        if self._call.truncate == "none":
            raise ContextLengthExceeded(
                f"This input has {'' if exact else 'more than '}{tokens + self._tokenizer.specials} tokens; the model "
                f'takes at most {self._model.max_tokens}. Shorten it, or send "truncate": "end".',
                param=self._name(),
            )

    def _name(self) -> str:
        return _name(self._call, len(self._ids))


def _bound(call: Call, prompt: str, texts: list[str]) -> Counted:
    """The bound for a model without a tokenizer here: a token is at least a byte, special ones aside."""
    if call.truncate != "none":
        raise InvalidValue(
            "This model's tokens cannot be counted here, so its inputs cannot be cut. Shorten them yourself.",
            param="truncate",
        )
    texts = [prompt + text for text in texts]
    return Counted(lengths=[len(text.encode()) + SPECIALS_MAX for text in texts], texts=texts, exact=False)


def _prompt(call: Call, model: Model) -> str:
    return model.prompts.get(call.role, "") if call.role else ""


def _check_native(call: Call, index: int, tokenizer: Tokenizer) -> None:
    tokens = call.ids[index]
    if max(tokens) >= tokenizer.vocab_size:
        wrong = next(token for token in tokens if token >= tokenizer.vocab_size)
        raise InvalidValue(
            f"{wrong} is no token id of this model: its vocabulary has {tokenizer.vocab_size:,} ids.",
            param=_name(call, index),
        )
    if not tokenizer.special_ids.isdisjoint(tokens):
        special = next(token for token in tokens if token in tokenizer.special_ids)
        raise InvalidValue(
            f"{special} is a special token; the model adds its special tokens by itself.", param=_name(call, index)
        )


def _texts(call: Call, cl100k: Decoder | None) -> Iterator[str]:
    """The texts that were sent, or those that the sent ids stand for."""
    if call.texts:
        yield from call.texts
        return
    chars = 0
    for index in range(len(call.ids)):
        text = _text(call, index, cl100k)
        chars += len(text)
        if chars > REQUEST_BODY_BYTES_MAX:
            raise InvalidValue(
                f"These token ids stand for more than {REQUEST_BODY_BYTES_MAX:,} characters of text. Split them.",
                param=_name(call, index),
            )
        yield text


def _text(call: Call, index: int, cl100k: Decoder | None) -> str:
    if cl100k is None:
        raise InvalidValue(
            "This server cannot read token ids: its cl100k ranks are not installed (`embedmesh setup` fetches them). "
            "Send the text itself.",
            param="input",
        )
    try:
        return cl100k.decode(call.ids[index])
    except ValueError as error:
        raise InvalidValue(str(error), param=_name(call, index)) from None


def _name(call: Call, index: int) -> str:
    return "input" if call.single else f"input.{index}"
