"""The page at `/`: files of this package, as they are, under a strict content policy."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# Nothing but these files and this server's own paths; nobody else's page may frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/console.css": ("console.css", "text/css; charset=utf-8"),
    "/console.js": ("console.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def console_routes() -> list[Route]:
    return [Route(path, _file) for path in FILES]


async def _file(request: Request) -> Response:
    name, kind = FILES[request.url.path]
    data = (resources.files(__package__) / "page" / name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return Response(data, headers=headers | {"Content-Type": kind})
