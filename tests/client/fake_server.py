"""A server in memory that speaks the API of `jobsched.api` as far as the client needs: wire forms come from the same
value types, so a change of those breaks the client's tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from pydantic import TypeAdapter

from jobsched import errors
from jobsched.client.remote import Endpoint, Remote
from jobsched.core import answers as a
from jobsched.core import events as ev
from jobsched.core.job import Cause, FailureClass, Job, Phase, Reason
from jobsched.core.node import Gpu, Node
from jobsched.core.observation import Incident
from jobsched.core.resources import GpuId, JobId, NodeName, Resources
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec

TOKEN = "right-token"
ID = "01jd0000000000000000000001"
T0 = 1_767_225_600_000  # 2026-01-01T00:00:00Z
Reply = tuple[int, object] | httpx2.Response


def a_spec(**fields: Any) -> JobSpec:
    role = {"command": "python train.py", "replicas": 2, "gpu": "sim-gpu:1"}
    return JobSpec.model_validate({"name": "bert", "roles": {"worker": role}} | fields)


def a_job(**fields: Any) -> Job:
    given: dict[str, Any] = {
        "id": JobId(ID),
        "name": "bert",
        "owner": "ann",
        "spec": a_spec(),
        "submitted_at_ms": T0,
        "phase_since_ms": T0,
    }
    return Job(**given | fields)


def an_answer(
    phase: Phase = Phase.RUNNING, *, step: int = -1, headline: str = "", verdict: a.Verdict | None = None, **fields: Any
) -> a.JobAnswer:
    replicas = tuple(a.ReplicaProgress("worker", i, i, "n01", "running", ident=str(100 + i), step=step) for i in (0, 1))
    progress = a.JobProgress(step, 100, 2, (("loss", 0.5),), replicas) if step >= 0 else None
    return a.JobAnswer(a_job(phase=phase, **fields), progress, verdict, headline)


def a_failure() -> Cause:
    return Cause(
        Reason.EXIT_CODE,
        FailureClass.USER,
        "worker/1 exited with code 3",
        "worker",
        1,
        1,
        "n01",
        exit_code=3,
        tail=("Traceback <b>", "ValueError: no"),
    )


def a_verdict() -> a.Verdict:
    return a.Verdict(JobId(ID), (a.Why(Reason.RESOURCES, "needs 2 GPUs, 1 is free", "wait, or ask for 1"),), position=2)


def a_node(name: str = "n01") -> a.NodeAnswer:
    gpus = tuple(Gpu(GpuId(f"g{i}"), "sim-gpu", 2**34) for i in range(2))
    return a.NodeAnswer(Node(NodeName(name), 8_000, 2**35, gpus), Resources(4_000, 2**34, 1_000), 1)


ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def wire(value: object) -> Any:
    adapter = ADAPTERS.setdefault(type(value), ADAPTERS.get(type(value)) or TypeAdapter(type(value)))
    return json.loads(adapter.dump_json(value))


def sse(events: Iterable[tuple[str, object]], *, end: bool = True, event: str = "") -> httpx2.Response:
    """A whole event stream as one body; `events` are (id, data)."""
    text = ": connected\n\n"
    for seq, data in events:
        text += (
            (f"event: {event}\n" if event else "") + (f"id: {seq}\n" if seq else "") + f"data: {json.dumps(data)}\n\n"
        )
    text += "event: end\ndata: {}\n\n" if end else ""
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=text.encode())


def cut(events: Iterable[tuple[str, object]]) -> list[Any]:
    """A stream that breaks after these events, and a server that stays away: what an endless stream comes to in a
    test."""
    return [sse(events, end=False), *[httpx2.ConnectError("away")] * 1_000]


def refusal(error: errors.JobschedError) -> Reply:
    return error.http_status, error.to_wire()


@dataclass
class FakeServer:
    """`jobs` maps references to answers; `replies` overrides a route (`GET jobs/x/logs`) by a value, or by a list of
    replies given one after the other."""

    jobs: dict[str, a.JobAnswer] = field(default_factory=lambda: {ID: an_answer()})
    history: list[ev.Event] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    replies: dict[str, Any] = field(default_factory=dict)
    requests: list[httpx2.Request] = field(default_factory=list)

    def remote(self, token: str = TOKEN, **options: Any) -> Remote:
        endpoint = Endpoint("http://127.0.0.1:1", token, "the test")
        return Remote(endpoint, transport=httpx2.MockTransport(self.handle), **options)

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        path = request.url.path.removeprefix("/v1/")
        if path != "healthz" and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return httpx2.Response(401, json=errors.AuthError("a token is needed").to_wire())
        return self._response(self._reply(f"{request.method} {path}", request))

    def sent(self, route: str) -> Any:
        """Body of the last request to a route."""
        method, path = route.split(" ")
        found = [r for r in self.requests if r.method == method and r.url.path == f"/v1/{path}"]
        return json.loads(found[-1].content)

    def _reply(self, route: str, request: httpx2.Request) -> Any:
        if route in self.replies:
            reply = self.replies[route]
            return reply.pop(0) if isinstance(reply, list) else reply
        method, _, path = route.partition(" ")
        parts = path.split("/")
        if parts[0] == "jobs" and len(parts) > 1:
            return self._about_job(method, parts[1], parts[2:])
        fixed: dict[str, Callable[[], object]] = {
            "GET jobs": lambda: {"jobs": [wire(j) for j in self.jobs.values()], "more": False},
            "POST jobs": lambda: (201, {"jobs": [wire(j) for j in self.jobs.values()], "more": False}),
            "GET nodes": lambda: [wire(a_node())],
            "GET queues": lambda: [wire(a.QueueAnswer(QueueSpec(), 3, 1, 2.5))],
            "GET version": lambda: {"version": "9.9", "api": "v1"},
            "GET healthz": lambda: {"status": "ok", "version": "9.9", "leader": True},
            "GET doctor": lambda: [wire(a.Check("store", True, "7 events"))],
            "GET debug/verify": lambda: wire(a.Verification(True, 7, 1)),
            "GET debug/snapshot": lambda: {"seq": 7},
            "POST plan": lambda: wire(a.PlanAnswer(10, (a.RolePlan("worker", 2, "1×sim-gpu", ("n01",)),), a_verdict())),
            "GET progress": lambda: sse([("", wire(j)) for j in self.jobs.values()]),
            "GET events": lambda: sse(self.stored()),
        }
        if route in fixed:
            return fixed[route]()
        if parts[0] == "nodes":
            return wire(a_node(parts[1]))
        return refusal(errors.NotFound(f"no route {route}"))

    def _about_job(self, method: str, ref: str, rest: list[str]) -> Any:
        ref = next(iter(self.jobs)) if ref == "@last" else ref
        found = next((j for k, j in self.jobs.items() if k.startswith(ref) or j.job.name == ref), None)
        if found is None:
            return refusal(errors.NotFound(f"there is no job {ref!r}", hint="'jobsched jobs -a' lists every job"))
        match rest:
            case []:
                return wire(found)
            case ["why"]:
                story = ("submitted by ann", "attempt 1 placed on n01")
                warnings = tuple(one for one in self.incidents if one.warning)
                return wire(a.WhyAnswer(found.job, found.headline or "waits", found.verdict, story, warnings))
            case ["events"]:
                return [data for _, data in self.stored()]
            case ["incidents"]:
                return [wire(one) for one in self.incidents]
            case ["samples"]:
                return [
                    {
                        "job_id": ID,
                        "at_ms": T0,
                        "attempt": 1,
                        "step": 90,
                        "total": 100,
                        "world_size": 2,
                        "metrics": [["accuracy", 0.97]],
                    }
                ]
            case ["logs"]:
                return sse([("", a_line(n)) for n in range(3)])
            case [_] if method == "POST":
                return wire(found)
        raise AssertionError(rest)

    def stored(self) -> list[tuple[str, object]]:
        return [(str(n), {"seq": n, "event": json.loads(ev.EVENT.dump_json(e))}) for n, e in enumerate(self.history, 1)]

    @staticmethod
    def _response(reply: Any) -> httpx2.Response:
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, httpx2.Response):
            return reply
        status, body = reply if isinstance(reply, tuple) else (200, reply)
        return httpx2.Response(status, json=body)


def a_line(n: int, **fields: Any) -> dict[str, Any]:
    return {
        "role": "worker",
        "index": 0,
        "rank": 0,
        "attempt": 1,
        "restart": 0,
        "offset": n * 10,
        "text": f"line {n}",
    } | fields


def a_history() -> list[ev.Event]:
    """Submitted, placed, started: the beginning of every job."""
    from jobsched.core.job import Binding, ReplicaId

    places = (
        Binding("worker", 0, NodeName("n01"), ports=(20_000, 20_001)),
        Binding("worker", 1, NodeName("n01"), ports=(20_002,)),
    )
    job = JobId(ID)
    return [
        ev.JobSubmitted(T0, job, "bert", "ann", a_spec(), "r1"),
        ev.AttemptPlaced(T0 + 1_000, job, 1, places, 20_001),
        ev.ReplicasStarted(T0 + 2_000, job, 1, (ReplicaId("worker/0"), ReplicaId("worker/1"))),
        ev.AttemptStarted(T0 + 3_000, job, 1),
    ]
