"""REST over ASGI: bodies, statuses, errors; and schemathesis over the whole of it."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from pydantic import TypeAdapter

from jobsched.api import routes_cluster
from jobsched.api.app import create_app
from jobsched.core.answers import JobAnswer, JobPage
from jobsched.core.events import Stored
from jobsched.core.job import Phase
from jobsched.errors import all_errors
from jobsched.logs import MAX_FOLLOWED
from jobsched.ports import JobQuery, Sample
from tests.api.conftest import TOKEN, Api
from tests.stage import Stage, a_spec

SPEC = a_spec().model_dump(mode="json")


def answer(data: bytes) -> JobAnswer:
    return TypeAdapter(JobAnswer).validate_json(data)


def test_health_and_version(api: Api) -> None:
    assert api.http.get("/v1/healthz", headers={"Authorization": ""}).json() == {
        "status": "ok", "version": "1.2.3", "leader": True,
    }  # fmt: skip
    assert api.http.get("/v1/version").json() == {"version": "1.2.3", "api": "v1"}


def test_a_job_goes_in_and_comes_out_as_the_same_value(api: Api) -> None:
    response = api.http.post("/v1/jobs", json={"spec": SPEC, "owner": "ann", "request_id": "r"})
    assert response.status_code == 201
    job = TypeAdapter(JobPage).validate_json(response.content).jobs[0].job
    assert job.spec == a_spec()
    assert job == api.stage.job(job.id) == answer(api.http.get(f"/v1/jobs/{job.id}").content).job
    assert api.http.post("/v1/jobs", json={"spec": SPEC, "owner": "ann", "request_id": "r"}).json() == response.json()
    assert api.http.get("/v1/jobs/bert/why").json()["story"]


def test_lists_are_filtered_and_paged(api: Api) -> None:
    done = api.stage.end(api.stage.run(api.stage.submit(name="done")))
    jobs = [api.stage.submit(labels={"team": "nlp"}) for _ in range(3)]

    def ids(**params: object) -> list[str]:
        return [a["job"]["id"] for a in api.http.get("/v1/jobs", params=params).json()["jobs"]]  # type: ignore[arg-type]

    newest_first = [job.id for job in reversed(jobs)]
    assert ids() == newest_first
    assert ids(all=True) == [*newest_first, done.id]
    assert ids(state="succeeded,failed") == [done.id]
    assert ids(label="team=nlp", name="bert", owner="ann", limit=2) == newest_first[:2]
    assert ids(before=newest_first[0]) == newest_first[1:]
    assert ids(owner="bob") == ids(queue="other") == ids(label="team=cv") == []
    assert api.http.get("/v1/jobs", params={"state": "DONE"}).json()["code"] == "E100"
    assert api.http.get("/v1/jobs", params={"label": "x"}).status_code == 400


def test_wishes(api: Api) -> None:
    job = api.stage.submit(roles={"worker": {"command": "x", "replicas": "1..3"}})

    def post(verb: str, **body: object) -> JobAnswer:
        response = api.http.post(f"/v1/jobs/bert/{verb}", json=body)
        assert response.status_code == 200, response.text
        return answer(response.content)

    assert post("hold", stop=True).job.held
    assert not post("release").job.held
    assert post("scale", wanted={"worker": 2}).job.wanted == {"worker": 2}
    assert post("priority", priority=5).job.priority == 5
    api.stage.run(job)
    assert post("restart").job.stop_wish
    assert post("cancel", by="ann").job.cancel_by == "ann"
    assert answer(api.http.post("/v1/jobs/bert/cancel").content).job.cancel_by == "ann"  # a body is not needed
    assert api.http.post("/v1/jobs/bert/scale", json={"wanted": {"worker": 9}}).json()["message"].endswith("not 9")


def test_a_spec_is_replaced_and_changed_with_tags(api: Api) -> None:
    job = api.stage.submit()
    path = f"/v1/jobs/{job.id}/spec"
    found = api.http.get(path)
    assert (found.headers["etag"], found.json()["name"]) == ('"0"', "bert")
    would = api.http.patch(path, params={"dry_run": True}, json={"changes": {"priority": 3}}).json()
    assert (would["fields"], would["job"]["priority"]) == (["priority"], 0)
    changed = api.http.patch(path, headers={"If-Match": '"0"'}, json={"changes": {"priority": 3}, "by": "ann"})
    assert (changed.headers["etag"], changed.json()["job"]["priority"]) == ('"1"', 3)
    stale = api.http.put(path, headers={"If-Match": '"0"'}, json={"spec": {**found.json(), "priority": 4}})
    assert (stale.status_code, stale.json()["code"]) == (409, "E500")
    spec = api.http.get(path).json()
    put = api.http.put(path, headers={"If-Match": '"1"'}, json={"spec": {**spec, "labels": {"a": "b"}}})
    assert (put.json()["fields"], put.json()["restart"]) == (["labels"], False)
    assert api.http.put(path, json={"spec": {**spec, "labels": {"a": "b"}}}).json()["fields"] == []
    wrong = api.http.put(path, json={"spec": {"roles": 1}})
    assert (wrong.status_code, wrong.json()["problems"][0]["field"]) == (422, "roles")
    assert api.http.patch(path, headers={"If-Match": "x"}, json={"changes": {}}).status_code == 400


def test_events_and_samples(api: Api) -> None:
    job = api.stage.run(api.stage.submit())
    api.stage.store.add_samples([Sample(job.id, 1, 1, 10, 100, 1, (("loss", 0.5),))])
    events = TypeAdapter(tuple[Stored, ...]).validate_json(api.http.get("/v1/jobs/bert/events").content)
    assert [stored.event.kind for stored in events] == [
        "JobSubmitted", "AttemptPlaced", "ReplicasStarted", "AttemptStarted",
    ]  # fmt: skip
    later = api.http.get("/v1/jobs/bert/events", params={"after": events[1].seq, "limit": 1}).json()
    assert [item["seq"] for item in later] == [events[2].seq]
    assert api.http.get("/v1/jobs/bert/samples").json()[0]["step"] == 10


def test_nodes_and_queues(api: Api) -> None:
    assert api.http.get("/v1/nodes").json()[0]["free_gpus"] == 4
    assert api.http.post("/v1/nodes/n1/cordon", json={"drain": True}).json()["state"] == "draining"
    assert api.http.post("/v1/nodes/n1/uncordon").json()["state"] == "ready"
    assert api.http.get("/v1/queues").json()[0]["queue"]["name"] == "default"
    assert {c["name"] for c in api.http.get("/v1/doctor").json()} >= {"store", "backend", "nodes"}


def test_looking_inside(api: Api) -> None:
    api.stage.run(api.stage.submit())
    assert api.http.get("/v1/debug/verify").json()["ok"]
    assert len(api.http.get("/v1/debug/snapshot").json()["jobs"]) == 1


def test_a_long_verification_keeps_the_client_waiting(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    verify, looks, told = api.stage.service.checkup.verify, [], threading.Event()

    async def wait(*args: Any, **options: Any) -> Any:
        found = await asyncio.wait(*args, **options)
        looks.append(found)
        if len(looks) == 3:
            told.set()
        return found

    monkeypatch.setattr(routes_cluster, "SPACE_S", 0.01)
    monkeypatch.setattr(routes_cluster, "asyncio", SimpleNamespace(wait=wait, ensure_future=asyncio.ensure_future))
    monkeypatch.setattr(api.stage.service.checkup, "verify", lambda: (told.wait(60), verify())[1])
    response = api.http.get("/v1/debug/verify")
    assert response.content.startswith(b"   ")
    assert response.json()["ok"]


def test_shutdown_is_passed_on(api: Api) -> None:
    assert api.http.post("/v1/shutdown").json() == {"status": "stopping"}
    assert api.stopped == [True]


def test_plan_and_validate(api: Api) -> None:
    assert api.http.post("/v1/plan", json={"spec": SPEC}).json()["code"] == 0
    assert api.http.post("/v1/validate", json={"spec": SPEC}).json()["problems"] == []
    problems = api.http.post("/v1/validate", json={"spec": {"roles": {}, "que": "x"}}).json()["problems"]
    assert "que" in {problem["field"] for problem in problems}
    assert api.stage.store.last_seq() == Stage().store.last_seq()


# ---- errors ----


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/jobs/nothing", None, 404, "E300"),
        ("GET", "/v1/jobs/nothing/logs", None, 404, "E300"),
        ("GET", "/v1/jobs/wide/logs?follow=true", None, 400, "E100"),
        ("GET", "/v1/events?job=nothing", None, 404, "E300"),
        ("GET", "/v1/progress?job=nothing", None, 404, "E300"),
        ("GET", "/nowhere", None, 404, "E300"),
        ("DELETE", "/v1/jobs", None, 405, "E100"),
        ("POST", "/v1/jobs", {"spec": {**SPEC, "queue": "other"}}, 404, "E300"),
        ("POST", "/v1/jobs", {"spec": {**SPEC, "nope": 1}}, 422, "E200"),
        ("POST", "/v1/jobs", {"spec": {**SPEC, "roles": {"w": {"command": "x", "gpu": "any:64"}}}}, 422, "E217"),
        ("POST", "/v1/jobs", {"spec": SPEC, "nope": 1}, 422, "E100"),
        ("POST", "/v1/jobs", {"spec": SPEC, "if_exists": "maybe"}, 422, "E100"),
        ("POST", "/v1/jobs", [], 422, "E100"),
        ("GET", "/v1/jobs?limit=0", None, 422, "E100"),
        ("POST", "/v1/nodes/n9/cordon", {}, 404, "E300"),
    ],
)
def test_errors_have_one_form(api: Api, method: str, path: str, body: object, status: int, code: str) -> None:
    if "wide" in path:
        roles = {"worker": {"command": "x", "replicas": MAX_FOLLOWED + 1, "cpu": "1m"}}
        api.stage.run(api.stage.submit(name="wide", roles=roles))
    response = api.http.request(method, path, json=body)
    wire = response.json()
    assert (response.status_code, wire["code"]) == (status, code), wire
    assert set(wire) >= {"code", "message", "hint"}
    assert wire["message"]
    assert code in all_errors()


def test_every_problem_of_a_spec_is_told_with_its_field(api: Api) -> None:
    spec = {"roles": {"worker": {"command": "x", "cpu": "many"}}, "priority": "very high", "nmae": "x"}
    problems = api.http.post("/v1/jobs", json={"spec": spec}).json()["problems"]
    assert {problem["field"] for problem in problems} == {"roles.worker.cpu", "priority", "nmae"}


def test_a_body_that_is_no_json_is_refused(api: Api) -> None:
    for data in (b"{", b"\xff", b"[" * 100_000):
        response = api.http.post("/v1/jobs", content=data, headers={"Content-Type": "application/json"})
        assert response.status_code in (400, 422)
        assert response.json()["code"] == "E100"


def test_a_defect_becomes_a_500_without_a_traceback(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("inner detail")

    monkeypatch.setattr(api.stage.service, "nodes", broken)
    response = api.http.get("/v1/nodes")
    assert (response.status_code, response.json()["code"]) == (500, "E001")
    assert response.headers["x-request-id"] in response.json()["message"]
    assert "inner detail" not in response.text


def test_an_unread_cluster_is_a_matter_of_waiting(api: Api) -> None:
    api.stage.live.cluster.queues.clear()
    assert api.http.post("/v1/jobs", json={"spec": SPEC}).status_code == 503


# ---- metrics ----


def test_metrics_are_openmetrics_with_bounded_labels(api: Api) -> None:
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    api.stage.run(api.stage.submit())
    api.stage.submit(name="waits")
    families = {f.name: f for f in text_string_to_metric_families(api.http.get("/metrics").text)}

    def value(family: str, **labels: str) -> float:
        return next(s.value for s in families[family].samples if s.labels == labels)

    assert value("jobsched_jobs", phase="RUNNING") == 1
    assert value("jobsched_jobs", phase="FAILED") == 0
    assert value("jobsched_queue_jobs", queue="default", state="waiting") == 1
    assert (value("jobsched_gpus", state="total"), value("jobsched_gpus", state="in_use")) == (4, 1)
    assert value("jobsched_events") == api.stage.store.last_seq()


# ---- schemathesis ----



def without_patterns(value: object) -> object:
    """Compiling long patterns takes the generator half a minute, and text that breaks them is welcome here."""
    if isinstance(value, dict):
        return {key: without_patterns(part) for key, part in value.items() if key != "pattern"}
    return [without_patterns(part) for part in value] if isinstance(value, list) else value


_stage = Stage()
_app = create_app(_stage.service, "fuzz", version="1")
_app.feed.close()  # streams end at once instead of waiting for news
schema = schemathesis.openapi.from_dict(without_patterns(_app.api.openapi()))
schema.app = _app.asgi


@schema.parametrize()
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_server_fail(case: schemathesis.Case) -> None:
    if not _stage.store.jobs(JobQuery(phases=(Phase.QUEUED,))):
        _stage.submit()
    response = case.call(base_url="http://127.0.0.1", headers={"Authorization": "Bearer fuzz"})
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert json.loads(response.content)["code"] in all_errors()


def test_no_request_without_the_token_changes_anything(api: Api) -> None:
    job, before = api.stage.submit(), api.stage.store.last_seq()
    asked = 0
    for path, operations in api.app.api.openapi()["paths"].items():
        for method in operations:
            for value in ("", "Bearer wrong", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN} ", "Bearer \xff"):
                response = api.http.request(
                    method, path.format(ref=job.id, name="n1"), json={"spec": SPEC, "wanted": {"worker": 1}},
                    headers={"Authorization": value.encode("latin-1")},
                )
                assert response.status_code == (200 if path == "/v1/healthz" else 401), (method, path)
                asked += 1
    assert asked > 150
    assert api.stage.store.last_seq() == before
    assert not api.stopped
