"""The Kubernetes backend: it keeps every promise of a backend, and those of clusters besides. On a fake API server."""

from __future__ import annotations

import base64
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="the package kubernetes is not installed")

from jobsched.backends import kubernetes_watch
from jobsched.backends.kubernetes import KubernetesBackend
from jobsched.core.job import Reason
from jobsched.core.launch import Launch
from jobsched.core.observation import ReplicaReport, Seen
from jobsched.core.resources import GpuShare, JobId, NodeName
from jobsched.errors import BackendUnreachable, ConfigError
from jobsched.spec.backends import KubernetesBackend as Config
from tests.backends.kubernetes_fake import FakeCluster, until
from tests.contracts.backend import ENV_SCRIPT, ProcessBackendContract, Watcher, a_key, a_launch

pytestmark = pytest.mark.e2e


class FakeEngine:
    """`tests.contracts.backend.Engine` for pods of the fake cluster."""

    can_run_commands = True

    def __init__(self, home: Path, quick: dict[str, int] | None = None, **fields: object) -> None:
        """`quick`: times shorter than a configuration may have."""
        self.cluster = FakeCluster()
        self.home = home
        home.mkdir()
        self.config = Config.model_validate({
            "image": "test/tiny:1", "kubeconfig": self.cluster.kubeconfig(home / "kubeconfig")} | fields)
        self.config = self.config.model_copy(update=quick or {})
        self.backend = self._connect()

    def _connect(self) -> KubernetesBackend:
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
        os.kill(self.cluster.pid_of(report.ident), signal.SIGKILL)

    def close(self) -> None:
        self.backend.close()
        self.cluster.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    engine = FakeEngine(tmp_path / "home")
    yield engine
    engine.close()


class TestKubernetesBackend(ProcessBackendContract):
    """`engine` is above."""

    def test_gpus_are_pinned(self, watcher: Watcher) -> None:
        """How many is asked for by resource; which ones is the device plugin's business."""
        node = watcher.sight.nodes[NodeName("node-1")]
        launch = a_launch(node, ("python", "-c", ENV_SCRIPT), gpus=[GpuShare(gpu.id) for gpu in node.gpus[:2]])
        watcher.backend.start([launch])
        assert watcher.end(launch.key).exit_code == 0
        assert b'"CUDA_VISIBLE_DEVICES"' not in self.read_log(watcher.backend, launch.key)


# and besides ----------------------------------------------------------------------------------------------------------

Start = Callable[..., FakeEngine]
LIBRARY = "import time\nfrom jobsched.train.context import context\n"
COUNT = "trap 'told=1' TERM; i=0; while [ -z \"$told\" ]; do echo line $i; i=$((i+1)); " \
        "[ $((i % 20)) = 0 ] && sleep 0.01; done; true"
SECONDS_S = 60
"""For what is told in a second or two: a machine that others use takes ten times as long, and somebody is held up."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Backends with settings of their own, each with a cluster."""
    made: list[FakeEngine] = []

    def start(**fields: Any) -> FakeEngine:
        made.append(FakeEngine(tmp_path / f"home-{len(made)}", **fields))
        return made[-1]

    yield start
    for engine in made:
        engine.close()


def watch(engine: FakeEngine) -> Watcher:
    watcher = Watcher(engine.backend)
    watcher.look()
    return watcher


def run(watcher: Watcher, *command: str, **fields: Any) -> Launch:
    """One replica, ordered."""
    node = watcher.sight.nodes[NodeName(fields.pop("node", "node-0"))]
    launch = a_launch(node, command, fields.pop("key", None), **fields)
    watcher.backend.start([launch])
    return launch


def the_log(watcher: Watcher, launch: Launch) -> str:
    return b"".join(chunk.data for chunk in watcher.backend.logs(launch.key)).decode()


