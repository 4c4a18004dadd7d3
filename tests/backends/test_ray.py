"""The Ray backend on a real cluster of two nodes: it keeps every promise of a backend, and those of actors besides."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobsched.backends.supervisor import processes
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.observation import ReplicaReport, Seen
from jobsched.core.resources import GpuShare, NodeName
from jobsched.errors import BackendUnreachable
from jobsched.spec.backends import RayBackend as Config
from tests.backends import ray_stage
from tests.contracts.backend import PATIENCE_S, CommandEngine, ProcessBackendContract, Watcher, a_key, a_launch

if TYPE_CHECKING:
    from jobsched.backends.ray import RayBackend

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1_500), ray_stage.needs_ray]

AT_ONCE_S = 60
"""For what is told in two or three seconds: a machine that others use takes longer, and somebody is held up."""


@pytest.fixture(autouse=True)
def _alone_and_patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A driver or an actor that is late is not given up."""
    for name in ("SILENT_S", "ANSWER_S", "ASKED_S", "CLOSE_S"):
        monkeypatch.setattr(f"jobsched.backends.ray.{name}", PATIENCE_S)
    with ray_stage.alone():
        yield


class RayEngine(CommandEngine["RayBackend"]):
    """`tests.contracts.backend.Engine` for actors."""

    def __init__(self, home: Path, **fields: object) -> None:
        self.home = home
        self.config = Config.model_validate({
            "address": fields.get("address") or ray_stage.address(), "gpu_kinds": {"SIM": "sim-gpu"},
            "working_dir": "shared", "scratch": str(home.parent), "ports": "22000-22999",
        } | fields)
        super().__init__()

    def connect(self) -> RayBackend:
        from jobsched.backends.ray import RayBackend

        return RayBackend(self.home, self.config)

    def kill(self, report: ReplicaReport) -> None:
        for pid in self.processes(report.key):
            os.kill(pid, signal.SIGKILL)

    def processes(self, key: LaunchKey | str = "") -> set[int]:
        """Living processes of a replica (or of all) on any node of this machine."""
        return {p.pid for p in processes.table().values()
                if p.alive and (mark := processes.marker(p.pid)).endswith(f":{key}" if key else "")
                and mark.partition(":")[0] in self.marks()}

    def marks(self) -> set[str]:
        """Ids of the supervisors' homes on the nodes."""
        from jobsched.backends.supervisor.protocol import Layout

        return {Layout(home).home_id for home in self.home.parent.glob(f"jobsched-ray-*/{self.backend.home_id}/*")}

    def clean_up(self) -> None:
        """Stop and forget all; what is left then is a defect."""
        home_id = self.backend.home_id
        deadline = time.monotonic() + PATIENCE_S
        while left := [*ray_stage.actors(home_id), *ray_stage.groups(home_id), *self.processes()]:
            assert time.monotonic() < deadline, left
            keys = [LaunchKey(name.split(":")[2]) for name in ray_stage.actors(home_id)]
            self.backend.stop(keys, 0)
            self.backend.forget(keys)
            if not keys:  # groups whose actors somebody else has killed: a new server drops them
                self.reconnect().observe()
            time.sleep(0.1)
        self.backend.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RayEngine]:
    engine = RayEngine(tmp_path / "home")
    yield engine
    engine.clean_up()


class TestRayBackend(ProcessBackendContract):
    """`engine` is above."""


# and besides ----------------------------------------------------------------------------------------------------------


