"""How many tokens a call is, in the model's own vocabulary, and the ids that the node will embed.

The gateway's count is what is charged, so it counts exactly what is sent: prompt added, input cut, special tokens in.
"""

import asyncio

from embedmesh.rules.embeddings import REQUEST_TOKENS_MAX, Call, Counted
from embedmesh.rules.errors import ContextLengthExceeded, EmptyInput, InvalidValue, MaxTokensPerRequest
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Decoder, Tokenizer

INLINE_CHARS_MAX = 4_096  # about half a millisecond; anything longer is counted off the event loop
CHARS_PER_ID = 4  # of cl100k, on average
SPECIALS_MAX = 8  # special tokens that a model may add to an input; two or three in all that we know


async def count(call: Call, model: Model, tokenizer: Tokenizer | None, cl100k: Decoder | None) -> Counted:
    """Token ids and their number. Raises a CallerFailure that names the input at fault.

    Without a tokenizer the bytes of each text are taken as a bound of its tokens.
    """
    if sum(map(len, call.texts)) + sum(map(len, call.ids)) * CHARS_PER_ID <= INLINE_CHARS_MAX:
        return count_now(call, model, tokenizer, cl100k)
    return await asyncio.to_thread(count_now, call, model, tokenizer, cl100k)


def count_now(call: Call, model: Model, tokenizer: Tokenizer | None, cl100k: Decoder | None) -> Counted:
    """The same, without leaving the calling thread."""
    prompt = model.prompts.get(call.role, "") if call.role else ""
    if tokenizer is None:
        return _bound(call, prompt, _texts(call, model, cl100k))
    texts: list[str] | None = None
    if call.ids and model.token_ids == "native":
        _check_native(call, tokenizer)
        before = tokenizer.ids([prompt])[0] if prompt else []
        ids = [before + tokens for tokens in call.ids]
    else:
        texts = [prompt + text for text in _texts(call, model, cl100k)]
        ids = tokenizer.ids(texts)

    room = (call.keep or model.max_tokens) - tokenizer.specials
    if call.keep is not None and room <= (len(tokenizer.ids([prompt])[0]) if prompt else 0):
        raise InvalidValue(
            "So few tokens leave no room for a text beside the model's special tokens and prompt.",
            param="truncate_prompt_tokens",
        )
    truncated = 0
    for index, tokens in enumerate(ids):
        if not tokens and not tokenizer.specials:
            raise EmptyInput("This input has no token that the model knows.", param=_name(call, index))
        if len(tokens) <= room:
            continue
        if call.truncate == "none":
            raise ContextLengthExceeded(
                f"This input has {len(tokens) + tokenizer.specials} tokens; the model takes at most "
                f'{model.max_tokens}. Shorten it, or send "truncate": "end".',
                param=_name(call, index),
            )
        truncated += 1
        kept = len(tokenizer.ids([prompt])[0]) if prompt and call.truncate == "start" else 0
        at_end = call.truncate == "start"
        ids[index] = tokens[:kept] + tokens[len(tokens) - (room - kept) :] if at_end else tokens[:room]
        if texts is not None:
            clipped = tokenizer.clip(texts[index], room - kept, end=at_end)
            texts[index] = prompt + clipped if kept else clipped

    lengths = [len(tokens) + tokenizer.specials for tokens in ids]
    if (total := sum(lengths)) > REQUEST_TOKENS_MAX:
        raise MaxTokensPerRequest(
            f"All inputs together have {total:,} tokens; one request takes {REQUEST_TOKENS_MAX:,}. Split it.",
            param="input",
        )
    return Counted(lengths=lengths, ids=ids, texts=texts, truncated=truncated)


def _bound(call: Call, prompt: str, texts: list[str]) -> Counted:
    """For a model without a tokenizer here: no token stands for less than a byte, special ones aside."""
    if call.truncate != "none":
        raise InvalidValue(
            "This model's tokens cannot be counted here, so its inputs cannot be cut. Shorten them yourself.",
            param="truncate",
        )
    texts = [prompt + text for text in texts]
    return Counted(lengths=[len(text.encode()) + SPECIALS_MAX for text in texts], texts=texts, exact=False)


def _texts(call: Call, model: Model, cl100k: Decoder | None) -> list[str]:
    if call.texts:
        return call.texts
    if model.token_ids == "native":
        raise InvalidValue("Token ids of this model cannot be checked here. Send the text itself.", param="input")
    return _decode(call, cl100k)


def _check_native(call: Call, tokenizer: Tokenizer) -> None:
    for index, tokens in enumerate(call.ids):
        for token in tokens:
            if token >= tokenizer.vocab_size:
                raise InvalidValue(
                    f"{token} is no token id of this model: its vocabulary has {tokenizer.vocab_size:,} ids.",
                    param=_name(call, index),
                )
            if token in tokenizer.special_ids:
                raise InvalidValue(
                    f"{token} is a special token; the model adds its special tokens by itself.",
                    param=_name(call, index),
                )


def _decode(call: Call, cl100k: Decoder | None) -> list[str]:
    if cl100k is None:
        raise InvalidValue(
            "This server cannot read token ids: its cl100k ranks are not installed (`embedmesh setup` fetches them). "
            "Send the text itself.",
            param="input",
        )
    texts = []
    for index, tokens in enumerate(call.ids):
        try:
            texts.append(cl100k.decode(tokens))
        except ValueError as error:
            raise InvalidValue(str(error), param=_name(call, index)) from None
    return texts


def _name(call: Call, index: int) -> str:
    return "input" if call.single else f"input.{index}"
