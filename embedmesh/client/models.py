"""What an endpoint says of a model before anything is embedded, and so before anything is paid."""

import http.client
import ssl
from urllib.parse import quote

import msgspec

from embedmesh.client.access import Access
from embedmesh.client.errors import CallNotAnswered, CallRefused, WrongCall
from embedmesh.client.refusals import read_problem
from embedmesh.client.wire import CONNECT_WITHIN_S
from embedmesh.rules.limits import VECTOR_WIDTH_MAX
from embedmesh.rules.tls_failures import tls_failure

MODEL_REPLY_BYTES_MAX = 16 * 1024 * 1024  # a model with its prices has some hundred; a catalogue has thousands at most


class _ModelReply(msgspec.Struct):
    id: str = ""
    width: int = 0
    modalities: tuple[str, ...] = ()


class _ModelsReply(msgspec.Struct):
    data: list[_ModelReply]


def served_width(access: Access, model: str) -> int:
    """Components of a model's vectors, by `GET /v1/models/{model}`, which costs nothing.

    Raises CallNotAnswered; CallRefused where the key or the model is refused; WrongCall where the server does not say.
    """
    body = _get(access, f"/models/{quote(model, safe='')}")
    try:
        width = msgspec.json.decode(body, type=_ModelReply).width
    except (ValueError, RecursionError):
        width = 0
    if not 0 < width <= VECTOR_WIDTH_MAX:
        raise WrongCall(f"{access.base_url} does not tell how wide the vectors of {model} are. Give dimensions.")
    return width


def served_for(access: Access, modality: str) -> list[str]:
    """The models that do this, as `GET /v1/models` tells them.

    Raises CallNotAnswered; CallRefused where the key is refused; WrongCall where the server does not tell what they do.
    """
    try:
        served = msgspec.json.decode(_get(access, "/models"), type=_ModelsReply).data
    except (ValueError, RecursionError):
        raise WrongCall(f"{access.base_url} does not tell what its models do. Name one.") from None
    return [model.id for model in served if modality in model.modalities]


def _get(access: Access, path: str) -> bytes:
    """The body of a reply of status 200."""
    connection = http.client.HTTPConnection(access.host, access.port, timeout=CONNECT_WITHIN_S)
    if access.tls is not None:
        connection = http.client.HTTPSConnection(access.host, access.port, timeout=CONNECT_WITHIN_S, context=access.tls)
    try:
        connection.request("GET", access.path + path, headers=access.headers)
        reply = connection.getresponse()
        body = reply.read(MODEL_REPLY_BYTES_MAX)
    except ssl.SSLError as error:
        words = str(tls_failure(access.base_url, error))
        raise CallNotAnswered(f"{words[:1].upper()}{words[1:]}.") from None
    except (OSError, http.client.HTTPException) as error:
        raise CallNotAnswered(f"{access.base_url} does not tell its models ({type(error).__name__}).") from None
    finally:
        connection.close()
    if reply.status != 200:
        raise CallRefused(read_problem(reply.status, body))
    return body
