"""The operator: objects become jobs, edits and deletions wishes, and what happens their status. A real server with
processes for replicas, before a fake API server and, where there is one, a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="the package kubernetes is not installed")

from jobsched.service.submitting import Submissions
from tests.backends.kubernetes_fake import FakeCluster
from tests.control_plane import MANIFESTS, Kubectl, api_server
from tests.operator.stage import QUEUES, Objects, cleared, serving, until

pytestmark = pytest.mark.e2e
SLEEP = {"roles": {"worker": {"command": ["/bin/sleep", "300"], "gpu": "any:1"}}, "checkpoint": {"grace": "1s"}}
ELASTIC = {"command": ["/bin/sleep", "300"], "gpu": "any:1", "restart": {"scope": "replica"}}


@pytest.fixture(scope="module", params=["fake", "real"])
def kubeconfig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "fake":
        cluster = FakeCluster(node_count=0)
        yield cluster.kubeconfig(tmp_path_factory.mktemp("fake") / "kubeconfig")
        cluster.close()
        return
    with api_server() as found:
        kubectl = Kubectl(found)
        kubectl("apply", "--server-side", "-f", str(MANIFESTS / "base" / "crds.yaml"))
        kubectl("wait", "--for=condition=Established", "--timeout=240s", "crd/trainingjobs.jobsched.dev",
                "crd/trainingqueues.jobsched.dev")
        yield found


@pytest.fixture(scope="module")
def home(kubeconfig: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("home")
    yield place
    cleared(place)


@pytest.fixture
def objects(kubeconfig: str, home: Path) -> Iterator[Objects]:
    with serving(home, kubeconfig):
        yield Objects(kubeconfig)


def test_a_job_runs_to_its_end(objects: Objects) -> None:
    objects.apply("short", {"command": "true", "gpu": 1}, labels={"team": "a"})
    status = objects.await_phase("short", "SUCCEEDED", "FAILED")
    assert status["phase"] == "SUCCEEDED"
    assert status["jobId"]
    assert status["startedAt"] <= status["endedAt"]
    assert objects.condition("short", "Complete")["status"] == "True"
    assert objects.condition("short", "Accepted")["status"] == "True"
    until(lambda: {"AttemptPlaced", "AttemptStarted"} <= {one["reason"] for one in objects.events("short")})
    objects.delete("short")
    until(lambda: objects.get("short") is None)


def test_what_happens_before_the_answer_to_a_submission_is_told_too(
    kubeconfig: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Submissions.submit

    def answers_late(submissions: Submissions, *args: Any, **fields: Any) -> Any:
        page = submit(submissions, *args, **fields)
        until(lambda: submissions._answers.get(page.jobs[0].job.id).job.phase.terminal)
        return page

    monkeypatch.setattr(Submissions, "submit", answers_late)
    with serving(home, kubeconfig):
        objects = Objects(kubeconfig)
        objects.apply("hasty", {"command": "true", "gpu": 1})
        assert objects.await_phase("hasty", "SUCCEEDED", "FAILED")["phase"] == "SUCCEEDED"
        until(lambda: {"AttemptPlaced", "AttemptStarted"} <= {one["reason"] for one in objects.events("hasty")})
        objects.delete("hasty")
        until(lambda: objects.get("hasty") is None)


def test_a_job_that_fails_says_why(objects: Objects) -> None:
    objects.apply("bad", {"command": "echo no data; exit 3", "restart": {"max": 0}})
    status = objects.await_phase("bad", "FAILED")
    assert status["reason"] == "ExitCode"
    assert "code 3" in objects.condition("bad", "Failed")["message"]
    objects.delete("bad")
    until(lambda: objects.get("bad") is None)


def test_deleting_cancels_and_waits_until_all_is_gone(objects: Objects) -> None:
    objects.apply("long", SLEEP)
    status = objects.await_phase("long", "RUNNING")
    assert status["ready"] == "1/1"
    assert objects.condition("long", "Running")["status"] == "True"
    objects.delete("long")
    until(lambda: objects.get("long") is None)


def test_an_edit_in_place_and_one_that_starts_anew(objects: Objects) -> None:
    objects.apply("edited", {"roles": {"worker": ELASTIC | {"replicas": {"min": 1, "max": 4, "prefer": 2}}}})
    objects.await_phase("edited", "RUNNING")
    objects.edit("edited", {"priority": 7, "scale": {"replicas": 3}})
    until(lambda: objects.status("edited").get("ready") == "3/3", lambda: str(objects.status("edited")))
    assert objects.status("edited")["priority"] == 7
    assert objects.status("edited")["replicas"] == 3
    assert objects.status("edited")["attempt"] == 1
    objects.edit("edited", {"env": {"A": "1"}})
    until(lambda: objects.status("edited").get("attempt") == 2 and objects.status("edited")["phase"] == "RUNNING",
          lambda: str(objects.status("edited")))
    until(lambda: objects.status("edited").get("ready") == "3/3", lambda: str(objects.status("edited")))
    objects.delete("edited")
    until(lambda: objects.get("edited") is None)


def test_an_edit_that_is_refused_leaves_the_job_as_it_was(objects: Objects) -> None:
    objects.apply("kept", SLEEP)
    objects.await_phase("kept", "RUNNING")
    objects.edit("kept", {"queue": "nowhere"})
    until(lambda: objects.condition("kept", "Accepted").get("status") == "False")
    refused = objects.condition("kept", "Accepted")
    assert refused["reason"] == "EditRefused"
    assert "nowhere" in refused["message"]
    assert objects.status("kept")["phase"] == "RUNNING"
    until(lambda: any(one["type"] == "Warning" and "nowhere" in one["message"] for one in objects.events("kept")))
    objects.edit("kept", {"queue": "default"})
    until(lambda: objects.condition("kept", "Accepted").get("status") == "True")
    assert objects.status("kept")["attempt"] == 1
    objects.delete("kept")
    until(lambda: objects.get("kept") is None)


def test_what_no_schema_can_see_is_refused_in_a_condition(objects: Objects) -> None:
    objects.apply("wrong", {"command": "true", "restart": {"backoff": "1h", "backoff_max": "1m"}})
    status = objects.await_phase("wrong", "REFUSED")
    assert status["reason"] == "SpecError"
    assert "backoff_max is below backoff" in objects.condition("wrong", "Accepted")["message"]
    objects.edit("wrong", {"restart": {"backoff": "1s"}})
    objects.await_phase("wrong", "SUCCEEDED")
    objects.delete("wrong")
    until(lambda: objects.get("wrong") is None)


def test_a_queue_comes_and_a_job_that_was_refused_goes_in(objects: Objects) -> None:
    objects.apply("early", {"command": "true", "queue": "team-a"})
    assert objects.await_phase("early", "REFUSED")["reason"] == "NotFound"
    objects.apply("team-a", {"weight": 2, "quota": {"gpus": 4}}, QUEUES)
    objects.await_phase("early", "SUCCEEDED")
    assert objects.condition("team-a", "Ready", QUEUES)["status"] == "True"
    objects.delete("team-a", QUEUES)
    until(lambda: objects.get("team-a", QUEUES) is None)
    objects.apply("late", {"command": "true", "queue": "team-a"})
    assert objects.await_phase("late", "REFUSED")["message"]
    for name in ("early", "late"):
        objects.delete(name)
        until(lambda name=name: objects.get(name) is None)  # type: ignore[misc]


def test_a_queue_of_the_servers_own_is_not_an_objects_to_change(objects: Objects) -> None:
    objects.apply("default", {"weight": 2}, QUEUES)
    until(lambda: objects.condition("default", "Ready", QUEUES).get("status") == "False")
    assert "configuration" in objects.condition("default", "Ready", QUEUES)["message"]
    objects.delete("default", QUEUES)
    until(lambda: objects.get("default", QUEUES) is None)


def test_an_array_is_one_object(objects: Objects) -> None:
    objects.apply("many", {"command": "exit $((JOBSCHED_ARRAY_INDEX == 2))", "array": "0-2", "restart": {"max": 0}})
    status = objects.await_phase("many", "FAILED")
    assert status["message"].startswith("2 succeeded, 1 failed")
    objects.delete("many")
    until(lambda: objects.get("many") is None)


def test_a_server_that_starts_anew_finds_its_jobs(home: Path, kubeconfig: str) -> None:
    objects = Objects(kubeconfig)
    with serving(home, kubeconfig):
        objects.apply("kept", SLEEP)
        before = objects.await_phase("kept", "RUNNING")
        objects.apply("gone", SLEEP)
        objects.await_phase("gone", "RUNNING")
    objects.delete("gone")
    objects.edit("kept", {"priority": 3})
    with serving(home, kubeconfig):
        until(lambda: objects.get("gone") is None)
        until(lambda: objects.status("kept").get("priority") == 3)
        after = objects.status("kept")
        assert (after["jobId"], after["attempt"]) == (before["jobId"], 1)
        objects.delete("kept")
        until(lambda: objects.get("kept") is None)


def test_an_api_server_that_is_away_is_waited_for(tmp_path: Path) -> None:
    cluster = FakeCluster(node_count=0)
    kubeconfig = cluster.kubeconfig(tmp_path / "kubeconfig")
    objects = Objects(kubeconfig)
    try:
        with serving(tmp_path / "home", kubeconfig):
            objects.apply("before", SLEEP)
            objects.await_phase("before", "RUNNING")
            cluster.down = True
            cluster.break_off()
            cluster.forget_history()
            cluster.down = False
            objects.apply("after", {"command": "true"})
            objects.await_phase("after", "SUCCEEDED")
            objects.delete("before")
            until(lambda: objects.get("before") is None)
    finally:
        cleared(tmp_path / "home")
        cluster.close()
