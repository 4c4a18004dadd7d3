"""Objects to specs, and answers to status: pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jobsched.core import events as ev
from jobsched.core.answers import JobAnswer, QueueAnswer
from jobsched.core.job import Binding, Job, Phase, Reason, Replica, ReplicaState
from jobsched.core.lifecycle import evolve_job
from jobsched.core.resources import JobId, NodeName
from jobsched.errors import NotFound, SpecError
from jobsched.operator import objects
from jobsched.operator.objects import DIRECTORY, UID, Refusal
from jobsched.spec.crd import job_crd
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec

NOW_MS = 1_700_000_000_000


def an_object(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "jobsched.dev/v1alpha1", "kind": "TrainingJob",
        "metadata": {"name": "a", "namespace": "team", "uid": "u-1", "generation": 3, "resourceVersion": "9",
                     "labels": {"app.kubernetes.io/name": "a"}, "managedFields": [], "annotations": {}},
        "spec": spec or {"command": "true"},
    }  # fmt: skip


def a_job(phase: Phase = Phase.QUEUED, **fields: object) -> Job:
    spec = JobSpec.model_validate({"name": "a", "roles": {"worker": {"command": "true", "replicas": "1..4"}}})
    return replace(evolve_job(None, ev.JobSubmitted(NOW_MS, JobId("j1"), "a", "me", spec)), phase=phase, **fields)  # type: ignore[arg-type]


def test_a_job_carries_its_objects_uid_and_labels() -> None:
    spec = objects.job_spec(an_object())
    assert spec.name == "a"
    assert spec.labels == {"app.kubernetes.io/name": "a", UID: "u-1"}


def test_directories_start_where_the_annotation_says() -> None:
    found = an_object(command="true", working_dir="..")
    assert objects.job_spec(found, "/srv/jobs").working_dir == "/srv"
    found["metadata"]["annotations"] = {DIRECTORY: "/jobs/digits_ddp"}
    assert objects.job_spec(found, "/srv/jobs").working_dir == "/jobs"


def test_kubectl_scale_is_what_the_worker_prefers() -> None:
    found = an_object(command="true", replicas={"min": 2, "max": 4}, scale={"replicas": 3})
    assert objects.job_spec(found).roles["worker"].replicas.prefer == 3
    for scale, replicas in ((9, "2..4"), (3, 2)):
        with pytest.raises(SpecError, match=r"scale\.replicas"):
            objects.job_spec(an_object(command="true", replicas=replicas, scale={"replicas": scale}))


def test_a_running_job() -> None:
    replicas = {f"worker/{n}": Replica("worker", n, Binding("worker", n, NodeName("n1")), state)
                for n, state in enumerate((ReplicaState.RUNNING, ReplicaState.BOUND))}  # fmt: skip
    job = a_job(Phase.RUNNING, replicas=replicas, first_started_at_ms=NOW_MS, attempt=1)
    status = objects.job_status(an_object(), [JobAnswer(job, headline="waits for 2 more worker")], None, NOW_MS)
    assert (status["phase"], status["ready"], status["replicas"]) == ("RUNNING", "1/4", 2)
    assert status["selector"] == "jobsched.dev/job=j1,jobsched.dev/role=worker"
    assert status["observedGeneration"] == 3
    assert {one["type"]: one["status"] for one in status["conditions"]} == {"Accepted": "True", "Running": "True"}


def test_since_when_a_condition_holds_is_kept() -> None:
    found = an_object()
    found["status"] = objects.job_status(found, [JobAnswer(a_job())], None, NOW_MS)
    later = objects.job_status(found, [JobAnswer(a_job(Phase.RUNNING))], None, NOW_MS + 60_000)
    since = {one["type"]: one["lastTransitionTime"] for one in later["conditions"]}
    assert since["Accepted"] < since["Running"]


@pytest.mark.parametrize(("phase", "condition"), [(Phase.SUCCEEDED, "Complete"), (Phase.FAILED, "Failed"),
                                                  (Phase.CANCELLED, "Failed")])  # fmt: skip
def test_the_end_is_a_condition_to_wait_for(phase: Phase, condition: str) -> None:
    job = a_job(phase, reason=Reason.COMPLETED, ended_at_ms=NOW_MS)
    status = objects.job_status(an_object(), [JobAnswer(job)], None, NOW_MS)
    assert next(one for one in status["conditions"] if one["type"] == condition)["status"] == "True"
    assert status["endedAt"] == "2023-11-14T22:13:20Z"


def test_an_array_is_told_by_its_members() -> None:
    members = [JobAnswer(a_job(phase, array_id="x", array_index=n))
               for n, phase in enumerate((Phase.SUCCEEDED, Phase.FAILED, Phase.RUNNING))]  # fmt: skip
    assert objects.job_status(an_object(), members, None, NOW_MS)["phase"] == "RUNNING"
    ended = objects.job_status(an_object(), members[:2], None, NOW_MS)
    assert (ended["phase"], ended["jobId"]) == ("FAILED", "x")
    assert ended["message"].startswith("1 succeeded, 1 failed")


def test_a_refusal_says_what_would_help() -> None:
    refusal = Refusal.of(NotFound("there is no queue 'x'", hint="queues: default"), edit=False)
    status = objects.job_status(an_object(), (), refusal, NOW_MS)
    assert (status["phase"], status["reason"]) == ("REFUSED", "NotFound")
    assert status["conditions"][0]["message"] == "there is no queue 'x' (queues: default)"
    edited = objects.job_status(an_object(), [JobAnswer(a_job(Phase.RUNNING))], Refusal("EditRefused", "no"), NOW_MS)
    assert edited["phase"] == "RUNNING"
    assert edited["conditions"][0]["reason"] == "EditRefused"


def test_a_queue() -> None:
    found = an_object(weight=2, quota={"gpus": 8})
    queue = objects.queue_spec(found)
    assert queue == QueueSpec(name="a", weight=2, quota={"gpus": 8})
    status = objects.queue_status(found, QueueAnswer(queue, 3, 1, 2.5), None, NOW_MS)
    assert (status["waiting"], status["active"], status["gpus"]) == (3, 1, "2.5")


def test_every_field_of_a_status_is_in_the_definition() -> None:
    schema: Any = job_crd()
    known = schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    status = objects.job_status(an_object(), [JobAnswer(a_job())], None, NOW_MS)
    assert status.keys() == known.keys()
