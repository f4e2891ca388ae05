"""The web page's files, served from memory: plain ES modules, nothing from elsewhere."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import resources

from fastapi import FastAPI, Request
from starlette.responses import Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
FILES = (
    *("index.html", "style.css", "icon.svg", "app.js", "api.js", "chat.js", "playground.js"),
    *("status.js", "markdown.js", "highlight.js"),
)
PATHS = frozenset({"/", "/favicon.ico", *(f"/web/{name}" for name in FILES)})

# The page runs its own scripts only, whatever a model writes into it.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@lru_cache
def _file(name: str) -> tuple[bytes, str]:
    """Contents and ETag."""
    data = (resources.files("dsq.runtime.server") / "web" / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:16]}"'


def _answer(name: str, request: Request) -> Response:
    data, tag = _file(name)
    headers = {**_HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)


def add_routes(api: FastAPI) -> None:
    @api.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _answer("index.html", request)

    @api.get("/favicon.ico", include_in_schema=False)
    async def icon(request: Request) -> Response:
        return _answer("icon.svg", request)

    def add(name: str) -> None:
        @api.get(f"/web/{name}", include_in_schema=False)
        async def one(request: Request) -> Response:
            return _answer(name, request)

    for name in FILES:
        add(name)