Start = Callable[..., RayEngine]
COUNT = "i=0; until [ -e $ENOUGH ]; do echo line $i; i=$((i+1)); sleep 0.05; done"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Backends with settings of their own."""
    made: list[RayEngine] = []

    def start(**fields: Any) -> RayEngine:
        made.append(RayEngine(tmp_path / f"home-{len(made)}", **fields))
        return made[-1]

    yield start
    for engine in made:
        engine.clean_up()


def watch(engine: RayEngine) -> Watcher:
    watcher = Watcher(engine.backend)
    watcher.look()
    return watcher


def the_log(watcher: Watcher, launch: Launch) -> str:
    return b"".join(chunk.data for chunk in watcher.backend.logs(launch.key)).decode()


def on(watcher: Watcher, name: str, *command: str, **fields: Any) -> Launch:
    """A launch for the node of this name."""
    return a_launch(watcher.sight.nodes[NodeName(name)], command, fields.pop("key", None), **fields)


def test_nodes_are_those_of_the_cluster(engine: RayEngine) -> None:
    watcher = watch(engine)
    one, two = (watcher.sight.nodes[NodeName(name)] for name in ("one", "two"))
    assert (one.cpu_milli, one.memory_bytes, [gpu.kind for gpu in one.gpus]) == (8_000, 8 << 30, ["sim-gpu"] * 4)
    assert (one.label("rack"), two.label("rack")) == ("r0", "r1")
    assert one.port_from != two.port_from, "they share an address"


def test_an_actor_killed_behind_our_back_takes_its_replica_along(engine: RayEngine) -> None:
    watcher = watch(engine)
    launch = on(watcher, "two", "/bin/sh", "-c", "setsid sleep 300 & exec sleep 300")
    watcher.backend.start([launch])
    watcher.running(launch.key)
    deadline = time.monotonic() + PATIENCE_S
    while len(engine.processes(launch.key)) < 2:
        assert time.monotonic() < deadline
    ray = ray_stage.driver()
    ray.kill(ray.get_actor(f"jobsched:{engine.backend.home_id}:{launch.key}", namespace="jobsched"))
    end = watcher.end(launch.key)
    assert (end.exit_code, end.signal, end.failure) == (None, None, Reason.NONE), "lost: nobody saw how it ended"
    assert "ray.kill" in end.message
    deadline = time.monotonic() + PATIENCE_S
    while engine.processes(launch.key):
        assert time.monotonic() < deadline, "its processes outlive it"


def test_an_actor_that_went_while_nobody_looked_is_not_run_twice(engine: RayEngine) -> None:
    watcher = watch(engine)
    launch = on(watcher, "one", "/bin/sleep", "300")
    watcher.backend.start([launch])
    watcher.running(launch.key)
    engine.backend.close()
    ray = ray_stage.driver()
    ray.kill(ray.get_actor(f"jobsched:{engine.backend.home_id}:{launch.key}", namespace="jobsched"))
    while ray_stage.actors(engine.backend.home_id):
        time.sleep(0.05)
    engine.reconnect()
    again = watch(engine)
    assert again.sight.replicas == {}
    engine.backend.start([launch])
    end = again.end(launch.key)
    assert (end.exit_code, end.signal, end.failure) == (None, None, Reason.NONE)


def test_a_driver_that_dies_is_replaced_and_replicas_do_not_notice(engine: RayEngine, tmp_path: Path) -> None:
    watcher = watch(engine)
    launch = on(watcher, "one", "/bin/sh", "-c", COUNT, env={"ENOUGH": str(tmp_path / "enough")})
    watcher.backend.start([launch])
    (before,) = watcher.running(launch.key)
    dead = engine.backend.driver
    assert dead is not None
    dead.kill()
    deadline = time.monotonic() + PATIENCE_S
    while engine.backend.driver is dead or not _answers(watcher):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (watcher.sight.replicas[launch.key].state, watcher.sight.replicas[launch.key].ident) == (
        Seen.RUNNING, before.ident)
    (tmp_path / "enough").touch()
    assert watcher.end(launch.key).exit_code == 0
    lines = the_log(watcher, launch).splitlines()
    assert len(lines) > 1
    assert lines == [f"line {i}" for i in range(len(lines))]


def _trouble(watcher: Watcher) -> str:
    """What makes the cluster unreachable, as soon as it is."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            watcher.look(200)
        except BackendUnreachable as error:
            return error.message
    raise AssertionError("it answers")


def _answers(watcher: Watcher) -> bool:
    try:
        watcher.look()
    except BackendUnreachable:
        return False
    return True


