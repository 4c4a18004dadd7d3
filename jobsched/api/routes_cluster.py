"""REST under /v1 about the cluster and the server: nodes, queues, health, metrics, a look inside, shutdown.

Each handler is one call of `service`; nothing is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import JsonValue
from starlette.concurrency import run_in_threadpool

from jobsched.api import openmetrics
from jobsched.api.routes_jobs import Body as Model
from jobsched.api.routes_jobs import WishBody
from jobsched.api.wire import dump, reply
from jobsched.core.answers import Check, NodeAnswer, QueueAnswer, UsageAnswer, Verification
from jobsched.errors import SpecError
from jobsched.load import load_job_dict, warnings
from jobsched.service import Service

SPACE_S = 5.0
"""A long answer begins with a space so often: JSON allows it, and it keeps the client from giving up."""


class CordonBody(WishBody):
    drain: bool = False
    """Also ask the node's attempts to save and move."""


class ValidateBody(Model):
    spec: dict[str, JsonValue]


def cluster_routes(service: Service, version: str, shutdown: Callable[[], None]) -> APIRouter:
    router = APIRouter(tags=["cluster"])

    @router.get("/v1/healthz")
    async def healthz() -> dict[str, Any]:
        """The server answers, and whether it is the one that leads. Needs no token."""
        return {"status": "ok", "version": version, "leader": service.live.leading}

    @router.get("/v1/version")
    def show_version() -> dict[str, str]:
        return {"version": version, "api": "v1"}

    @router.post("/v1/validate")
    def validate(body: ValidateBody) -> dict[str, list[dict[str, Any]]]:
        """Everything that is wrong with a spec, and what is legal but rarely meant; nothing is kept."""
        try:
            spec = load_job_dict(body.spec)
        except SpecError as exc:
            return {"problems": [asdict(p) for p in exc.problems], "warnings": []}
        return {"problems": [], "warnings": [asdict(p) for p in warnings(spec)]}

    @router.get("/v1/nodes")
    def nodes() -> Response:
        return reply(tuple[NodeAnswer, ...], service.nodes())

    @router.post("/v1/nodes/{name}/cordon")
    def cordon(name: str, body: Annotated[CordonBody | None, Body()] = None) -> Response:
        """Bind nothing new on the node, and with `drain` empty it."""
        wish = body or CordonBody()
        return reply(NodeAnswer, service.cordon(name, drain=wish.drain, by=wish.by))

    @router.post("/v1/nodes/{name}/uncordon")
    def uncordon(name: str, body: Annotated[WishBody | None, Body()] = None) -> Response:
        return reply(NodeAnswer, service.uncordon(name, by=(body or WishBody()).by))

    @router.get("/v1/queues")
    def queues() -> Response:
        return reply(tuple[QueueAnswer, ...], service.queues())

    @router.get("/v1/usage")
    def usage(since_ms: Annotated[int, Query(ge=0, le=1 << 60)] = 0) -> Response:
        """GPU-hours and waits by queue and user, of the jobs that live or ended since."""
        return reply(tuple[UsageAnswer, ...], service.usage(since_ms))

    @router.get("/v1/doctor")
    def doctor() -> Response:
        """What works, what does not, and what would help."""
        return reply(tuple[Check, ...], service.checkup.doctor())

    @router.get("/v1/debug/snapshot")
    def snapshot() -> dict[str, Any]:
        """The live cluster as JSON."""
        return service.checkup.snapshot()

    @router.get("/v1/debug/verify")
    async def verify() -> Response:
        """Replay the log and compare it with the projections. Reads everything: minutes for a million events."""
        work = asyncio.ensure_future(run_in_threadpool(service.checkup.verify))

        async def body() -> AsyncIterator[bytes]:
            while not (await asyncio.wait({work}, timeout=SPACE_S))[0]:
                yield b" "
            yield dump(Verification, work.result())

        return StreamingResponse(body(), media_type="application/json")

    @router.post("/v1/shutdown", status_code=202)
    def stop() -> dict[str, str]:
        """Stop the server; running jobs go on."""
        shutdown()
        return {"status": "stopping"}

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        """OpenMetrics text."""
        return PlainTextResponse(openmetrics.render(service), media_type=openmetrics.MEDIA_TYPE)

    return router
