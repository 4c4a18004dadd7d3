"""What people do with kubectl, on a real API server: a job's own file, as it stands in the repository."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("kubernetes", reason="the package kubernetes is not installed")

from jobsched.operator.objects import DIRECTORY
from tests.control_plane import ROOT, Kubectl, cluster
from tests.operator.stage import cleared, serving, until

__all__ = ["cluster"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1_500)]
EXAMPLE = ROOT / "jobs" / "digits_ddp"


@pytest.fixture
def server(cluster: Kubectl, tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path / "home", cluster.kubeconfig) as server:
        yield server.url
    cleared(tmp_path / "home")


def example() -> str:
    """The file; its replicas run on this machine, so that the directory it names in an image is the one it lies in."""
    text = (EXAMPLE / "job.yaml").read_text()
    assert f"{DIRECTORY}: /jobs/digits_ddp" in text
    return text.replace(f"{DIRECTORY}: /jobs/digits_ddp", f"{DIRECTORY}: {EXAMPLE}")


def field(kubectl: Kubectl, path: str, name: str = "digits-ddp") -> str:
    return kubectl("get", "tj", name, "-o", f"jsonpath={{{path}}}")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_apply_get_describe_wait_scale_edit_delete(cluster: Kubectl, server: str) -> None:
    kubectl = cluster
    kubectl("apply", "-f", "-", given=example())
    kubectl("wait", "tj/digits-ddp", "--for=condition=Running", "--timeout=300s")

    header, row = kubectl("get", "trainingjobs").splitlines()
    assert header.split() == ["NAME", "PHASE", "REASON", "READY", "QUEUE", "AGE"]
    assert row.split()[:2] == ["digits-ddp", "RUNNING"]
    assert "digits-ddp" in kubectl("get", "jobsched")

    kubectl("scale", "tj/digits-ddp", "--replicas=4")
    until(lambda: field(kubectl, ".status.ready") == "4/4", lambda: field(kubectl, ".status"))
    scale = json.loads(kubectl("get", "--raw", kubectl.path("trainingjobs/digits-ddp/scale")))
    assert scale["spec"]["replicas"] == scale["status"]["replicas"] == 4
    assert "jobsched.dev/role=worker" in scale["status"]["selector"]
    assert "greater than or equal to 1" in kubectl.run("scale", "tj/digits-ddp", "--replicas=0").stderr

    kubectl("scale", "tj/digits-ddp", "--replicas=9")  # the subresource knows no bounds, the operator does
    kubectl("wait", "tj/digits-ddp", "--for=condition=Accepted=false", "--timeout=300s")
    described = kubectl("describe", "tj", "digits-ddp")
    assert "role 'worker' can have 2..4" in described
    assert "EditRefused" in described
    assert "every replica runs" in described, "events are told"
    kubectl("scale", "tj/digits-ddp", "--replicas=2")
    kubectl("wait", "tj/digits-ddp", "--for=condition=Accepted", "--timeout=300s")
    until(lambda: field(kubectl, ".status.ready") == "2/2", lambda: field(kubectl, ".status"))

    kubectl("patch", "tj/digits-ddp", "--type=merge", "-p", '{"spec":{"priority":5}}')
    until(lambda: field(kubectl, ".status.priority") == "5")
    assert field(kubectl, ".status.attempt") == "1"

    kubectl("delete", "tj/digits-ddp", "--timeout=300s")
    assert "NotFound" in kubectl.run("get", "tj", "digits-ddp").stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_the_example_trains_to_its_end(cluster: Kubectl, server: str) -> None:
    kubectl = cluster
    kubectl("apply", "-f", "-", given=example())
    kubectl("wait", "tj/digits-ddp", "--for=condition=Complete", "--timeout=300s")
    assert field(kubectl, ".status.phase") == "SUCCEEDED"
    kubectl("delete", "tj/digits-ddp", "--timeout=300s")
