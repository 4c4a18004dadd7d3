"""The HTTP application: routes, error bodies, gate and streams put together.

Called by `wiring` (and by tests, over ASGI). Handlers are plain functions in the thread pool, because the service
blocks; only streams are asynchronous. Knows no store and no backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from jobsched.api.auth import LOOPBACK, Guard
from jobsched.api.dashboard import dashboard_routes
from jobsched.api.reach import reach_routes
from jobsched.api.routes_cluster import cluster_routes
from jobsched.api.routes_jobs import job_routes
from jobsched.api.stream import Feed
from jobsched.api.wire import document
from jobsched.errors import JobschedError, UsageError
from jobsched.service import Service

ERROR_SCHEMA = {
    "type": "object",
    "required": ["code", "message", "hint"],
    "properties": {
        "code": {"type": "string", "examples": ["E300"]},
        "message": {"type": "string"},
        "hint": {"type": "string"},
        "problems": {"type": "array", "items": {"type": "object"}},
    },
}
HTTP_CODES = {404: "E300", 500: "E001"}
"""Codes of errors that the framework raises; the others are wrong use (E100)."""


@dataclass(frozen=True, slots=True)
class Application:
    """`asgi` is what to serve; `api` the FastAPI inside (for its OpenAPI document); `feed` ends the streams."""

    asgi: ASGIApp
    api: FastAPI
    feed: Feed


def create_app(
    service: Service,
    token: str,
    *,
    version: str,
    shutdown: Callable[[], None] = lambda: None,
    hosts: Iterable[str] | None = LOOPBACK,
) -> Application:
    """`shutdown` is called by POST /v1/shutdown; `hosts` are the Host headers that are served (None: any)."""
    feed = Feed(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with feed.running():
            yield

    api = FastAPI(
        title="jobsched",
        version=version,
        description="A GPU-aware scheduler for ML training jobs. Every call but the health check needs the bearer "
        "token that the server keeps in the file named in its `server.json`.",
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        responses={"default": {"description": "An error", "content": {"application/json": {"schema": ERROR_SCHEMA}}}},
    )
    api.openapi = lambda: document(api)  # type: ignore[method-assign]  # FastAPI's own way
    api.include_router(job_routes(service, feed))
    api.include_router(reach_routes(service))
    api.include_router(cluster_routes(service, version, shutdown))
    api.include_router(dashboard_routes())
    api.add_exception_handler(JobschedError, _on_error)
    api.add_exception_handler(RequestValidationError, _on_invalid)
    api.add_exception_handler(HTTPException, _on_http)
    api.add_exception_handler(Exception, _on_defect)
    return Application(Guard(api, token, hosts), api, feed)


def _operation_id(route: APIRoute) -> str:
    return route.name


def _on_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, JobschedError)
    return JSONResponse(exc.to_wire(), exc.http_status)


def _on_invalid(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    first, *rest = exc.errors()
    place = ".".join(str(part) for part in first["loc"])
    hint = f"and {len(rest)} more problems" if rest else ""
    return JSONResponse(UsageError(f"{place}: {first['msg']}", hint=hint).to_wire(), 422)


def _on_defect(request: Request, _: Exception) -> Response:
    """The framework raises the exception again after this answer, so that the gate logs it under the same id."""
    message = f"the server failed; look for {request.state.request_id} in its log"
    return _on_error(request, JobschedError(message, hint="this is a defect of jobsched; please report it"))


def _on_http(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    body = {"code": HTTP_CODES.get(exc.status_code, "E100"), "message": str(exc.detail), "hint": ""}
    return JSONResponse(body, exc.status_code, headers=exc.headers)
