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


class GenerationApi(Api):
    """What nodes of other makes generate."""

    TAG = "Chat, completions, images"

    def __init__(self, embeddings: EmbeddingsApi, client: GeneratingClient, leases: Leases) -> None:
        self._embeddings = embeddings
        self.bodies = embeddings.bodies
        expected = ExpectedOutput()

        def operation(dialect: GenerationDialect) -> Generation:
            return Generation(dialect, client, leases, expected, envelope)

        self._chat, self._completions, self._images = operation(Chat()), operation(Completions()), operation(Images())

    async def create_chat_completion(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create a chat completion.

        The next message of a conversation, whole or as a stream, by a node that runs the model.
        """
        return await self._embeddings.exchange(request, self._chat)

    async def create_completion(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create a completion.

        How a text goes on, whole or as a stream, by a node that runs the model.
        """
        return await self._embeddings.exchange(request, self._completions)

    async def create_image(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create images.

        Images for a description. A `url` in the reply is a `data:` URL: nothing has to be fetched.
        """
        return await self._embeddings.exchange(request, self._images)

    ROUTES = (
        Route(
            "POST",
            "/v1/chat/completions",
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
            "/v1/completions",
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
            "/v1/images/generations",
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
