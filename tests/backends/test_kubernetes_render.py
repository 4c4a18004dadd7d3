"""Launches as Kubernetes objects, and pods as reports, without any cluster."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobsched.backends import kubernetes_render as render
from jobsched.contract import ReplicaEnv
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.observation import Incident, Seen
from jobsched.core.resources import GpuId, GpuShare, NodeName
from jobsched.spec.backends import KubernetesBackend
from jobsched.spec.job import JobSpec
from jobsched.spec.pod import both
from tests.backends import golden
from tests.contracts.backend import a_key

KEY = LaunchKey("01jobid/2/worker/1/0")
OWNER = {"apiVersion": "v1", "kind": "Service", "name": "js-c0ffee-01jobid-2", "uid": "u-1"}
NODE = {
    "metadata": {"name": "gpu-1", "labels": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}},
    "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
                        {"key": "spot", "effect": "NoExecute"},
                        {"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"}]},
    "status": {"allocatable": {"cpu": "96", "memory": "1Ti", "nvidia.com/gpu": "8", "nvidia.com/mig-1g.10gb": "7"}},
}
VOLUMES = {"checkpoints": {"claim": "checkpoints", "mount": "/checkpoints"}}


def a_launch(**fields: Any) -> Launch:
    contract = ReplicaEnv(
        job_id="01jobid", job_name="bert", attempt=2, role="worker", index=1, rank=1, world_size=2, node="gpu-1",
        peers={"ps": ("ps-0.js-c0ffee-01jobid-2:2222",), "worker": ("worker-0.js-c0ffee-01jobid-2:2222",
                                                                     "worker-1.js-c0ffee-01jobid-2:2222")},
        coordinator="worker-0.js-c0ffee-01jobid-2:2223", token="t", secret="s",
        checkpoint_dir="/checkpoints/01jobid", gpu_count=2, threads=4,
    )
    return Launch(**{
        "key": KEY, "job_name": "bert", "node": NodeName("gpu-1"), "command": ("python", "train.py"),
        "contract": contract, "env": {"LR": "0.1", "WANDB_API_KEY": "secret://wandb", "HF": "secret://hub/token"},
        "working_dir": "/home/me/bert", "image": "team/bert:3", "cpu_milli": 4_000, "memory_bytes": 32 * 2**30,
        "gpus": (GpuShare(GpuId("gpu-1/gpu-0")), GpuShare(GpuId("gpu-1/gpu-5"))), **fields,
    })


def a_site(**config: Any) -> render.Site:
    return render.Site("c0ffee", "ml", KubernetesBackend.model_validate(VOLUMES | config))


def a_pod(status: dict[str, Any], spec: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "js-x", "uid": "u", "annotations": {render.KEY: KEY, render.NODE: "gpu-1"}, **metadata},
        "spec": spec or {"nodeName": "gpu-1"}, "status": status,
    }


def container(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "replica", "state": state}]


@pytest.mark.parametrize(("name", "launch", "site", "parts"), [
    ("kubernetes_gpus_copied", a_launch(), a_site(), ["c-0", "c-1"]),
    ("kubernetes_read_only", a_launch(gpus=(), memory_bytes=0, image=""), a_site(
        read_only=True, image="jobsched/train-cpu", working_dir="image", pull="always", pull_secrets=["registry"],
        service_account="trainer", scheduler="volcano", priority_class="high", user="1000:1000",
        volumes=[{"host_path": "/srv/data", "mount": "/data", "read_only": True}]), []),
    ("kubernetes_overlay", a_launch(
        gpus=(GpuShare(GpuId("gpu-1/mig-1g.10gb-3")),),
        pod={"metadata": {"labels": {"team": "a"}}, "spec": {
            "priorityClassName": "urgent", "tolerations": [{"key": "x", "operator": "Exists"}],
            "containers": [{"name": "replica", "env": [{"name": "LR", "value": "0.2"}],
                            "volumeMounts": [{"name": "cache", "mountPath": "/cache"}]}],
            "volumes": [{"name": "cache", "emptyDir": {}}]}}), a_site(), []),
])
def test_pods(name: str, launch: Launch, site: render.Site, parts: list[str]) -> None:
    golden.check(name, render.pod(launch, site, NODE, OWNER, parts))


def test_service_and_config_maps() -> None:
    site = a_site()
    golden.check("kubernetes_service", render.service(site, KEY))
    maps = render.config_maps(site, KEY, bytes(render.PART + 1), OWNER)
    assert [len(one["binaryData"]) for one in maps] == [1, 1]
    assert maps[0]["metadata"]["name"] != maps[1]["metadata"]["name"]
    assert all(len(str(one)) < 1 << 20 for one in maps)
    golden.check("kubernetes_config_map", render.config_maps(site, KEY, b"tar", OWNER))


@pytest.mark.parametrize("tools", ["tar", "python"])
def test_the_unpacking_script_works_with_tar_and_with_python_only(tmp_path: Path, tools: str) -> None:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        entry = tarfile.TarInfo("a/b.txt")
        entry.size = 5
        tar.addfile(entry, BytesIO(b"hello"))
    parts, there, programs = tmp_path / "parts", tmp_path / "there", tmp_path / "bin"
    for directory in (parts, there, programs):
        directory.mkdir()
    whole = packed.getvalue()
    (parts / "part-000").write_bytes(whole[:50])
    (parts / "part-001").write_bytes(whole[50:])
    for name in ("cat", "tar", "gzip") if tools == "tar" else ("cat", "python3"):
        found = sys.executable if name == "python3" else shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    subprocess.run(["/bin/sh", "-c", render.UNPACKS, str(there), str(parts)], check=True, env={"PATH": str(programs)})
    assert (there / "a/b.txt").read_text() == "hello"


def test_what_no_cluster_could_do_is_told() -> None:
    node = NODE | {"status": {"allocatable": {"nvidia.com/gpu": "8"}}}
    site = a_site(gpus=[{"resource": "nvidia.com/gpu", "per_gpu": 4}])
    for launch, where, text in (
        (a_launch(image=""), a_site(), "names no image"),
        (a_launch(gpus=(GpuShare(GpuId("gpu-1/gpu-9")),)), a_site(), "no longer offers gpu-1/gpu-9"),
        (a_launch(gpus=(GpuShare(GpuId("gpu-1/gpu-0"), 500),)), a_site(), "ask for 1/1 of a GPU"),
        (a_launch(gpus=(GpuShare(GpuId("gpu-1/gpu-0"), 1_000),)), site, "ask for 1/4 of a GPU"),
        (a_launch(contract=replace(a_launch().contract, checkpoint_dir="/tmp/x")), a_site(), "lost with the pod"),
        (a_launch(pod={"spec": {"hostNetwork": True}}), a_site(), "spec.hostNetwork"),
        (a_launch(pod={"spec": {"priorityClassName": "x"}}), a_site(overlay="none"), "no job write kubernetes.pod"),
    ):
        with pytest.raises(render.CannotRender, match=text):
            render.pod(launch, where, node, OWNER)
    quarter = render.pod(a_launch(gpus=(GpuShare(GpuId("gpu-1/gpu-0"), 250),)), site, node, OWNER)
    assert quarter["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    powerful = render.pod(a_launch(pod={"spec": {"hostNetwork": True}}), a_site(overlay="any"), NODE, OWNER)
    assert powerful["spec"]["hostNetwork"] is True


@pytest.mark.parametrize(("pod", "expected"), [
    (a_pod({"phase": "Pending"}), (Seen.STARTING, None, None, Reason.NONE, "")),
    (a_pod({"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]}, {"nodeName": ""}),
     (Seen.STARTING, None, None, Reason.NONE, "0/3 nodes are available")),
    (a_pod({"phase": "Running", "containerStatuses": container({"running": {}})}),
     (Seen.RUNNING, None, None, Reason.NONE, "")),
    (a_pod({"containerStatuses": container({"terminated": {"exitCode": 0, "reason": "Completed"}})}),
     (Seen.EXITED, 0, None, Reason.NONE, "")),
    (a_pod({"containerStatuses": container({"terminated": {"exitCode": 137, "reason": "Error"}})}),
     (Seen.EXITED, None, 9, Reason.NONE, "")),
    (a_pod({"containerStatuses": container({"terminated": {"exitCode": 137, "reason": "OOMKilled"}})}),
     (Seen.EXITED, None, 9, Reason.OOM, "out of memory")),
    (a_pod({"containerStatuses": container({"terminated": {"exitCode": 143}})}, deletionTimestamp="2026"),
     (Seen.EXITED, None, 15, Reason.REPLICA_LOST, "its pod was deleted")),
    (a_pod({"containerStatuses": container({"terminated": {"exitCode": 143}}), "conditions": [
        {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drain"}]}),
     (Seen.EXITED, None, 15, Reason.REPLICA_LOST, "evicted (EvictionByEvictionAPI): drain")),
    (a_pod({"phase": "Failed", "reason": "OutOfcpu", "message": "Node didn't have enough resource: cpu"}),
     (Seen.EXITED, None, None, Reason.REPLICA_LOST, "enough resource: cpu")),
    (a_pod({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}),
     (Seen.EXITED, None, None, Reason.REPLICA_LOST, "low on resource: memory")),
    (a_pod({"containerStatuses": container({"terminated": {
        "exitCode": 128, "reason": "StartError", "message": "failed to create containerd task: runc create failed: "
        'unable to start container process: exec: "trian": executable file not found in $PATH'}})}),
     (Seen.EXITED, 127, None, Reason.START_FAILED, 'exec: "trian"')),
    (a_pod({"containerStatuses": container({"waiting": {"reason": "ImagePullBackOff", "message":
        'Back-off pulling image "x/y": ErrImagePull: rpc error: code = Unknown desc = failed: 401 Unauthorized'}})}),
     (Seen.EXITED, None, None, Reason.IMAGE_ERROR, "401 Unauthorized")),
    (a_pod({"initContainerStatuses": [{"name": "unpack", "state": {"waiting": {"reason": "ErrImagePull"}}}],
            "containerStatuses": container({"waiting": {"reason": "PodInitializing"}})}),
     (Seen.EXITED, None, None, Reason.IMAGE_ERROR, "ErrImagePull")),
    (a_pod({"initContainerStatuses": [{"name": "unpack", "state": {"terminated": {"exitCode": 1, "message": "no"}}}]}),
     (Seen.EXITED, 126, None, Reason.START_FAILED, "could not be unpacked")),
    (a_pod({"containerStatuses": container({"waiting": {
        "reason": "CreateContainerConfigError", "message": 'secret "s" not found'}})}),
     (Seen.EXITED, 126, None, Reason.START_FAILED, 'secret "s" not found')),
])
def test_pods_as_reports(pod: dict[str, Any], expected: tuple[Any, ...]) -> None:
    report = render.report_of(pod)
    assert (report.state, report.exit_code, report.signal, report.failure) == expected[:4]
    assert expected[4] in report.message
    assert report.node == "gpu-1"


def test_an_end_that_we_wanted_needs_no_other_cause() -> None:
    pod = a_pod({"containerStatuses": container({"terminated": {"exitCode": 143}})}, deletionTimestamp="2026")
    assert render.report_of(pod, wanted_away=True).failure is Reason.NONE


def test_whose_fault_a_refusal_is() -> None:
    assert render.refusal(403, 'exceeded quota: q, requested: pods=1') is Reason.REPLICA_LOST
    assert render.refusal(403, "unable to create new content in namespace x because it is being terminated") \
        is Reason.REPLICA_LOST
    assert render.refusal(403, 'pods "x" is forbidden: violates PodSecurity') is Reason.START_FAILED
    assert render.refusal(422, "Invalid value") is Reason.START_FAILED


@pytest.mark.parametrize(("pod", "problem"), [
    ({"status": {}}, "'status' is no part"),
    ({"metadata": {"name": "x"}}, "metadata.name"),
    ({"metadata": {"labels": {"jobsched.dev/job": "x"}}}, "one of jobsched's own"),
    ({"spec": {"nodeName": "x"}}, "spec.nodeName is decided by jobsched"),
    ({"spec": {"tolerashuns": []}}, "spec.tolerashuns: there is no such field"),
    ({"spec": {"containers": [{"name": "sidecar"}]}}, "called 'replica'"),
    ({"spec": {"containers": [{"command": ["x"]}]}}, "containers[0].command"),
    ({"spec": {"affinity": {"nodeAffinity": {"x": 1}}}}, "nodeAffinity"),
])
def test_what_a_job_may_not_write_about_its_pods(pod: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match="kubernetes") as caught:
        JobSpec.model_validate({"roles": {"worker": {"command": "true"}}, "kubernetes": {"pod": pod}})
    assert problem in str(caught.value)


def test_a_roles_wishes_lie_over_the_jobs() -> None:
    job = {"spec": {"priorityClassName": "low", "containers": [{"env": [{"name": "A", "value": "1"}]}]}}
    role = {"spec": {"priorityClassName": "high", "containers": [{"env": [{"name": "A", "value": "2"},
                                                                          {"name": "B", "value": "3"}]}]}}
    merged: Any = both(job, role)
    assert merged["spec"]["priorityClassName"] == "high"
    (one,) = merged["spec"]["containers"]
    assert one["env"] == [{"name": "A", "value": "2"}, {"name": "B", "value": "3"}]


def test_events_as_people_read_them() -> None:
    key = a_key("01m8dx25xp309nd1jfg08q1qf9", 2, "chief-worker", 3, 1)
    name = render.pod_name("abc", key)
    assert render.key_of_name("abc", name) == key
    event = {
        "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}, "type": "Warning", "reason": "FailedScheduling",
        "message": "0/3 nodes are available", "involvedObject": {"kind": "Pod", "name": name},
        "lastTimestamp": "2026-01-01T00:00:05Z", "count": 4,
    }  # fmt: skip
    told = render.incident(event, "abc")
    text = "0/3 nodes are available"
    assert told == Incident(1_767_225_605_000, "FailedScheduling", text, key, warning=True, count=4)
    newer = render.incident({**event, "series": {"count": 9, "lastObservedTime": "2026-01-01T00:00:09.5Z"}}, "abc")
    assert newer is not None
    assert (newer.count, newer.at_ms) == (9, 1_767_225_609_500)
    node = render.incident({
        **event, "type": "Normal", "reason": "NodeNotReady", "involvedObject": {"kind": "Node", "name": "n1"},
    }, "abc")
    assert node is not None
    assert (node.node, node.key, node.warning) == ("n1", "", False)
    assert render.incident(event, "other") is None
    assert render.incident({**event, "involvedObject": {"kind": "Service", "name": name}}, "abc") is None
    assert render.key_of_name("abc", "js-abc-what") is None
