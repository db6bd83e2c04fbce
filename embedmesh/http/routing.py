"""Finds the route of a path, or the nearest one where the path is misspelled."""

import difflib
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

from aiohttp import web

GUESSED_CHARS_MAX = 64  # of an unknown path; the nearest route is found in a tenth of a millisecond
SIMILARITY_MIN = 0.7  # of an unknown path and the route that is suggested; from 0 to 1

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Methods = Mapping[str, Handler]
Routes = Mapping[str, Methods]
"""Path -> method -> handler. A `*` in a path, at its end or between, takes what is there: slashes, but not nothing.

HEAD is answered wherever GET is.
"""

PATH_REMAINDER = web.RequestKey("path_remainder", str)  # what the path has in place of a route's `*`


class RouteTable:
    """Routes with their aliases, by path."""

    def __init__(self, routes: Routes, other_paths: Mapping[str, str]) -> None:
        """`other_paths`: alias -> path of a route; that of a route which is not here is no path."""
        every = {path: _with_head(methods) for path, methods in routes.items()}
        self._names = [path for path in every if "*" not in path and path != "/"]
        self._routes = {id(methods): path for path, methods in every.items()}
        every |= {path: every[of] for path, of in other_paths.items() if of in every}
        self._exact = {path: methods for path, methods in every.items() if "*" not in path}
        starred = [(*path.partition("*"), methods) for path, methods in every.items() if "*" in path]
        self._starred = sorted(starred, key=lambda row: -len(row[2]))  # /keys/*/rotate before /keys/*

    def find(self, path: str) -> tuple[Methods, str | None] | None:
        """The methods of the path, and what it has in place of the route's `*`, if any. None for an unknown path."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods, None
        for before, _, after, methods in self._starred:
            end = len(path) - len(after)
            if path.startswith(before) and path.endswith(after) and end > len(before):
                return methods, unquote(path[len(before) : end])
        return None

    def route_of(self, methods: Methods) -> str:
        """The route whose methods `find` has found, as it was given: not an alias."""
        return self._routes[id(methods)]

    def meant(self, path: str, method: str) -> str | None:
        """The method and path of the nearest route; None if none is near."""
        wrapped = [name for name in self._names if path.endswith(name)]  # it has all of it, behind something else
        asked = path[:GUESSED_CHARS_MAX].lower()
        near = wrapped or difflib.get_close_matches(asked, self._names, 1, SIMILARITY_MIN)
        if not near:
            return None
        name = max(near, key=len)
        methods = self._exact[name]
        return f"{method if method in methods else next(iter(methods))} {name}"


def _with_head(methods: Methods) -> Methods:
    return {**methods, "HEAD": methods["GET"]} if "GET" in methods else methods
