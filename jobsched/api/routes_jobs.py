"""REST under /v1 about jobs: submit, find, watch, wish. Each handler is one call of `service`; nothing is decided here.

The bodies are the values of `core.answers` in their pydantic form; there is no second set of API types.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from starlette.concurrency import run_in_threadpool

from jobsched.api.stream import Feed
from jobsched.api.wire import reply
from jobsched.core.answers import CheckpointAnswer, EditAnswer, JobAnswer, JobPage, PlanAnswer, WhyAnswer
from jobsched.core.events import Stored
from jobsched.core.job import Phase
from jobsched.core.observation import Incident
from jobsched.core.resources import JobId
from jobsched.errors import UsageError
from jobsched.load import load_job_dict
from jobsched.logs import Selection
from jobsched.ports import JobQuery, Sample
from jobsched.service import LIVE, IfExists, Service
from jobsched.spec.job import JobSpec

STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
"""OpenAPI of an endless answer."""
NO_BUFFER = {"x-accel-buffering": "no"}

Text = Annotated[str, Field(max_length=256)]
Owner = Annotated[str, Query(max_length=256, description="Whose newest job `@last` means; empty: anybody's")]
Seq = Annotated[int, Query(ge=0, le=2**62)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _loaded(value: object) -> object:
    """The one reader of specs: it knows every form of a spec, and tells every problem with its field and a hint."""
    return load_job_dict(value) if isinstance(value, dict) else value


class PlanBody(Body):
    spec: Annotated[JobSpec, BeforeValidator(_loaded)]
    owner: Text = ""


class SubmitBody(PlanBody):
    request_id: Text = ""
    """Idempotency key: the same one gives the same job."""
    hold: bool = False
    if_exists: IfExists = ""
    """What to do when a live job of this owner has the name."""


class WishBody(Body):
    by: Text = ""


class HoldBody(WishBody):
    stop: bool = False
    """Also stop a running attempt, after a checkpoint."""


class ScaleBody(WishBody):
    wanted: dict[Text, Annotated[int, Field(ge=0, le=1_000_000)]]


class PriorityBody(WishBody):
    priority: Annotated[int, Field(strict=True, ge=-1_000_000, le=1_000_000)] | Text


class SpecBody(WishBody):
    spec: Annotated[JobSpec, BeforeValidator(_loaded)]


class ChangesBody(WishBody):
    changes: dict[Annotated[str, Field(max_length=1_024)], JsonValue] = Field(max_length=1_000)
    """Path of a field (`roles.worker.image`) -> its new value, as with `--set`."""


DryRun = Annotated[bool, Query(description="Only say what would change")]
IfMatch = Annotated[str, Header(max_length=32, description="The ETag that the spec must still have")]


def job_routes(service: Service, feed: Feed) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["jobs"])

    @router.post("/jobs", status_code=201)
    def submit(body: SubmitBody) -> Response:
        """Queue a job; an array gives one job per member."""
        page = service.submit(
            body.spec, owner=body.owner, request_id=body.request_id, hold=body.hold, if_exists=body.if_exists
        )
        return reply(JobPage, page, 201)

    @router.post("/plan")
    def plan(body: PlanBody) -> Response:
        """Where and when a job would run, and who would give way; changes nothing."""
        return reply(PlanAnswer, service.plan(body.spec, owner=body.owner))

    @router.get("/jobs")
    def jobs(
        state: Annotated[str, Query(max_length=200, description="Phases, separated by commas")] = "",
        queue: Annotated[str, Query(max_length=256)] = "",
        owner: Annotated[str, Query(max_length=256)] = "",
        name: Annotated[str, Query(max_length=256)] = "",
        label: Annotated[tuple[str, ...], Query(max_length=32, description="key=value, repeatable")] = (),
        array: Annotated[str, Query(max_length=64)] = "",
        since_ms: Seq = 0,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
        before: Annotated[str, Query(max_length=64, description="Id of the last job of the page before")] = "",
        all: Annotated[bool, Query(description="Ended jobs, too; implied by `state`")] = False,
    ) -> Response:
        """Jobs, newest first; live ones only unless asked otherwise."""
        query = JobQuery(
            phases=_phases(state) or (() if all else LIVE), queue=queue, owner=owner, name=name, array_id=array.lower(),
            labels=tuple(_label(text) for text in label), submitted_after_ms=since_ms,
            before=JobId(before.lower()) if before else None, limit=limit,
        )  # fmt: skip
        return reply(JobPage, service.jobs(query))

    @router.get("/jobs/{ref}")
    def job(ref: str, owner: Owner = "") -> Response:
        """One job, by id, unique id prefix, name (the newest so called) or `@last`."""
        return reply(JobAnswer, service.get(ref, owner=owner))

    @router.get("/jobs/{ref}/why")
    def why(ref: str, owner: Owner = "", at_ms: Seq = 0) -> Response:
        """Why the job is where it is, and its story; with `at_ms`, as it was at that instant."""
        return reply(WhyAnswer, service.why(ref, owner=owner, at_ms=at_ms))

    @router.get("/jobs/{ref}/events")
    def job_events(
        ref: str, after: Seq = 0, limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000, owner: Owner = ""
    ) -> Response:
        """The job's events, in order."""
        return reply(tuple[Stored, ...], tuple(service.events(ref, after=after, limit=limit, owner=owner)))

    @router.get("/jobs/{ref}/incidents")
    def incidents(ref: str, owner: Owner = "") -> Response:
        """What the engine says of the job's replicas and their nodes, as far as it remembers: oldest first."""
        return reply(tuple[Incident, ...], tuple(service.incidents(ref, owner=owner)))

    @router.get("/jobs/{ref}/samples")
    def samples(ref: str, limit: Annotated[int, Query(ge=1, le=10_000)] = 1_000, owner: Owner = "") -> Response:
        """Samples of the job's progress, newest last."""
        return reply(tuple[Sample, ...], tuple(service.samples(ref, limit=limit, owner=owner)))

    @router.get("/jobs/{ref}/logs", response_class=StreamingResponse, responses=STREAM)
    async def logs(
        ref: str,
        role: Annotated[str, Query(max_length=64)] = "",
        index: Annotated[int | None, Query(ge=0, le=1_000_000)] = None,
        rank: Annotated[int | None, Query(ge=0, le=1_000_000)] = None,
        attempt: Annotated[int | None, Query(ge=0, le=1_000_000, description="0: all; default: the last")] = None,
        follow: bool = False,
        tail: Annotated[int | None, Query(ge=0, le=100_000, description="Last lines of each replica")] = None,
        grep: Annotated[str, Query(max_length=1_000, description="Only lines that hold this text")] = "",
        owner: Owner = "",
    ) -> StreamingResponse:
        """Log lines of the chosen replicas, as `LogLine`s; `event: end` after the last one."""
        selection = Selection(role, index, rank, attempt, grep)
        batches = await run_in_threadpool(service.logs, ref, selection, follow=follow, tail=tail, owner=owner)
        return stream(feed.lines(batches, await feed.next_batch(batches)))

    @router.post("/jobs/{ref}/cancel")
    def cancel(ref: str, body: WishBody | None = None, owner: Owner = "") -> Response:
        """End the job. Asking twice is fine."""
        return reply(JobAnswer, service.cancel(ref, by=(body or WishBody()).by, owner=owner))

    @router.post("/jobs/{ref}/hold")
    def hold(ref: str, body: HoldBody | None = None, owner: Owner = "") -> Response:
        """Keep the job from starting, and with `stop` suspend it."""
        wish = body or HoldBody()
        return reply(JobAnswer, service.hold(ref, stop=wish.stop, by=wish.by, owner=owner))

    @router.post("/jobs/{ref}/release")
    def release(ref: str, body: WishBody | None = None, owner: Owner = "") -> Response:
        """Let a held job start, or end its backoff."""
        return reply(JobAnswer, service.release(ref, by=(body or WishBody()).by, owner=owner))

    @router.post("/jobs/{ref}/restart")
    def restart(ref: str, body: WishBody | None = None, owner: Owner = "") -> Response:
        """Start the job anew, from its last checkpoint."""
        return reply(JobAnswer, service.restart(ref, by=(body or WishBody()).by, owner=owner))

    @router.post("/jobs/{ref}/checkpoint")
    def checkpoint(ref: str, owner: Owner = "") -> Response:
        """Ask the job's replicas to save now, and go on. What they save is told by `CheckpointSaved`."""
        return reply(CheckpointAnswer, service.checkpoint(ref, owner=owner))

    @router.post("/jobs/{ref}/scale")
    def scale(ref: str, body: ScaleBody, owner: Owner = "") -> Response:
        """Change how many replicas elastic roles have."""
        return reply(JobAnswer, service.scale(ref, body.wanted, by=body.by, owner=owner))

    @router.post("/jobs/{ref}/priority")
    def priority(ref: str, body: PriorityBody, owner: Owner = "") -> Response:
        """Change the job's priority within its queue."""
        return reply(JobAnswer, service.set_priority(ref, body.priority, by=body.by, owner=owner))

    @router.get("/jobs/{ref}/spec")
    def spec(ref: str, owner: Owner = "") -> Response:
        """What the job runs by, or will from its next attempt on. Its ETag changes with every edit."""
        job = service.resolve(ref, owner=owner)
        return reply(JobSpec, job.next_spec or job.spec, tag=job.edits)

    @router.put("/jobs/{ref}/spec")
    def replace_spec(
        ref: str, body: SpecBody, owner: Owner = "", dry_run: DryRun = False, if_match: IfMatch = ""
    ) -> Response:
        """Another spec for the job: what can be is changed in place, anything else holds from the next attempt on,
        which a running one makes room for after it has saved. The same again changes nothing."""
        answer = service.edit(
            ref, body.spec, by=body.by, owner=owner, expected=_edits(if_match), dry_run=dry_run
        )
        return reply(EditAnswer, answer, tag=answer.job.edits)

    @router.patch("/jobs/{ref}/spec")
    def change_spec(
        ref: str, body: ChangesBody, owner: Owner = "", dry_run: DryRun = False, if_match: IfMatch = ""
    ) -> Response:
        """As PUT, for some fields."""
        answer = service.edit(
            ref, body.changes, by=body.by, owner=owner, expected=_edits(if_match), dry_run=dry_run
        )
        return reply(EditAnswer, answer, tag=answer.job.edits)

    @router.get("/events", response_class=StreamingResponse, responses=STREAM)
    async def events(
        after: Annotated[int | None, Query(ge=0, le=2**62)] = None,
        job: Annotated[str, Query(max_length=256)] = "",
        last_event_id: Annotated[str, Header(max_length=32)] = "",
    ) -> StreamingResponse:
        """Events as they are folded, `id:` being their seq. Goes on after `Last-Event-ID`, else after `after`, else
        from the job's beginning, or from now where no job is named. The stream of one job ends with it."""
        job_id = (await run_in_threadpool(service.resolve, job)).id if job else None
        if last_event_id.isascii() and last_event_id.isdigit():
            after = int(last_event_id)
        last = await run_in_threadpool(service.last_seq)
        if after is None:
            after = 0 if job_id else last
        return stream(feed.events(min(after, last), job_id))  # beyond the end: the reader knew another log

    @router.get("/progress", response_class=StreamingResponse, responses=STREAM)
    async def progress(job: Annotated[str, Query(max_length=256)] = "") -> StreamingResponse:
        """`JobAnswer`s whenever phase or progress change, at most five times a second; of every active job if none is
        named."""
        job_id = (await run_in_threadpool(service.resolve, job)).id if job else None
        return stream(feed.progress(job_id))

    return router


def stream(frames: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(frames, media_type="text/event-stream", headers=NO_BUFFER)


def _phases(text: str) -> tuple[Phase, ...]:
    try:
        return tuple(Phase(part.strip().upper()) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{text!r} is not a list of phases", hint=f"phases: {', '.join(Phase)}") from None


def _edits(if_match: str) -> int | None:
    plain = if_match.removeprefix("W/").strip('"')
    if plain in ("", "*"):
        return None
    if not plain.isascii() or not plain.isdigit():
        raise UsageError(f"If-Match {if_match!r} is none of our ETags", hint="GET the spec; its answer has one")
    return int(plain)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is not a label selection", hint="write key=value")
    return key, value