def test_what_others_hold_is_not_ours_and_what_we_hold_is_not_theirs(start: Start) -> None:
    ray_stage.driver()
    from ray.util.placement_group import placement_group, remove_placement_group

    engine = start()
    watcher = watch(engine)
    two = watcher.sight.nodes[NodeName("two")]
    launch = on(watcher, "two", "/bin/sleep", "300", cpu_milli=500, gpus=[GpuShare(two.gpus[3].id)])
    watcher.backend.start([launch])
    watcher.running(launch.key)
    engine.config = engine.config.model_copy(update={"bind_timeout": 2_000})
    engine.reconnect()
    watcher = watch(engine)
    theirs = placement_group([{"CPU": 1.5, "GPU": 2, "memory": 1 << 30}], bundle_label_selector=[{"rack": "r1"}])
    try:
        assert theirs.wait(PATIENCE_S)
        watcher.until(lambda s: s.nodes[NodeName("two")].foreign.cpu_milli == 1_500)
        seen = watcher.sight.nodes[NodeName("two")]
        assert (seen.foreign.cpu_milli, seen.foreign.memory_bytes) == (1_500, 1 << 30)
        assert [share.gpu for share in seen.foreign_gpus] == [gpu.id for gpu in two.gpus[1:3]], "not the one we use"
        late = on(watcher, "two", "/bin/true", key=a_key(index=1), gpus=[GpuShare(gpu.id) for gpu in two.gpus[:2]])
        watcher.backend.start([late])
        end = watcher.end(late.key)
        assert (end.failure, end.exit_code) == (Reason.START_TIMEOUT, None)
        assert "ray status" in end.message
    finally:
        remove_placement_group(theirs)
    watcher.until(lambda s: not s.nodes[NodeName("two")].foreign.cpu_milli)
    assert watcher.sight.nodes[NodeName("two")].foreign_gpus == ()


def test_a_gang_is_one_group_and_a_restart_takes_its_bundle_again(engine: RayEngine) -> None:
    watcher = watch(engine)
    two = watcher.sight.nodes[NodeName("two")]
    gang = [on(watcher, name, "/bin/sleep", "300", key=a_key(index=at), cpu_milli=5_000)
            for at, name in enumerate(("one", "two"))]
    watcher.backend.start(gang)
    watcher.running(*(one.key for one in gang))
    assert len(ray_stage.groups(engine.backend.home_id)) == 1
    for pid in engine.processes(gang[1].key):
        os.kill(pid, signal.SIGKILL)
    watcher.end(gang[1].key)
    watcher.backend.forget([gang[1].key])
    watcher.until(lambda s: s.nodes[NodeName("two")].foreign.cpu_milli == 5_000)  # nobody else gets it
    again = replace(gang[1], key=a_key(index=1, restart=1))
    watcher.backend.start([again])
    watcher.running(again.key)
    assert len(ray_stage.groups(engine.backend.home_id)) == 1
    watcher.until(lambda s: s.nodes[NodeName("two")].foreign.cpu_milli == 0)
    elastic = [replace(on(watcher, "two", "/bin/sleep", "300", key=a_key(role="extra", index=at))) for at in range(2)]
    elastic = [replace(one, contract=replace(one.contract, elastic=True)) for one in elastic]
    watcher.backend.start(elastic)
    watcher.running(*(one.key for one in elastic))
    assert len(ray_stage.groups(engine.backend.home_id)) == 3
    watcher.backend.stop([elastic[0].key], 0)
    watcher.end(elastic[0].key)
    watcher.backend.forget([elastic[0].key])
    deadline = time.monotonic() + PATIENCE_S
    while len(ray_stage.groups(engine.backend.home_id)) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert two.ready


