"""`embedmesh chat`: one question, or a conversation on a terminal. The answer is printed as it comes."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import click
import msgspec
import orjson

from embedmesh.client.refusals import read_problem
from embedmesh.commands.endpoint import GatewayAccess, find_gateway
from embedmesh.commands.options import WholeNumber, data_dir_option
from embedmesh.commands.output import print_json
from embedmesh.http.sse import SseParser
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX
from embedmesh.rules.tls_failures import cause_of, tls_failure

ANSWER_S = 3_600.0  # as long as a gateway lets a stream be
SILENCE_S = 90.0  # a gateway comments every 10 s until the first event, and gives a node 60 between two
CHAT_CONNECT_S = 10.0
REFUSAL_BYTES_MAX = 64 * 1024
WHOLE_BYTES_MAX = 64 * 1024 * 1024
CHAT = "/chat/completions"
EXIT_REFUSED = 1

HELP = """Ask a model that chats, and print its answer as it comes.

TEXT is the question; - reads it from standard input. Without TEXT, on a terminal, it is a conversation: each line is a
message. Ctrl-C stops an answer; an empty line or Ctrl-D ends it all.

\b
Examples:
  embedmesh chat "Why is the sky blue?" --model llama
  embedmesh chat --model llama
  cat report.txt | embedmesh chat - --system "Summarize in three lines."
  embedmesh chat "Name a colour." --json --max-tokens 16

\b
Exit status:
  0    answered
  1    the gateway refused, or the answer broke off (the line on stderr says why)
  2    wrong usage
  78   the set-up is wrong: no endpoint, no key, nothing listens, no model that chats
  130  interrupted
"""


class Refused(Exception):
    """The gateway refused, or the answer broke off. The message is for the user."""


class Conversation(NamedTuple):
    """A conversation with one model. `body` is that of every request, but for the messages."""

    session: aiohttp.ClientSession
    gateway: GatewayAccess
    body: dict[str, Any]

    async def whole(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The whole reply. Raises Refused."""
        async with self._post(self.body | {"messages": messages}) as reply:
            await _check(reply)
            whole: dict[str, Any] = orjson.loads(await _read(reply, WHOLE_BYTES_MAX))
            return whole

    async def words(self, messages: list[dict[str, str]]) -> AsyncIterator[str]:
        """The answer, piece by piece. Raises Refused, also where it breaks off."""
        async with self._post(self.body | {"messages": messages, "stream": True}) as reply:
            await _check(reply)
            events = SseParser()
            try:
                async for data in reply.content.iter_any():
                    for event in events.feed(data):
                        if event == b"[DONE]":
                            return
                        yield _words(event)
            except aiohttp.ClientPayloadError:
                pass  # it was cut
        raise Refused("The answer broke off.")

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {self.gateway.key}"}
        return self.session.post(self.gateway.base_url + CHAT, json=body, headers=headers)


@click.command(help=HELP)
@click.argument("text", required=False)
@click.option("--model", help="Model to ask. Default: the only one that chats.")
@click.option("--system", help="What the model is told first.")
@click.option("--max-tokens", type=WholeNumber(1), help="The answer's limit.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is the likeliest answer.")
@click.option("--url", help="Endpoint, as http://127.0.0.1:8080/v1. Also EMBEDMESH_BASE_URL.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with the key. Or: EMBEDMESH_API_KEY.")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print the whole reply as JSON.")
def chat(
    text: str | None,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    url: str | None,
    api_key_file: Path | None,
    data_dir: Path,
    as_json: bool,
) -> None:
    if text is None and not sys.stdin.isatty():
        text = "-"
    if text == "-":
        text = sys.stdin.read(REQUEST_BODY_BYTES_MAX)
    if text is None and as_json:
        raise click.UsageError("--json is for one question: give TEXT.")
    if text is not None and not text.strip():
        raise click.UsageError("There is nothing to ask: TEXT is empty.")
    gateway = find_gateway(url, api_key_file, data_dir, "api")
    asked = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
    body = {name: value for name, value in asked.items() if value is not None}
    messages = [{"role": "system", "content": system}] if system else []
    try:
        with asyncio.Runner() as runner:  # Ctrl-C is its own while it runs, and the terminal's where a line is typed
            talk = runner.run(_begin(gateway, body))
            try:
                if text is None:
                    _converse(runner, talk, messages)
                else:
                    runner.run(_answer(talk, [*messages, {"role": "user", "content": text}], as_json=as_json))
            finally:
                runner.run(talk.session.close())
    except Refused as refused:
        click.echo(f"embedmesh: {refused}", err=True)
        sys.exit(EXIT_REFUSED)
    except aiohttp.ClientSSLError as error:
        raise SetupError(f"{tls_failure(gateway.base_url, cause_of(error))}.") from None
    except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, TimeoutError):
        raise SetupError(f"Nothing answers at {gateway.base_url}. Is the gateway running?") from None


