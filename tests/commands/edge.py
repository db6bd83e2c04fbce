"""A scripted endpoint on a real socket, in a thread of its own, and `embedmesh` run against it."""

import asyncio
import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

WIDTH = 4
KEY = "sk-test-key"
Answer = web.Response | None
Script = Callable[["Asked"], Answer]


class Asked:
    """One request as it arrived. `number` counts from 0."""

    def __init__(self, number: int, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.number = number
        self.headers = headers
        self.body = body
        self.texts: list[str] = body["input"]


def vector_of(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What the endpoint answers for a text: different for each, the same every time."""
    raw = np.frombuffer(hashlib.sha256(text.encode()).digest()[: 4 * WIDTH], "<u4").astype("<f4")
    return np.asarray(raw / np.linalg.norm(raw), "<f4")


def embeddings(asked: Asked) -> web.Response:
    """The right answer."""
    rows = [base64.b64encode(vector_of(text).tobytes()).decode() for text in asked.texts]
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    tokens = 3 * len(rows)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": asked.body["model"], "usage": usage}
    return web.json_response(body, headers={"x-embedmesh-cost-nanousd": str(tokens)})


def failure(status: int, code: str, message: str = "no", param: str | None = None, **headers: str) -> web.Response:
    """The error envelope; `retry_after="0"` becomes the header `retry-after`."""
    error = {"message": message, "type": "t", "param": param, "code": code}
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.json_response({"error": error}, status=status, headers=sent)


def anew(answer: web.Response) -> web.Response:
    """The same answer once more: aiohttp sends a response object only once."""
    return web.Response(status=answer.status, body=answer.body, headers=answer.headers)


class Edge:
    """An embeddings endpoint. `script` may answer a request; where it gives None the right answer is sent.

    Requests that `holds_back` names wait while it does; those whose caller has gone by then are not answered.
    """

    def __init__(self) -> None:
        self.script: Script = lambda asked: None
        self.asked: list[Asked] = []
        self.answered: list[str] = []
        self.holds_back: Callable[[Asked], bool] = lambda asked: False
        self.routes: dict[str, web.Response] = {}
        self.base_url = ""

    async def _embed(self, request: web.Request) -> web.Response:
        asked = Asked(len(self.asked), dict(request.headers), await request.json())
        self.asked.append(asked)
        answer = self.script(asked)
        if answer is not None:
            return anew(answer)
        while self.holds_back(asked):
            await asyncio.sleep(0.005)
            if request.transport is None:
                return web.Response(status=499)
        self.answered += asked.texts
        return embeddings(asked)

    async def _other(self, request: web.Request) -> web.Response:
        answer = self.routes.get(request.path)
        return web.Response(status=404) if answer is None else anew(answer)

    @contextmanager
    def running(self) -> Iterator["Edge"]:
        loop = asyncio.new_event_loop()
        started = threading.Event()

        async def serve() -> None:
            app = web.Application(client_max_size=8 * 1024 * 1024)
            app.router.add_post("/v1/embeddings", self._embed)
            app.router.add_get("/{path:.*}", self._other)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            self.base_url = f"http://{host}:{port}/v1"
            self.stop = asyncio.Event()
            started.set()
            await self.stop.wait()
            await runner.cleanup()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            assert started.wait(5)
            yield self
        finally:
            self.holds_back = lambda asked: False
            loop.call_soon_threadsafe(self.stop.set)
            thread.join(5)
            loop.close()


def bootstrap(data_dir: Path, base_url: str, api_key: str = KEY) -> Path:
    """What a first `serve` writes."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = data_dir / "bootstrap.json"
    file.write_text(json.dumps({"base_url": base_url, "api_key": api_key, "admin_key": "a", "account": "local"}))
    file.chmod(0o600)
    return data_dir


def start(*arguments: str, **more: Any) -> "subprocess.Popen[str]":
    """`embedmesh ARGUMENTS` as a process of its own, with none of the caller's EMBEDMESH_ variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDMESH_")}
    more["env"] = clean | more.get("env", {})
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | more
    return subprocess.Popen([sys.executable, "-m", "embedmesh", *arguments], text=True, **pipes)
