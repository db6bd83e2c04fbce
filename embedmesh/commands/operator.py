"""What operators say to a gateway: its admin API, over the network, or in this process with `--offline`.

Both ways are the same requests to the same handlers (decision 23), so a command is written once.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlencode, urlsplit

import click

from embedmesh import __version__
from embedmesh.client.refusals import read_problem
from embedmesh.commands.endpoint import find_gateway
from embedmesh.commands.http_client import HttpClient, HttpReply, NoReply, over, to_url
from embedmesh.commands.options import SettingOption, data_dir_option
from embedmesh.commands.output import CommandResult, WrongUsage, prints_result
from embedmesh.rules.errors import SetupError
from embedmesh.settings import ENV_PREFIX

ADMIN_REPLY_S = 90.0  # a gateway checks its ledger for at most 60 s
ADMIN_REPLY_BYTES_MAX = 64 * 1024 * 1024  # a page of a thousand keys with a hundred models each has 20 MB
ADMIN_PAGE_ROWS = 1_000  # the most that the admin API gives at one time

Command = Callable[..., CommandResult | None]


class ApiRefusal(click.ClickException):
    """The gateway refused the request. One line, exit code 1."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Operator:
    """Sends requests to an admin API. Paths are given as segments behind `/v1/admin`, which may hold any text.

    Every method raises ApiRefusal, and SetupError where no gateway answers.
    """

    AREA: ClassVar[tuple[str, ...]] = ("admin",)  # the path's first segments
    PAGE_ROWS: ClassVar[int] = ADMIN_PAGE_ROWS
    KEY_HINT: ClassVar[str] = " Give a key with the scope `admin`: --admin-key-file, or EMBEDMESH_ADMIN_KEY."

    def __init__(self, client: HttpClient, root: str = "", *, offline: bool, instead: str = "") -> None:
        """`root` is the gateway's address without `/v1`; `instead` is what to do where no gateway runs."""
        self.root = root
        self._prefix = urlsplit(root).path
        self._client = client
        self._offline = offline
        self._instead = instead

    def get(self, *path: str, **query: object) -> Any:
        """What is at a path."""
        return self._send("GET", (*self.AREA, *path), query)

    def post(self, *path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Make or change something."""
        return self._send("POST", (*self.AREA, *path), {}, body)

    def delete(self, *path: str, **query: object) -> Any:
        """End something."""
        return self._send("DELETE", (*self.AREA, *path), query)

    def pages(self, *path: str, cursor: str, page_rows: int | None = None, **query: object) -> Iterator[dict[str, Any]]:
        """The pages of a list; `cursor` names the field of a page's last row behind which the next page begins."""
        after: object = None
        while True:
            page = self.get(*path, **query, limit=page_rows or self.PAGE_ROWS, after=after)
            yield page
            if not page["has_more"]:
                return
            after = page["data"][-1][cursor]

    def rows(self, *path: str, cursor: str, **query: Any) -> list[dict[str, Any]]:
        """All rows of a list."""
        return [row for page in self.pages(*path, cursor=cursor, **query) for row in page["data"]]

    def greeting(self) -> Any:
        """What the gateway tells every node of itself: among it, its public key."""
        return self._send("GET", ("nodes",), {})

    def _send(
        self, method: str, path: Sequence[str], query: Mapping[str, object], body: Mapping[str, Any] | None = None
    ) -> Any:
        named = {name: value for name, value in query.items() if value is not None}
        try:
            target = self._prefix + "/v1/" + "/".join(quote(segment, safe="") for segment in path)
            reply = self._client.send(method, f"{target}?{urlencode(named)}" if named else target, body)
            if reply.status == 200:
                return reply.json()
        except UnicodeEncodeError:
            raise click.ClickException("An argument is not UTF-8 text; nothing was changed.") from None
        except NoReply as error:
            raise SetupError(self._no_reply(error)) from None
        except ValueError:
            raise SetupError(f"{self._client.name} is no embedmesh gateway. Check --gateway.") from None
        raise self._refusal(reply)

    def _no_reply(self, error: NoReply) -> str:
        if self._offline or error.kind == "late":
            return f"{self._client.name}: {error}."
        if error.kind == "tls":
            return f"{error}."
        return (
            f"No gateway answers on {self._client.name} ({error}). Start it with `embedmesh serve`, or name another "
            f"with --gateway{self._instead}."
        )

    def _refusal(self, reply: HttpReply) -> click.ClickException:
        problem = read_problem(reply.status, reply.body)
        if problem.code == "model_not_found":
            return WrongUsage(f"{problem.message} `embedmesh models list` shows the models of a catalogue.")
        hint = ""
        if reply.status in (401, 403):
            hint = self.KEY_HINT
            if reply.status == 401:
                return ApiRefusal(f"{self._client.name} does not accept this key.{hint}", problem.code)
        elif reply.status in (404, 405) or problem.code == "unknown_parameter":
            hint = self._other_version()
        return ApiRefusal(problem.message + hint, problem.code)

    def _other_version(self) -> str:
        """A sentence where the gateway is of another version: it may not have the route that was asked for."""
        try:
            version = str(self._client.send("GET", self._prefix + "/openapi.json").json()["info"]["version"])[:32]
        except (NoReply, ValueError, TypeError, KeyError):
            return "" if self._offline else f" Is {self._client.name} an embedmesh gateway?"
        if version == __version__ or not version.isprintable():
            return ""
        return f" The gateway is embedmesh {version}, this command {__version__}: use the same version."


def operator_command(command: Command) -> Callable[..., None]:
    """Options of a command that takes an `Operator` first, over the network or with --offline; prints its result."""
    store = click.option(
        "--store",
        cls=SettingOption,
        envvar=ENV_PREFIX + "STORE",
        help="With --offline: a file, or postgresql://. Default: the one in the data folder.",
    )
    offline = click.option("--offline", is_flag=True, help="Open the store itself, where no gateway runs.")
    return _with_operator(command, (store, offline))


def gateway_command(command: Command) -> Callable[..., None]:
    """The same for commands that only a running gateway can answer."""
    return _with_operator(command, ())


def _with_operator(command: Command, more: tuple[Callable[..., Any], ...]) -> Callable[..., None]:
    instead = "; or open the store itself with --offline" if more else ""

    @prints_result
    @functools.wraps(command)
    def run(
        *,
        gateway: str | None,
        url: str | None,
        admin_key_file: Path | None,
        data_dir: Path,
        offline: bool = False,
        store: str | None = None,
        catalogue: Path | None = None,
        **given: Any,
    ) -> CommandResult | None:
        if offline and (gateway or url):
            raise WrongUsage("Give --gateway or --offline, not both.")
        opened = (
            _opened_store(data_dir, store, catalogue)
            if offline
            else _reached(gateway or url, admin_key_file, data_dir, instead)
        )
        with opened as operator:
            return command(operator, **given)

    made: Callable[..., None] = run
    for option in (
        *more,
        data_dir_option,
        click.option("--url", hidden=True),  # the name that --gateway had
        click.option(
            "--admin-key-file",
            type=click.Path(path_type=Path),
            help="File with a key that has the scope `admin`. Default: EMBEDMESH_ADMIN_KEY, else bootstrap.json's.",
        ),
        click.option("--gateway", help="http://HOST:PORT/v1. Default: EMBEDMESH_BASE_URL, else bootstrap.json's."),
    ):
        made = option(made)
    return made


@contextmanager
def _reached(url: str | None, key_file: Path | None, data_dir: Path, instead: str) -> Iterator[Operator]:
    access = find_gateway(url, key_file, data_dir, "admin")
    client = HttpClient(
        access.base_url,
        to_url(access.base_url),
        key=access.key,
        reply_s=ADMIN_REPLY_S,
        reply_bytes_max=ADMIN_REPLY_BYTES_MAX,
    )
    yield Operator(client, access.root, offline=False, instead=instead)


@contextmanager
def _opened_store(data_dir: Path, store: str | None, catalogue: Path | None) -> Iterator[Operator]:
    from embedmesh.commands.store_api import STORE_REPLY_S, store_api  # the server: half of the time of a start

    with store_api(data_dir, store, catalogue) as open_socket:
        client = HttpClient(
            "the store", over(open_socket), key="offline", reply_s=STORE_REPLY_S, reply_bytes_max=ADMIN_REPLY_BYTES_MAX
        )
        yield Operator(client, offline=True)