def test_nothing_is_left_over(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    gang = [a_launch(watcher.sight.nodes[NodeName(f"node-{i % 2}")], engine.ends(0), a_key(index=i)) for i in range(6)]
    watcher.backend.start(gang)
    watcher.ended(*(launch.key for launch in gang))
    watcher.backend.forget([gang[0].key])
    until(lambda: len(engine.cluster.pods()) == 5)
    watcher.backend.forget([launch.key for launch in gang])
    until(lambda: engine.cluster.everything() == [])
    assert engine.cluster.requests["POST pods"] == 6
    assert engine.cluster.requests["POST services"] == 1
    assert engine.cluster.requests["DELETE pods"] == 2, "one for the first, one for the rest"


def test_a_half_made_attempt_is_reaped(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(instance="mine")
    labels = {"jobsched.dev/instance": "mine", "jobsched.dev/attempt": "js-mine-job-9-1"}
    engine.cluster.put("services", "default", "js-mine-job-9-1", {"metadata": {"labels": labels}})
    monkeypatch.setattr("jobsched.backends.kubernetes.REAP_AFTER_S", 0.1)
    engine.reconnect()
    until(lambda: engine.cluster.everything() == [])


def test_an_image_that_is_not_there_is_told_and_the_pod_goes(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    begun = time.monotonic()
    end = watcher.end(run(watcher, "true", image="team/nothing:1").key)
    assert time.monotonic() - begun < SECONDS_S
    assert (end.failure, end.exit_code) == (Reason.IMAGE_ERROR, None)
    assert "ErrImagePull" in end.message
    assert "team/nothing:1" in end.message
    until(lambda: engine.cluster.pods() == [])


def test_what_the_scheduler_does_not_bind_is_taken_back_with_its_words(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    launch = run(watcher, "true", cpu_milli=9_000)
    watcher.until(lambda s: launch.key in s.replicas and s.replicas[launch.key].message)
    assert "Insufficient cpu" in watcher.sight.replicas[launch.key].message
    engine.backend.config = engine.config.model_copy(update={"bind_timeout": 800})
    end = watcher.end(launch.key)
    assert end.failure is Reason.START_TIMEOUT
    assert "Insufficient cpu" in end.message
    until(lambda: engine.cluster.pods() == [])


def test_what_others_took_meanwhile_is_given_up_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobsched.backends.kubernetes.CROWDED_S", 0.3)
    engine = start()
    watcher = watch(engine)
    launch = run(watcher, "true", cpu_milli=9_000)
    end = watcher.end(launch.key)  # long before bind_timeout
    assert end.failure is Reason.START_TIMEOUT
    assert end.message.startswith("others took its place on node-0 meanwhile: ")
    assert "Insufficient cpu" in end.message
    until(lambda: engine.cluster.pods() == [])


def test_what_others_ask_for_is_not_ours(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    before = watcher.sight.nodes[NodeName("node-0")]
    container = {"name": "c", "image": "x", "resources": {"requests": {"cpu": "500m", "memory": "1Gi"},
                                                           "limits": {"nvidia.com/gpu": "3"}}}
    engine.cluster.put("pods", "other", "theirs", {
        "metadata": {}, "spec": {"nodeName": "node-0", "containers": [container]}, "status": {"phase": "Running"}})
    watcher.until(lambda s: s.nodes[NodeName("node-0")].foreign.cpu_milli == 500)
    node = watcher.sight.nodes[NodeName("node-0")]
    assert node.foreign.memory_bytes == 1 << 30
    assert [share.gpu for share in node.foreign_gpus] == ["node-0/gpu-1", "node-0/gpu-2", "node-0/gpu-3"]
    engine.cluster.remove("pods", "other", "theirs")
    watcher.until(lambda s: s.nodes[NodeName("node-0")] == before)


def test_others_never_have_the_gpus_that_ours_hold(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    gpus = [GpuShare(watcher.sight.nodes[NodeName("node-0")].gpus[3].id)]
    launch = run(watcher, "/bin/sleep", "600", gpus=gpus)
    watcher.running(launch.key)
    container = {"name": "c", "image": "x", "resources": {"limits": {"nvidia.com/gpu": "3"}}}
    engine.cluster.put("pods", "other", "theirs", {
        "metadata": {}, "spec": {"nodeName": "node-0", "containers": [container]}, "status": {"phase": "Running"}})
    watcher.until(lambda s: len(s.nodes[NodeName("node-0")].foreign_gpus) == 3)
    assert gpus[0] not in watcher.sight.nodes[NodeName("node-0")].foreign_gpus


def test_cordons_taints_and_new_and_removed_nodes_are_seen(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    change = engine.cluster.change
    change("nodes", "", "node-0", lambda node: node["spec"].update(unschedulable=True))
    watcher.until(lambda s: not s.nodes[NodeName("node-0")].ready)
    assert "cordoned" in watcher.sight.nodes[NodeName("node-0")].message
    change("nodes", "", "node-1", lambda node: node["spec"].update(
        taints=[{"key": "team", "value": "a", "effect": "NoSchedule"}]))
    watcher.until(lambda s: s.nodes[NodeName("node-1")].taints == ("team=a",))
    tolerating = run(watcher, "true", node="node-1")
    assert watcher.end(tolerating.key).exit_code == 0
    engine.cluster.add_node("node-2", gpus=0)
    watcher.until(lambda s: NodeName("node-2") in s.nodes)
    there = run(watcher, "/bin/sleep", "600", key=a_key("job-2"), node="node-2")
    watcher.running(there.key)
    engine.cluster.remove("nodes", "", "node-2")
    end = watcher.end(there.key)
    assert end.failure is Reason.NODE_LOST
    assert NodeName("node-2") not in watcher.sight.nodes


def test_a_pod_that_somebody_deletes_is_lost_and_not_failed(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    for grace_s, index in ((1, 0), (0, 1)):
        launch = run(watcher, "/bin/sleep", "600", key=a_key(index=index))
        (report,) = watcher.running(launch.key)
        engine.cluster.delete_pod("default", report.ident, grace_s)
        end = watcher.end(launch.key)
        assert end.failure is Reason.REPLICA_LOST
        assert "deleted" in end.message


def test_a_dead_node_is_known_from_its_lease_and_the_silence_of_its_replicas(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobsched.backends.kubernetes_logs.SILENT_S", 0.5)
    engine = start(quick={"node_lost_after": 1_500})
    watcher = watch(engine)
    stays = run(watcher, "/bin/sleep", "600")
    dies = run(watcher, "/bin/sleep", "600", key=a_key(index=1), node="node-1")
    watcher.running(stays.key, dies.key)
    pid = engine.cluster.pid_of(watcher.sight.replicas[dies.key].ident)
    engine.cluster.kill_kubelet("node-1")
    end = watcher.end(dies.key)
    assert end.failure is Reason.NODE_LOST
    assert "Lease" in end.message
    watcher.until(lambda s: NodeName("node-1") not in s.nodes)
    assert watcher.sight.replicas[stays.key].state is Seen.RUNNING
    assert Path(f"/proc/{pid}/stat").exists(), "its container goes on: nobody can end it"
    until(lambda: len(engine.cluster.pods()) == 1)
    engine.cluster.start_kubelet("node-1")
    watcher.until(lambda s: NodeName("node-1") in s.nodes)
    until(lambda: not engine.cluster._members(engine.cluster.processes[next(
        uid for uid, one in engine.cluster.processes.items() if one.popen is not None and one.popen.pid == pid)]))


def test_a_lease_that_is_late_alone_proves_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobsched.backends.kubernetes_logs.SILENT_S", 0.5)
    engine = start(quick={"node_lost_after": 1_000})
    watcher = watch(engine)
    launch = run(watcher, "/bin/sleep", "600", node="node-1")
    watcher.running(launch.key)
    replica = engine.backend.table.get(launch.key)
    assert replica is not None
    until(lambda: not replica.blind_since)
    engine.cluster.dead.add("node-1")  # its log stream stays open
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        watcher.look(100)
    assert watcher.sight.replicas[launch.key].state is Seen.RUNNING
    assert NodeName("node-1") in watcher.sight.nodes
    engine.cluster.dead.clear()


def test_an_api_server_that_is_away_is_unreachable_and_nothing_is_held_against_replicas(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    launch = run(watcher, "python", "-c", LIBRARY + "context.report(step=1)\ntime.sleep(600)")
    watcher.until(lambda s: launch.key in s.replicas and s.replicas[launch.key].progress)
    engine.cluster.down = True
    engine.cluster.break_off()
    until(lambda: _unreachable(engine.backend))
    time.sleep(2.0)
    engine.cluster.down = False
    back = time.monotonic()
    until(lambda: not _unreachable(engine.backend))
    watcher.until(lambda s: s.replicas[launch.key].progress)
    progress = watcher.sight.replicas[launch.key].progress
    assert progress is not None
    assert progress.beat_age_ms < 2_000 + 1_000 * (time.monotonic() - back)
    assert watcher.sight.replicas[launch.key].state is Seen.RUNNING


def test_an_api_server_that_was_away_is_no_reason_to_take_nodes_for_dead(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubelets could not renew their Leases either, and no log could be read."""
    monkeypatch.setattr("jobsched.backends.kubernetes_logs.SILENT_S", 0.5)
    engine = start(quick={"node_lost_after": 1_500})
    watcher = watch(engine)
    launches = [run(watcher, "/bin/sleep", "600", key=a_key(index=i), node=f"node-{i}") for i in range(2)]
    watcher.running(*(launch.key for launch in launches))
    engine.cluster.down = True
    engine.cluster.break_off()
    time.sleep(4.0)
    engine.cluster.down = False
    until(lambda: not _unreachable(engine.backend))
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline:
        watcher.look(100)
    assert all(report.state is Seen.RUNNING for report in watcher.sight.replicas.values())
    assert len(watcher.sight.nodes) == 2


def _unreachable(backend: KubernetesBackend) -> bool:
    try:
        backend.observe()
    except BackendUnreachable:
        return True
    return False


def test_few_threads_read_many_logs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobsched.backends.kubernetes_logs.SLICE_S", 0.2)
    monkeypatch.setattr("jobsched.backends.kubernetes.MOST", 2)
    engine = start()
    watcher = watch(engine)
    launches = [run(watcher, "/bin/sh", "-c", f"sleep 1; echo I am {number}; sleep 600", key=a_key(index=number))
                for number in range(5)]

    def logged(number: int) -> bool:
        return f"I am {number}".encode() in b"".join(chunk.data for chunk in engine.backend.logs(launches[number].key))

    until(lambda: all(logged(number) for number in range(5)))
    readers = [one for one in threading.enumerate() if one.name == "kubernetes-log"]
    assert len(readers) <= 2
    watcher.backend.stop([launch.key for launch in launches], 0)
    for launch in launches:
        watcher.end(launch.key)


def test_where_no_kubelet_answers_one_pod_asks_for_all(start: Start) -> None:
    engine = start(node_lost_after="10m")
    watcher = watch(engine)
    launches = [run(watcher, "/bin/sleep", "600", key=a_key(index=number)) for number in range(6)]
    for launch in launches:
        watcher.running(launch.key)
    until(lambda: all(not heard.blind_since for heard in engine.backend.table.all()))
    engine.cluster.kill_kubelet("node-0")
    until(lambda: engine.backend.readers.deaf("node-0"))
    before, begun = engine.cluster.requests["GET pods/log"], time.monotonic()
    time.sleep(3.0)
    asked = engine.cluster.requests["GET pods/log"] - before
    assert asked <= 6 + 1 + (time.monotonic() - begun)  # those on their way, and then one asks for all
    assert {watcher.sight.replicas[launch.key].state for launch in launches} == {Seen.RUNNING}
    engine.cluster.start_kubelet("node-0")
    until(lambda: all(not heard.blind_since for heard in engine.backend.table.all()))


def test_a_log_is_collected_whole_although_streams_and_servers_end(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    launch = run(watcher, "/bin/sh", "-c", COUNT)
    (report,) = watcher.running(launch.key)
    for again in (engine.cluster.break_off, engine.reconnect, engine.cluster.break_off):
        before = len(the_log(Watcher(engine.backend), launch))
        until(lambda before=before: len(the_log(Watcher(engine.backend), launch)) > before)
        again()
    watcher = watch(engine)
    os.kill(engine.cluster.pid_of(report.ident), signal.SIGTERM)
    assert watcher.end(launch.key).exit_code == 0
    lines = the_log(watcher, launch).splitlines(keepends=True)
    assert lines == [f"line {i}\n" for i in range(len(lines))]
    assert len("".join(lines)) > before


def test_an_order_to_start_waits_until_it_is_known_what_runs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a replica whose pod is not listed yet would be taken for one that is over."""
    engine = start()
    watcher = watch(engine)
    launch = run(watcher, "/bin/sleep", "300")
    (before,) = watcher.running(launch.key)
    listed, may_list = KubernetesBackend._list_pods, threading.Event()

    def late(backend: KubernetesBackend, found: list[dict[str, Any]]) -> None:
        may_list.wait(60)
        listed(backend, found)

    monkeypatch.setattr(KubernetesBackend, "_list_pods", late)
    fresh = engine.reconnect()
    assert fresh._nodes.synced.wait(60)
    fresh.start([launch])
    assert not fresh.table.all()
    may_list.set()
    again = Watcher(fresh)
    (after,) = again.running(launch.key)
    assert after.ident == before.ident


def test_a_forgotten_version_is_listed_anew_page_by_page(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_watch, "PAGE", 3)
    engine = start()
    watcher = watch(engine)
    launches = [run(watcher, "/bin/sleep", "600", key=a_key(index=i)) for i in range(8)]
    watcher.running(*(launch.key for launch in launches))
    before = engine.cluster.requests["GET pods"]
    engine.cluster.down = True
    engine.cluster.forget_history()
    gone = engine.cluster.pods()[0]
    engine.cluster.remove("pods", "default", gone["metadata"]["name"])
    engine.cluster.forget_history()
    engine.cluster.down = False
    (lost,) = [launch for launch in launches if launch.key == gone["metadata"]["annotations"]["jobsched.dev/key"]]
    assert watcher.end(lost.key).failure is Reason.REPLICA_LOST
    assert sum(report.state is Seen.RUNNING for report in watcher.sight.replicas.values()) == 7
    assert engine.cluster.requests["GET pods"] - before >= 4


def test_a_directory_is_packed_and_unpacked(start: Start, tmp_path: Path) -> None:
    engine = start()
    watcher = watch(engine)
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (work / "sub/data.bin").write_bytes(os.urandom(1_500_000))
    (work / "skip.log").write_text("x")
    (work / ".jobschedignore").write_text("*.log\n")
    launch = run(watcher, "/bin/sleep", "600", working_dir=str(work))
    (report,) = watcher.running(launch.key)
    process = engine.cluster._process(report.ident)
    assert process is not None
    there = Path(f"{process.directory}{work}/directory")
    assert (there / "sub/data.bin").read_bytes() == (work / "sub/data.bin").read_bytes()
    assert not (there / "skip.log").exists()
    assert sum(name.startswith("configmaps/") for name in engine.cluster.everything()) == 3


def test_a_directory_that_is_too_large_is_refused_with_the_remedy(start: Start, tmp_path: Path) -> None:
    watcher = watch(start(copy_limit="1Ki"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work/big").write_bytes(bytes(2_000))
    end = watcher.end(run(watcher, "true", working_dir=str(tmp_path / "work")).key)
    assert end.failure is Reason.START_FAILED
    assert ".jobschedignore" in end.message


def test_secrets_are_references_that_the_cluster_resolves(start: Start) -> None:
    engine = start()
    engine.cluster.put("secrets", "default", "jobsched-secrets", {
        "metadata": {}, "data": {"key": base64.b64encode(b"hush").decode()}})
    watcher = watch(engine)
    launch = run(watcher, "/bin/sh", "-c", "echo $KEY", env={"KEY": "secret://key"})
    missing = run(watcher, "true", key=a_key(index=1), env={"KEY": "secret://other"})
    watcher.ended(launch.key, missing.key)
    assert the_log(watcher, launch) == "hush\n"
    assert watcher.sight.replicas[missing.key].failure is Reason.START_FAILED
    assert "other" in watcher.sight.replicas[missing.key].message
    assert "hush" not in str(engine.cluster.pods())


def test_a_namespace_that_is_gone_is_no_fault_of_the_jobs(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    launch = run(watcher, "/bin/sleep", "600")
    watcher.running(launch.key)
    engine.cluster.remove("namespaces", "", "default")
    for pod in engine.cluster.pods():
        engine.cluster.delete_pod("default", pod["metadata"]["name"], 1)
    assert watcher.end(launch.key).failure is Reason.REPLICA_LOST
    again = run(watcher, "/bin/sleep", "600", key=a_key(attempt=2))
    end = watcher.end(again.key)
    assert end.failure is Reason.REPLICA_LOST
    assert 'namespaces "default" not found' in end.message


def test_no_cluster_is_unreachable_and_not_empty(tmp_path: Path) -> None:
    cluster = FakeCluster()
    config = Config(kubeconfig=cluster.kubeconfig(tmp_path / "kubeconfig"))
    cluster.close()
    backend = KubernetesBackend(tmp_path / "home", config)
    with pytest.raises(BackendUnreachable):
        backend.observe()
    backend.close()


def test_no_configuration_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        KubernetesBackend(tmp_path / "home", Config(kubeconfig=str(tmp_path / "nothing")))
    assert "KUBECONFIG" in caught.value.hint


def test_what_the_cluster_says_of_pods_and_nodes_is_told_also_to_a_new_server(start: Start) -> None:
    job = "01m8dx25xp309nd1jfg08q1qf9"
    engine = start(instance="mine")
    watcher = watch(engine)
    launch = run(watcher, "/bin/sleep", "300", key=a_key(job))
    watcher.running(launch.key)

    def says(name: str, namespace: str, kind: str, about: str, reason: str, **fields: object) -> None:
        engine.cluster.put("events", namespace, name, {
            "metadata": {}, "involvedObject": {"kind": kind, "name": about}, "reason": reason, "message": "m",
            "type": "Normal", **fields,
        })  # fmt: skip

    pod = f"js-mine-{job}-1-worker-0-0"
    says("a", "default", "Pod", pod, "BackOff", type="Warning", count=2)
    says("b", "default", "Pod", pod, "Pulling")
    says("c", "default", "Pod", pod, "Started")
    says("d", "default", "Pod", "somebody-else", "BackOff", type="Warning")
    says("e", "default", "Node", "node-0", "NodeNotReady")
    says("f", "default", "Node", "node-1", "NodeNotReady")

    def told() -> list[tuple[str, int]]:
        found = engine.backend.incidents(JobId(job), [NodeName("node-0")])
        return sorted((one.reason, one.count) for one in found)

    until(lambda: told() == [("BackOff", 2), ("NodeNotReady", 1), ("Pulling", 1)])
    says("a", "default", "Pod", pod, "BackOff", type="Warning", count=7)
    until(lambda: ("BackOff", 7) in told())
    engine.reconnect()
    watch(engine)
    assert told() == [("BackOff", 7), ("NodeNotReady", 1), ("Pulling", 1)]
