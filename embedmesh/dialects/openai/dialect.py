"""The OpenAI dialect of the operation "embeddings"; see `embedmesh.flow.embed.Dialect`."""

from embedmesh.dialects.openai.parse import parse
from embedmesh.dialects.openai.render import render, reply_bytes_max
from embedmesh.dialects.openai.straight import parse_ordinary


class OpenAI:
    """What `POST /v1/embeddings` takes and gives. Failures have the API's own envelope."""

    parse = staticmethod(parse)
    parse_ordinary = staticmethod(parse_ordinary)
    reply_bytes_max = staticmethod(reply_bytes_max)
    render = staticmethod(render)
    envelope = None