def test_a_directory_is_copied_and_gone_afterwards(start: Start, tmp_path: Path) -> None:
    engine = start(working_dir="copy", copy_limit="1Ki")
    watcher = watch(engine)
    work = tmp_path / "work"
    (work / "junk").mkdir(parents=True)
    (work / "train.py").write_text("import os; print(sorted(os.listdir('.')), os.getcwd())")
    (work / "junk/big").write_bytes(bytes(2_000))
    (work / ".jobschedignore").write_text("junk")
    launch = on(watcher, "one", "python", "train.py", working_dir=str(work))
    watcher.backend.start([launch])
    assert watcher.end(launch.key).exit_code == 0
    said = the_log(watcher, launch)
    assert said.startswith("['.jobschedignore', 'train.py'] ")
    place = Path(said.split()[-1])
    assert place.is_relative_to(tmp_path)
    (work / ".jobschedignore").unlink()
    large = on(watcher, "one", "python", "train.py", key=a_key(index=1), working_dir=str(work))
    watcher.backend.start([large])
    end = watcher.end(large.key)
    assert end.failure is Reason.START_FAILED
    assert ".jobschedignore" in end.message
    watcher.backend.forget([launch.key, large.key])
    deadline = time.monotonic() + PATIENCE_S
    while place.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_secrets_are_resolved_and_missing_ones_are_told(engine: RayEngine) -> None:
    watcher = watch(engine)
    path = engine.home / "secrets" / "key"
    path.write_text("hush\n")
    path.chmod(0o600)
    launch = on(watcher, "one", "/bin/sh", "-c", "echo $KEY $RAY_ADDRESS", env={"KEY": "secret://key"})
    missing = on(watcher, "one", "true", key=a_key(index=1), env={"KEY": "secret://other"})
    watcher.backend.start([launch, missing])
    watcher.ended(launch.key, missing.key)
    assert the_log(watcher, launch) == f"hush {ray_stage.address()}\n"
    assert "there is no secret 'other'" in watcher.sight.replicas[missing.key].message


def test_memory_is_limited_and_running_out_of_it_is_told(engine: RayEngine) -> None:
    watcher = watch(engine)
    launch = on(watcher, "one", "python", "-c", "x = b'x' * 300_000_000", memory_bytes=64 << 20)
    watcher.backend.start([launch])
    assert watcher.end(launch.key).failure is Reason.OOM


def test_no_cluster_is_unreachable_and_not_empty(tmp_path: Path) -> None:
    from jobsched.backends.ray import RayBackend

    backend = RayBackend(tmp_path, Config(address="127.0.0.1:1"))
    with pytest.raises(BackendUnreachable, match="Ray cluster"):
        backend.observe()
    backend.close()


@pytest.mark.slow
def test_a_node_that_dies_is_lost_with_its_replicas(engine: RayEngine) -> None:
    watcher = watch(engine)
    with ray_stage.mortal_node() as kill:
        watcher.until(lambda s: "mortal" in s.nodes)
        there = on(watcher, "mortal", "/bin/sleep", "300", key=a_key(index=1))
        here = on(watcher, "one", "/bin/sleep", "300")
        watcher.backend.start([here, there])
        watcher.running(here.key, there.key)
        kill()
        end = watcher.end(there.key)
        assert end.failure is Reason.NODE_LOST
        assert "mortal" not in watcher.sight.nodes
        assert watcher.sight.replicas[here.key].state is Seen.RUNNING
        deadline = time.monotonic() + PATIENCE_S
        while engine.processes(there.key):
            assert time.monotonic() < deadline, "its processes outlive the node"


@pytest.mark.slow
def test_a_head_that_is_restarted_is_told_at_once_and_nothing_runs_twice(tmp_path: Path) -> None:
    """And on the new one, Ray's own memory monitor kills whatever it can: that is told as what it is."""
    head = ray_stage.Head(tmp_path)
    head.start()
    engine = RayEngine(tmp_path / "home", address=head.address)
    try:
        watcher = watch(engine)
        launch = on(watcher, "head", "/bin/sleep", "300")
        watcher.backend.start([launch])
        watcher.running(launch.key)
        begun = time.monotonic()
        head.kill()
        assert "does not answer" in _trouble(watcher)
        assert time.monotonic() - begun < AT_ONCE_S
        while engine.processes(launch.key):
            assert time.monotonic() - begun < PATIENCE_S, "its processes outlive the cluster"
            time.sleep(0.05)
        head.start(memory_usage_threshold=0.01, memory_monitor_refresh_ms=200)
        deadline = time.monotonic() + PATIENCE_S
        while not _answers(watcher):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        end = watcher.end(launch.key)
        assert (end.exit_code, end.signal, end.failure) == (None, None, Reason.NODE_LOST)
        hungry = on(watcher, "head", "/bin/sleep", "300", key=a_key(index=1))
        watcher.backend.start([hungry])
        end = watcher.end(hungry.key)
        assert end.failure is Reason.OOM, end
        watcher.backend.forget([launch.key, hungry.key])
    finally:
        engine.backend.close()
        head.kill()
