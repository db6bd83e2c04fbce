"""A small server of another make, on a port of its own: it repeats what it was told, word by word.

It runs in a thread, so that tests of processes and of event loops use the same.
"""

import asyncio
import base64
import json
import threading
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(64)).decode()


@dataclass
class LittleServer:
    """`asked` are the bodies that came; `left` counts streams whose reader went. `usage` may be overruled, or None."""

    pace_s: float = 0.0  # between two events
    delay_s: float = 0.0  # before an answer
    words_max: int = 10_000  # of an answer, after which it breaks off
    usage: dict[str, int] | bool = True
    refuse: tuple[int, str] | None = None
    endless: bool = False
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    left: list[float] = field(default_factory=list)  # when, by time.monotonic
    events: int = 0  # that were written

    def __enter__(self) -> "LittleServer":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """What it was asked besides a gateway's or sidecar's own questions."""
        return [body for _, body in self.asked if body.get("max_tokens") != 1]

    async def _start(self) -> int:
        app = web.Application(client_max_size=16 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/images/generations", self._images)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(site._server.sockets[0].getsockname()[1])  # type: ignore[union-attr]

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        text = body["messages"][-1]["content"]
        said = text if isinstance(text, str) else "".join(part.get("text", "") for part in text)

        def choice(word: str | None, finish: str | None, whole: bool) -> dict[str, Any]:
            if whole:
                message = {"role": "assistant", "content": word}
                return {"index": 0, "message": message, "finish_reason": finish}
            return {"index": 0, "delta": {} if word is None else {"content": word}, "finish_reason": finish}

        return await self._answer(request, body, said, choice, "chat.completion")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)

        def choice(word: str | None, finish: str | None, whole: bool) -> dict[str, Any]:
            return {"index": 0, "text": word or "", "finish_reason": finish, "logprobs": None}

        return await self._answer(request, body, body["prompt"], choice, "text_completion")

    async def _images(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        if self.refuse is not None:
            return self._refused()
        return web.json_response({"created": 1, "data": [{"b64_json": PNG}] * body.get("n", 1)})

    async def _read(self, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(await request.read())
        self.asked.append((request.path, body))
        return body

    def _refused(self) -> web.Response:
        assert self.refuse is not None
        status, words = self.refuse
        return web.json_response({"error": {"message": words, "code": status}}, status=status)

    async def _answer(
        self, request: web.Request, body: dict[str, Any], said: str, choice: Any, kind: str
    ) -> web.StreamResponse:
        own_question = body.get("max_tokens") == 1
        if self.refuse is not None and not own_question:
            return self._refused()
        if self.delay_s and not own_question:
            await self._sleep(self.delay_s)
        words = [word if not at else f" {word}" for at, word in enumerate(said.split(" "))]
        limit = body.get("max_tokens", 10_000)
        finish = "stop" if len(words) <= limit else "length"
        words = words[:limit]
        usage = {"prompt_tokens": 3 + len(said.split()), "completion_tokens": len(words)}
        usage["total_tokens"] = sum(usage.values())
        told = usage if self.usage is True or own_question else self.usage
        base = {"id": "theirs", "created": 1, "model": "/their/path.gguf"}
        if not body.get("stream"):
            reply = base | {"object": kind, "choices": [choice("".join(words), finish, True)]}
            return web.json_response(reply | ({"usage": told} if told else {}))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for at, word in enumerate(words * (1_000 if self.endless else 1)):
                if at >= self.words_max:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                await self._event(response, base | {"object": kind + ".chunk", "choices": [choice(word, None, False)]})
            await self._event(response, base | {"object": kind + ".chunk", "choices": [choice(None, finish, False)]})
            if told:
                await self._event(response, base | {"object": kind + ".chunk", "choices": [], "usage": told})
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.left.append(asyncio.get_running_loop().time())
            raise
        return response

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.left.append(asyncio.get_running_loop().time())
            raise

    async def _event(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        if self.pace_s:
            await asyncio.sleep(self.pace_s)
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.events += 1
