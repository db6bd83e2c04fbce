"""What a prompt can be at most, in tokens, and what may come back for it, in bytes: for gateways and sidecars."""

from typing import NamedTuple

from embedmesh.flow.usage import tokens_of
from embedmesh.rules.generation import GenerationRequest, Prompt
from embedmesh.rules.limits import BYTES_A_TOKEN_MAX, LOCK_TOKENS
from embedmesh.rules.models import Model

TEMPLATE_TOKENS_LIKELY = 4  # around a message, where no node says
ANSWER_FRAME_BYTES = 64 * 1024  # around the answers
ECHO_BYTES_A_BYTE = 6  # of a prompt that is sent back: a control character in JSON
ANSWER_BYTES_A_TOKEN = 64  # of an answer in JSON, escaped; ordinary text has six
LOGPROB_BYTES = 160  # of one token with its probability and its bytes
EVENT_BYTES_A_TOKEN = 4_096  # of a stream's events: each repeats its id, its model and usage
MESSAGE_BYTES_MIN = 28  # of a message in JSON: {"role":"user","content":""}
IMAGE_PART_BYTES_MIN = 40  # of an image in a message: {"type":"image_url","image_url":{"url":""}}
SEALED_ANSWER_SHARE = 2  # times: a sixteenth that our scheme fills up, and probabilities of tokens
PIXEL_BYTES = 6  # of an image in base64: an honest encoder needs a third


class PromptTokens(NamedTuple):
    """Tokens of a prompt's input: at most, likely, and of its texts and images alone if they were counted exactly."""

    most: int
    likely: int
    exact: int | None


def text_bytes(prompt: Prompt) -> int:
    """Of all strings that reach the model's template, in UTF-8."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in prompt.texts)


def prompt_tokens(prompt: Prompt, model: Model, size: int, exact: int | None) -> PromptTokens:
    """Bound and guess the input. `size` is `text_bytes`; `exact` counts the texts' tokens, None without a tokenizer."""
    given = prompt.ids + (model.image_tokens or 0) * (prompt.images if prompt.size is None else 0)
    templates = 1 + prompt.messages
    bound = (size if exact is None else exact) + given + templates * model.template_tokens
    likely = (tokens_of(size) if exact is None else exact) + given
    if prompt.messages:
        likely += templates * min(TEMPLATE_TOKENS_LIKELY, model.template_tokens)
    most = min(bound, model.max_tokens * max(1, prompt.choices))
    return PromptTokens(most, min(likely, most), None if exact is None else exact + given)


def asked_of(prompt: Prompt, output_max: int) -> GenerationRequest:
    """What a node is asked, but for its name of the model; each answer may have `output_max` tokens."""
    body = prompt.body
    if prompt.modality != "images":
        body = body | dict.fromkeys(prompt.limits, output_max)
    most = stream_bytes_max(prompt, output_max) if prompt.stream else whole_bytes_max(prompt, output_max)
    return GenerationRequest(prompt.modality, body, most, prompt.stream)


def whole_bytes_max(prompt: Prompt, output_max: int) -> int:
    """Of a whole reply."""
    if prompt.size is not None:
        return image_bytes_max(prompt.size, prompt.images)
    top = prompt.body.get("top_logprobs") or prompt.body.get("logprobs") or 0
    a_token = ANSWER_BYTES_A_TOKEN + LOGPROB_BYTES * (1 + int(top) if top else 0)
    return ANSWER_FRAME_BYTES + _echoed_bytes_max(prompt) + prompt.generated * output_max * a_token


def stream_bytes_max(prompt: Prompt, output_max: int) -> int:
    """Of all of a stream."""
    return ANSWER_FRAME_BYTES + _echoed_bytes_max(prompt) + prompt.generated * output_max * EVENT_BYTES_A_TOKEN


def _echoed_bytes_max(prompt: Prompt) -> int:
    """Of the prompts that each answer begins with, where the caller wants that."""
    if not prompt.body.get("echo"):
        return 0
    top = prompt.body.get("logprobs") or 0
    a_byte = ECHO_BYTES_A_BYTE + LOGPROB_BYTES * (1 + int(top) if top else 0)
    size = text_bytes(prompt) + prompt.ids * BYTES_A_TOKEN_MAX
    return int(prompt.body.get("n") or 1) * size * a_byte


def sealed_input_max(size: int, model: Model) -> int:
    """Tokens of a sealed input whose JSON has that many bytes, for who cannot read it: more are not believed."""
    added = model.template_tokens * (1 + size // MESSAGE_BYTES_MIN)
    if model.image_tokens is not None:
        added += model.image_tokens * (size // IMAGE_PART_BYTES_MIN)
    return size + added


def sealed_whole_bytes_max(model: Model) -> int:
    """Of a whole sealed answer in text; a longer one can be had as a stream."""
    tokens = max(model.output_max, LOCK_TOKENS)
    return SEALED_ANSWER_SHARE * (ANSWER_FRAME_BYTES + tokens * ANSWER_BYTES_A_TOKEN)


def image_bytes_max(size: str, images: int) -> int:
    """Of a whole reply with images."""
    width, _, height = size.partition("x")
    return ANSWER_FRAME_BYTES + images * int(width) * int(height) * PIXEL_BYTES
