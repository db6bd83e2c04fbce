"""`/v1/chat/completions`, `/v1/completions`, `/v1/images/generations`: adapt HTTP to the flow; no rule lives here."""

from aiohttp import web

from embedmesh.dialects.openai.chat import Chat
from embedmesh.dialects.openai.chat_replies import ChatCompletionChunkReply, ChatCompletionReply
from embedmesh.dialects.openai.completions import Completions, TextCompletionReply
from embedmesh.dialects.openai.images import ImageList, Images
from embedmesh.dialects.openai.members import ChatRequest, CompletionRequest, ImageRequest
from embedmesh.flow.expected import ExpectedOutput
from embedmesh.flow.generate import GENERATE_SCOPE, Generation
from embedmesh.flow.leases import Leases
from embedmesh.gateway.api.embeddings_api import EMBEDDING_HEADERS, IDEMPOTENCY_KEY, EmbeddingsApi
from embedmesh.gateway.api.pages.samples import CHAT_SAMPLES
from embedmesh.gateway.api.routes import Api, ApiReply, RawHandler, Route
from embedmesh.http.failures import TABLE, envelope
from embedmesh.rules.errors import MethodNotAllowed, NotFound
from embedmesh.rules.generation import GeneratingClient, GenerationDialect

HEADERS = tuple(header for header in EMBEDDING_HEADERS if header not in ("x-embedmesh-cached", "x-embedmesh-truncated"))
FAILURES = tuple(failure for failure in TABLE if failure not in (NotFound, MethodNotAllowed))
STREAMED = (
    "With `stream`, the reply is `text/event-stream`: each event is `data: ` and JSON, the last is `data: [DONE]`. An "
    'error in mid-stream is an event `data: {"error": …}` without `[DONE]` after it, and costs nothing unless the '
    "operator charges for a part. You pay for what was handed to you if you close the stream before its end."
)


CHAT_PATH, COMPLETIONS_PATH, IMAGES_PATH = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"


def generations(client: GeneratingClient, leases: Leases) -> dict[str, Generation]:
    """What generates, by path."""
    dialects: dict[str, GenerationDialect] = {CHAT_PATH: Chat(), COMPLETIONS_PATH: Completions(), IMAGES_PATH: Images()}
    expected = ExpectedOutput()
    return {path: Generation(dialect, client, leases, expected, envelope) for path, dialect in dialects.items()}


class GenerationApi(Api):
    """What nodes of other makes generate."""

    TAG = "Chat, completions, images"

    def __init__(self, embeddings: EmbeddingsApi, client: GeneratingClient, leases: Leases) -> None:
        self._embeddings = embeddings
        self.bodies = embeddings.bodies
        self._operations = generations(client, leases)

    async def create_chat_completion(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create a chat completion.

        The next message of a conversation, whole or as a stream, by a node that runs the model.
        """
        return await self._embeddings.exchange(request, self._operations[CHAT_PATH], CHAT_PATH)

    async def create_completion(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create a completion.

        How a text goes on, whole or as a stream, by a node that runs the model.
        """
        return await self._embeddings.exchange(request, self._operations[COMPLETIONS_PATH], COMPLETIONS_PATH)

    async def create_image(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create images.

        Images for a description. A `url` in the reply is a `data:` URL: nothing has to be fetched.
        """
        return await self._embeddings.exchange(request, self._operations[IMAGES_PATH], IMAGES_PATH)

    ROUTES = (
        Route(
            "POST",
            CHAT_PATH,
            (GENERATE_SCOPE,),
            create_chat_completion,
            failures=FAILURES,
            details=STREAMED,
            raw=RawHandler(
                {200: ApiReply("The answers.", ChatCompletionReply, headers=HEADERS, event=ChatCompletionChunkReply)},
                ChatRequest,
                key_checked_by_flow=True,
                extra={"parameters": [IDEMPOTENCY_KEY], "x-codeSamples": CHAT_SAMPLES},
            ),
        ),
        Route(
            "POST",
            COMPLETIONS_PATH,
            (GENERATE_SCOPE,),
            create_completion,
            failures=FAILURES,
            details=STREAMED,
            raw=RawHandler(
                {200: ApiReply("The texts.", TextCompletionReply, headers=HEADERS, event=TextCompletionReply)},
                CompletionRequest,
                key_checked_by_flow=True,
                extra={"parameters": [IDEMPOTENCY_KEY]},
            ),
        ),
        Route(
            "POST",
            IMAGES_PATH,
            (GENERATE_SCOPE,),
            create_image,
            failures=FAILURES,
            raw=RawHandler(
                {200: ApiReply("The images.", ImageList, headers=HEADERS)},
                ImageRequest,
                key_checked_by_flow=True,
                extra={"parameters": [IDEMPOTENCY_KEY]},
            ),
        ),
    )
