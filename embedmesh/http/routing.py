"""Which route a path is, and which one somebody may have meant whose path is none."""

import difflib
from collections.abc import Mapping
from typing import Generic, TypeVar
from urllib.parse import unquote

GUESSED_CHARS_MAX = 64  # of a path that is none; what was meant is found in a tenth of a millisecond
ALIKE = 0.7  # from 0 to 1

T = TypeVar("T")


class RouteTable(Generic[T]):
    """Path -> method -> handler. A `*` takes what is in its place; HEAD is wherever GET is."""

    def __init__(self, routes: Mapping[str, Mapping[str, T]], other_paths: Mapping[str, str]) -> None:
        """`other_paths` lead to some of the routes, too."""
        every = {path: _with_head(methods) for path, methods in routes.items()}
        self._names = [path for path in every if "*" not in path and path != "/"]
        every |= {path: every[of] for path, of in other_paths.items()}
        self._exact = {path: methods for path, methods in every.items() if "*" not in path}
        starred = [(*path.partition("*"), methods) for path, methods in every.items() if "*" in path]
        self._starred = sorted(starred, key=lambda row: -len(row[2]))  # /keys/*/rotate before /keys/*

    def find(self, path: str) -> tuple[Mapping[str, T], str | None] | None:
        """The methods of the path, and what it has in place of the star where there is one."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods, None
        for before, _, after, methods in self._starred:
            end = len(path) - len(after)
            if path.startswith(before) and path.endswith(after) and end > len(before):
                return methods, unquote(path[len(before) : end])
        return None

    def meant(self, path: str, method: str) -> str | None:
        """The method and path that are nearest to these; None where none is near."""
        near = difflib.get_close_matches(path[:GUESSED_CHARS_MAX].lower(), self._names, 1, ALIKE)
        if not near:
            return None
        methods = self._exact[near[0]]
        return f"{method if method in methods else next(iter(methods))} {near[0]}"


def _with_head(methods: Mapping[str, T]) -> Mapping[str, T]:
    return {**methods, "HEAD": methods["GET"]} if "GET" in methods else methods
