"""The OpenAI dialect of images: `POST /v1/images/generations`. Implements the port `GenerationDialect`.

A node is always asked for base64, and an address in its reply is never passed on: it would tell a stranger who looks at
the image, and when. A caller that says no `response_format` gets each image in both forms: clients of OpenAI read
either, those of Atoma insist on `url`.
"""

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from embedmesh.dialects.openai.members import IMAGES, IMAGES_REQUIRED
from embedmesh.dialects.openai.pictures import base64_of, data_url, kind_of_base64
from embedmesh.dialects.openai.replies import ENCODE, Created, check_no_error, decoded
from embedmesh.dialects.openai.requests import read
from embedmesh.rules.errors import InvalidValue, NotAsAsked, WrongAnswer
from embedmesh.rules.generation import Piece, Prompt, StreamState, TokenCounts, Whole
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check

REVISED_PROMPT_CHARS_MAX = 65_536  # twice the longest prompt


class ImageReply(msgspec.Struct):
    """One image: base64 of a PNG, JPEG or WebP file, or a `data:` URL that holds it, or both."""

    b64_json: str | UnsetType = UNSET
    url: str | UnsetType = UNSET
    revised_prompt: Annotated[str, Meta(description="What the model made of the prompt.")] | UnsetType = UNSET


class ImageList(msgspec.Struct):
    """As many images as `n` asks for."""

    created: Created
    data: list[ImageReply]


class _Drawn(msgspec.Struct):
    b64_json: Any = None
    url: Any = None
    revised_prompt: Any = None


class _DrawnReply(msgspec.Struct):
    data: list[_Drawn] | None = None
    error: Any = None
    object: Any = None


_decode = msgspec.json.Decoder(_DrawnReply).decode


class Images:
    """What `POST /v1/images/generations` takes and gives."""

    def parse(self, body: bytes, find: Callable[[str], Model]) -> tuple[Prompt, Model]:
        """The request, and the catalogue's model for it. `find` raises ModelNotFound. Raises a CallerFailure."""
        given = read(body, find, "images", IMAGES, IMAGES_REQUIRED)
        says, model = given.says, given.model
        size = _size(says.get("size"), model)
        number = says.get("n", 1)
        prompt = Prompt(
            modality="images",
            model=says["model"],
            body=given.sent | {"n": number, "size": size, "response_format": "b64_json"},
            texts=given.texts,
            images=number,
            choices=number,
            generated=number,
            limits=(),
            size=size,
            reply_form=says.get("response_format"),
            user=says.get("user"),
            ignored=given.ignored,
        )
        return prompt, model

    def whole(self, prompt: Prompt, model: Model, reply: bytes, request_id: str, created: int) -> Whole:
        """A node's reply by an allow-list. Raises NodeBroke, WrongAnswer."""
        said = decoded(_decode, reply)
        check_no_error(said.error, said.object)
        drawn = said.data or []
        if len(drawn) != prompt.images:
            raise NotAsAsked(f"The reply has {len(drawn)} images instead of {prompt.images}.")
        images = [_image(each, prompt.reply_form) for each in drawn]
        return Whole(ENCODE(ImageList(created, images)), images=len(images))

    def piece(self, prompt: Prompt, model: Model, data: bytes, state: StreamState) -> Piece:
        """Images are not streamed: a request for it is refused."""
        raise WrongAnswer("Images are not streamed.")

    def usage_event(self, prompt: Prompt, model: Model, usage: TokenCounts, state: StreamState) -> bytes:
        """Images are not streamed: a request for it is refused."""
        raise WrongAnswer("Images are not streamed.")

    def with_usage(self, whole: Whole, usage: TokenCounts) -> bytes:
        """The same reply: images are paid by number and size, not by tokens."""
        return whole.data


def _size(said: str | None, model: Model) -> str:
    if said is None or said == "auto":
        return next(iter(model.image_prices))
    if said not in model.image_prices:
        raise InvalidValue(f"`size` must be one of {', '.join(model.image_prices)} for {model.id}.", param="size")
    return said


def _image(drawn: _Drawn, form: str | None) -> ImageReply:
    encoded = drawn.b64_json
    if encoded is None and isinstance(drawn.url, str):
        encoded = base64_of(drawn.url)
    elif isinstance(encoded, str):
        encoded = base64_of(encoded) or encoded  # some nodes put the whole URL there
    kind = kind_of_base64(encoded) if isinstance(encoded, str) else None
    if kind is None:
        raise WrongAnswer("An image is not a PNG, JPEG or WebP file in base64.", check=Check.ENCODING)
    image = ImageReply()
    if form != "url":
        image.b64_json = encoded
    if form != "b64_json":
        image.url = data_url(kind, encoded)
    if isinstance(drawn.revised_prompt, str) and len(drawn.revised_prompt) <= REVISED_PROMPT_CHARS_MAX:
        image.revised_prompt = drawn.revised_prompt
    return image
