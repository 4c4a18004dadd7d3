"""The Kubernetes backend on a real cluster: the same promises. `kubernetes_stage` makes the image that nodes need."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobsched.backends.containers import SEND
from jobsched.core.observation import ReplicaReport
from jobsched.core.resources import GpuShare
from jobsched.spec.backends import KubernetesBackend as Config
from tests.backends import kubernetes_stage
from tests.backends.kubernetes_stage import kubectl
from tests.contracts.backend import ENV_SCRIPT, ProcessBackendContract, Watcher, a_launch

if TYPE_CHECKING:
    from jobsched.backends.kubernetes import KubernetesBackend

pytestmark = [pytest.mark.e2e, kubernetes_stage.needs_cluster, pytest.mark.timeout(1_200)]


class RealEngine:
    """`tests.contracts.backend.Engine` for pods of a real cluster."""

    can_run_commands = True

    def __init__(self, home: Path, namespace: str, shared: Path, **fields: Any) -> None:
        self.home, self.namespace = home, namespace
        self.config = Config.model_validate({
            "namespace": namespace, "image": kubernetes_stage.IMAGE,
            "volumes": [{"host_path": str(shared), "mount": str(shared)}]} | fields)
        self.backend = self._connect()

    def _connect(self) -> KubernetesBackend:
        from jobsched.backends.kubernetes import KubernetesBackend

        return KubernetesBackend(self.home, self.config)

    def reconnect(self) -> KubernetesBackend:
        self.backend.close()
        self.backend = self._connect()
        return self.backend

    def ends(self, code: int) -> tuple[str, ...]:
        return ("/bin/sh", "-c", f"exit {code}")

    def goes_on(self) -> tuple[str, ...]:
        return ("/bin/sleep", "300")

    def kill(self, report: ReplicaReport) -> None:
        kubectl("-n", self.namespace, "exec", report.ident, "--", "/bin/sh", "-c", SEND, "sh", "9", "all")

    def clean_up(self) -> None:
        self.backend.close()
        mine = f"jobsched.dev/instance={self.backend.site.instance}"
        kubectl("-n", self.namespace, "delete", "pods,services,configmaps", "-l", mine, "--grace-period=1")
        assert "No resources" in kubectl("-n", self.namespace, "get", "pods,services,configmaps", "-l", mine) + \
            "No resources"


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"jobsched-test-{secrets.token_hex(3)}"
    kubectl("create", "namespace", name)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


class OpenPlaces:
    """As `tmp_path_factory`, for directories that pods of another user may write to; nodes are this machine."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def mktemp(self, name: str) -> Path:
        path = self.base / f"{name}-{secrets.token_hex(3)}"
        path.mkdir()
        path.chmod(0o777)
        return path


@pytest.fixture
def tmp_path_factory() -> Iterator[OpenPlaces]:
    base = Path(tempfile.mkdtemp(prefix="jobsched-test-"))
    base.chmod(0o777)
    yield OpenPlaces(base)
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def engine(tmp_path_factory: OpenPlaces, namespace: str) -> Iterator[RealEngine]:
    home = Path(tempfile.mkdtemp(prefix="jobsched-home-"))
    engine = RealEngine(home, namespace, tmp_path_factory.base)
    yield engine
    engine.clean_up()
    shutil.rmtree(home)


class TestKubernetesBackend(ProcessBackendContract):
    """`engine` is above."""

    def test_gpus_are_pinned(self, watcher: Watcher) -> None:
        """Which ones they are is the device plugin's business."""
        node = next((n for n in watcher.sight.nodes.values() if len(n.gpus) >= 2), None)
        if node is None:
            pytest.skip("no node with two GPUs here")
        launch = a_launch(node, ("python", "-c", ENV_SCRIPT), gpus=[GpuShare(gpu.id) for gpu in node.gpus[:2]])
        watcher.backend.start([launch])
        assert watcher.end(launch.key).exit_code == 0
        env, _, _ = json.loads(self.read_log(watcher.backend, launch.key))
        assert "CUDA_VISIBLE_DEVICES" not in env
