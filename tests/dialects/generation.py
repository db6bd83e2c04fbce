"""What tests of requests to generate share: models, and a request that is right but for what a test changes."""

import base64
import json
from typing import Any

from embedmesh.dialects.openai.chat import Chat
from embedmesh.dialects.openai.completions import Completions
from embedmesh.dialects.openai.images import Images
from embedmesh.rules.errors import ModelNotFound
from embedmesh.rules.generation import Generating, GenerationDialect, Prompt
from embedmesh.rules.models import Modality, Model
from tests.flow.world import MODEL as EMBEDDER


def model(name: str, *modalities: Modality, **changes: Any) -> Model:
    made: dict[str, Any] = {"width": 0, "max_tokens": 8_192, "price": 1, "output_max": 1_024, "modalities": modalities}
    return Model(id=name, **made | changes)


PRICES = {"1024x1024": 40_000_000, "512x512": 10_000_000}
MODELS = {
    "talker": model("talker", "chat", "completions"),
    "seer": model("seer", "chat", image_tokens=256),
    "loose": model("loose", "chat", "completions", pass_unknown=True),
    "native": model("native", "completions", token_ids="native"),
    "painter": model("painter", "images", image_prices=PRICES),
    "loose-painter": model("loose-painter", "images", image_prices=PRICES, pass_unknown=True),
    "embedder": EMBEDDER,
}
DIALECTS: dict[Generating, GenerationDialect] = {"chat": Chat(), "completions": Completions(), "images": Images()}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff" + bytes(40)).decode()
WEBP = base64.b64encode(b"RIFF\x04\x00\x00\x00WEBP" + bytes(40)).decode()
GIF = base64.b64encode(b"GIF89a" + bytes(40)).decode()
SAID = {"role": "user", "content": "hi"}
RIGHT: dict[Generating, dict[str, Any]] = {
    "chat": {"model": "talker", "messages": [SAID]},
    "completions": {"model": "talker", "prompt": "hi"},
    "images": {"model": "painter", "prompt": "a cat"},
}


def find(name: str) -> Model:
    if name not in MODELS:
        raise ModelNotFound("There is no model of that name here.", param="model")
    return MODELS[name]


def body(modality: Generating, **members: object) -> bytes:
    return json.dumps(RIGHT[modality] | members).encode()


def parsed(modality: Generating, **members: object) -> Prompt:
    return DIALECTS[modality].parse(body(modality, **members), find)[0]


def function_tool(name: str = "get_weather", **members: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}} | members}
