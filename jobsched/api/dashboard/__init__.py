"""The dashboard: one static page, one script and one style sheet, which use the same REST API as everybody else.

Called by `app`. The files hold no data, so they are served without a token; the script asks for the token and sends it
with every request. Nothing is rendered on the server.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from fastapi import APIRouter, Response

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
}


def dashboard_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in FILES.items():
        router.add_api_route(path, _serve(name, media_type), methods=["GET", "HEAD"], name=name)
    return router


def _serve(name: str, media_type: str) -> Callable[[], Response]:
    def serve() -> Response:
        return Response(files(__package__).joinpath(name).read_bytes(), media_type=media_type)

    return serve