async def _begin(gateway: GatewayAccess, body: dict[str, Any]) -> Conversation:
    """A conversation with the model of `body`, or with the only one that chats. Raises Refused, SetupError."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CHAT_CONNECT_S, sock_read=SILENCE_S)
    session = aiohttp.ClientSession(timeout=timeout)
    try:
        model = body.get("model") or await _only_model(session, gateway)
    except BaseException:
        await session.close()
        raise
    return Conversation(session, gateway, body | {"model": model})


def _converse(runner: asyncio.Runner, talk: Conversation, messages: list[dict[str, str]]) -> None:
    """Ask line by line. A refusal does not end it, nor does Ctrl-C in an answer: what has come of it is kept."""
    while (said := _line()) is not None:
        asked, answer = [*messages, {"role": "user", "content": said}], list[str]()
        try:
            runner.run(_print(talk, asked, answer))
        except Refused as refused:
            click.echo(f"embedmesh: {refused}", err=True)
            continue
        except KeyboardInterrupt:
            click.echo("(stopped)", err=True)
        if answer:
            messages = [*asked, {"role": "assistant", "content": "".join(answer)}]


async def _answer(talk: Conversation, messages: list[dict[str, str]], *, as_json: bool) -> None:
    """Print the answer to one question. Raises Refused."""
    if as_json:
        print_json(await talk.whole(messages))
    else:
        await _print(talk, messages, [])


async def _print(talk: Conversation, messages: list[dict[str, str]], answer: list[str]) -> None:
    """Print the answer as it comes, and keep its pieces in `answer`. Raises Refused."""
    try:
        async for words in talk.words(messages):
            answer.append(words)
            click.echo(words, nl=False)
    finally:
        if answer:
            click.echo()


def _line() -> str | None:
    """The next message of the one who types; None at the end."""
    try:
        return input("> ").strip() or None
    except EOFError:
        click.echo()
        return None


async def _only_model(session: aiohttp.ClientSession, gateway: GatewayAccess) -> str:
    """The one model that chats. Raises SetupError where there is none, or several."""
    async with session.get(f"{gateway.base_url}/models", headers={"Authorization": f"Bearer {gateway.key}"}) as reply:
        await _check(reply)
        served = orjson.loads(await _read(reply, WHOLE_BYTES_MAX))["data"]
    chats = [each["id"] for each in served if "chat" in each.get("modalities", ())]
    if not chats:
        raise SetupError("No model that chats is served. Add a server: embedmesh nodes add URL --model MODEL.")
    if len(chats) > 1:
        raise SetupError(f"Several models chat: {', '.join(chats)}. Name one with --model.")
    return str(chats[0])


async def _check(reply: aiohttp.ClientResponse) -> None:
    """Raise Refused where the reply is a refusal."""
    if reply.status != 200:
        raise Refused(read_problem(reply.status, await _read(reply, REFUSAL_BYTES_MAX)).message)


async def _read(reply: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """The whole body. Raises Refused."""
    data = b""
    async for piece in reply.content.iter_any():
        data += piece
        if len(data) > bytes_max:
            raise Refused("The reply is larger than any right one.")
    return data


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


def _words(event: bytes) -> str:
    """What an event adds to the answer, without control characters but line ends and tabs. Raises Refused."""
    try:
        read = msgspec.json.decode(event, type=_Event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused("The answer is not of the form of OpenAI's API.") from None
    if read.error is not None:
        raise Refused(read_problem(200, event).message)
    words = "".join(choice.delta.content or "" for choice in read.choices)
    return "".join(char for char in words if char.isprintable() or char in "\n\t")
