"""The Docker backend on a real engine: it keeps every promise of a backend, and those of containers besides."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobsched.backends.docker_render import HOME
from jobsched.core.job import Reason
from jobsched.core.launch import Launch
from jobsched.core.observation import ReplicaReport, Seen, Sight
from jobsched.core.pools import Demand, NodePool
from jobsched.core.resources import JobId, NodeName
from jobsched.errors import BackendUnreachable
from jobsched.spec.backends import DockerBackend as Config
from tests.backends import docker_stage
from tests.contracts.backend import PATIENCE_S, CommandEngine, ProcessBackendContract, Watcher, a_key, a_launch

if TYPE_CHECKING:
    from jobsched.backends.docker import DockerBackend

pytestmark = [pytest.mark.e2e, docker_stage.needs_docker]

SECONDS_S = 60
"""For what is told in a second or two: a machine that others use takes ten times as long, and somebody is held up."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives an order a second time here, as the loop does, so the first one must not be given up."""
    monkeypatch.setattr("jobsched.backends.docker.ANSWER_S", PATIENCE_S)


class DockerEngine(CommandEngine["DockerBackend"]):
    """`tests.contracts.backend.Engine` for containers."""

    def __init__(self, home: Path, **fields: object) -> None:
        engine = {"url": docker_stage.url(), "gpus": "sim-gpu:4", "same_files": True}
        self.home = home
        self.config = Config.model_validate({"image": docker_stage.image(), "engines": [engine]} | fields)
        super().__init__()

    def connect(self) -> DockerBackend:
        from jobsched.backends.docker import DockerBackend

        return DockerBackend(self.home, self.config)

    def kill(self, report: ReplicaReport) -> None:
        docker_stage.api().kill(report.ident)

    @property
    def label(self) -> str:
        return f"{HOME}={self.backend.home_id}"

    def clean_up(self) -> None:
        nobody = not self.backend.table.all()
        self.backend.close()
        if nobody:
            assert not self.backend.layout.sockets.exists()
        api = docker_stage.api()
        for entry in api.containers(all=True, filters={"label": self.label}):
            with suppress(docker_stage.api_error()):  # it is being removed already
                api.remove_container(entry["Id"], force=True, v=True)
        for network in api.networks(filters={"label": self.label}):
            with suppress(docker_stage.api_error()):
                api.remove_network(network["Id"])


@pytest.fixture
def engine(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerEngine]:
    engine = DockerEngine(
        tmp_path / "home", user=f"{os.getuid()}:{os.getgid()}", volumes=[str(tmp_path_factory.getbasetemp())])
    yield engine
    engine.clean_up()


class TestDockerBackend(ProcessBackendContract):
    """`engine` is above."""


# and besides ----------------------------------------------------------------------------------------------------------


Start = Callable[..., DockerEngine]
LIBRARY = "import time\nfrom jobsched.train.context import context\n"
COUNT = "trap 'told=1' TERM; i=0; while [ -z \"$told\" ]; do echo line $i; i=$((i+1)); " \
        "[ $((i % 20)) = 0 ] && sleep 0.01; done; true"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Backends with settings of their own."""
    made: list[DockerEngine] = []

    def start(**fields: Any) -> DockerEngine:
        made.append(DockerEngine(tmp_path / f"home-{len(made)}", **fields))
        return made[-1]

    yield start
    for engine in made:
        engine.clean_up()


def watch(engine: DockerEngine) -> Watcher:
    watcher = Watcher(engine.backend)
    watcher.look()
    return watcher


def run(watcher: Watcher, *command: str, **fields: Any) -> Launch:
    """One replica, ordered."""
    node = next(iter(watcher.sight.nodes.values()))
    launch = a_launch(node, command, fields.pop("key", None), **fields)
    watcher.backend.start([launch])
    return launch


def the_log(watcher: Watcher, launch: Launch) -> str:
    return b"".join(chunk.data for chunk in watcher.backend.logs(launch.key)).decode()


LOOK_INSIDE = """
import os
for line in open('/proc/self/status'):
    if line.split(':')[0] in ('CapEff', 'NoNewPrivs', 'Seccomp'): print(line.replace('\t', ' ').strip())
print('user', os.getuid(), os.getgid(), os.environ['USER'], os.environ['HOME'])
shm = os.statvfs('/dev/shm'); print('shm', shm.f_blocks * shm.f_frsize // 2**20)
def may(path):
    try: open(path, 'w').close(); os.unlink(path)
    except OSError as error: return error.strerror
    return 'yes'
print('files', sorted(os.listdir('.')), open('train.py').read())
for name, path in [('cwd', 'x'), ('scratch', os.environ['JOBSCHED_SCRATCH_DIR'] + '/x'), ('tmp', '/tmp/x'),
                   ('root', '/usr/x'), ('checkpoints', os.environ['JOBSCHED_CHECKPOINT_DIR'] + '/x')]:
    print(name, may(path))
"""


@pytest.mark.parametrize("read_only", [False, True])
def test_a_container_may_do_no_more_than_it_needs(start: Start, tmp_path: Path, read_only: bool) -> None:
    engine = start(user="65532:65532", shm_size="48Mi", read_only=read_only)
    watcher = watch(engine)
    work = tmp_path / "work"
    (work / "junk").mkdir(parents=True)
    (work / "train.py").write_text("pass")
    (work / ".jobschedignore").write_text("junk")
    launch = a_launch(next(iter(watcher.sight.nodes.values())), ("python", "-c", LOOK_INSIDE), working_dir=str(work))
    place = f"{engine.backend.capabilities.checkpoint_root}/job-1"
    watcher.backend.start([replace(launch, contract=replace(launch.contract, checkpoint_dir=place))])
    assert watcher.end(launch.key).exit_code == 0
    said = dict(line.split(" ", 1) for line in the_log(watcher, launch).splitlines())
    assert (said["CapEff:"], said["NoNewPrivs:"], said["Seccomp:"]) == ("0000000000000000", "1", "2")
    assert (said["user"], said["shm"]) == ("65532 65532 jobsched /scratch", "48")
    assert said["files"] == "['.jobschedignore', 'train.py'] pass"
    refused = "Read-only file system" if read_only else "Permission denied"
    assert said["root"] == refused
    assert said["cwd"] == ("Permission denied" if read_only else "yes")
    assert [said[name] for name in ("scratch", "tmp", "checkpoints")] == ["yes"] * 3


def test_peers_find_each_other_by_name_and_nothing_is_left_over(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    assert watcher.backend.capabilities.name_template == "{role}-{index}"
    node = next(iter(watcher.sight.nodes.values()))
    serve = "import socket; s = socket.create_server(('', 2222)); c, _ = s.accept(); c.sendall(b'hello')"
    call = ("import socket, time\nfor _ in range(600):\n  try: s = socket.create_connection(('worker-0', 2222))\n"
            "  except OSError: time.sleep(0.1)\n  else: print(s.recv(9).decode()); break")
    launches = [a_launch(node, ("python", "-c", text), a_key(index=index)) for index, text in enumerate((serve, call))]
    peers = {"worker": ("worker-0:2222", "worker-1:2222")}
    launches = [replace(one, contract=replace(one.contract, peers=peers)) for one in launches]
    watcher.backend.start(launches)
    assert [end.exit_code for end in watcher.ended(*(one.key for one in launches))] == [0, 0]
    assert the_log(watcher, launches[1]) == "hello\n"
    assert len(docker_stage.leftovers(engine.label)) == 3
    watcher.backend.forget([one.key for one in launches])
    watcher.until(lambda s: not s.replicas)
    deadline = time.monotonic() + PATIENCE_S
    while docker_stage.leftovers(engine.label) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert docker_stage.leftovers(engine.label) == []


def test_an_image_that_cannot_be_had_is_told_in_seconds(start: Start) -> None:
    watcher = watch(start())
    begun = time.monotonic()
    nowhere = run(watcher, "true", image="127.0.0.1:1/no/such:1")
    never = run(watch(start(pull="never")), "true", image="jobsched-test/not-here:1")
    end = watcher.end(nowhere.key)
    assert time.monotonic() - begun < SECONDS_S
    assert (end.failure, end.exit_code, end.signal) == (Reason.IMAGE_ERROR, None, None)
    assert "127.0.0.1:1/no/such:1" in end.message
    assert "refused" in end.message
    assert the_log(watcher, nowhere).startswith("jobsched: image 127.0.0.1:1/no/such:1: ")
    assert never.key == nowhere.key


class Forbidding(BaseHTTPRequestHandler):
    """A registry that lets nobody in."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="registry"')
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_a_registry_that_refuses_the_credentials_is_told_in_seconds(start: Start) -> None:
    watcher = watch(start())
    with HTTPServer(("127.0.0.1", 0), Forbidding) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        begun = time.monotonic()
        launch = run(watcher, "true", image=f"127.0.0.1:{registry.server_port}/secret:1")
        end = watcher.end(launch.key)
        assert time.monotonic() - begun < SECONDS_S
        registry.shutdown()
    assert end.failure is Reason.IMAGE_ERROR
    assert "credentials" in end.message


def test_memory_is_limited_and_running_out_of_it_is_told(start: Start) -> None:
    watcher = watch(start())
    launch = run(watcher, "python", "-c", "x = b'x' * 300_000_000", memory_bytes=48 << 20)
    assert watcher.end(launch.key).failure is Reason.OOM


def test_what_the_engine_says_of_containers_is_told_also_to_a_new_server(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    launch = run(watcher, "/bin/sleep", "300", key=a_key("told"))
    (report,) = watcher.running(launch.key)
    docker_stage.api().kill(report.ident, "SIGKILL")
    watcher.end(launch.key)

    def told() -> list[str]:
        return [f"{one.reason}: {one.message}" for one in engine.backend.incidents(JobId("told"))]

    watcher.until(lambda _: told() == ["Killed: signal 9", "Died: exit code 137"])
    engine.reconnect()
    watcher = watch(engine)
    assert told() == ["Killed: signal 9", "Died: exit code 137"]
    refused = run(watcher, "true", image="127.0.0.1:1/no/such:1", key=a_key("refused"))
    watcher.end(refused.key)
    reasons = [(one.reason, one.warning) for one in engine.backend.incidents(JobId("refused"))]
    assert reasons == [("Pulling", False), ("ImageError", True)]


def test_removed_behind_our_back_also_while_nobody_looked(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    launches = [run(watcher, "/bin/sleep", "300", key=a_key(index=index)) for index in range(2)]
    first, second = watcher.running(*(one.key for one in launches))
    docker_stage.api().remove_container(first.ident, force=True)
    assert watcher.end(first.key).exit_code is None
    engine.backend.close()
    docker_stage.api().remove_container(second.ident, force=True)
    watcher.sight.replicas.clear()
    engine.reconnect()
    again = watch(engine)
    assert again.sight.replicas == {}
    engine.backend.start(launches[1:])
    end = again.end(second.key)
    assert (end.exit_code, end.signal, end.failure) == (None, None, Reason.NONE), "lost, and not run twice"


def test_a_container_left_half_made_is_made_anew(start: Start) -> None:
    engine = start()
    made = docker_stage.api().create_container(
        docker_stage.image(), ["sleep", "300"], name=f"jobsched-{engine.backend.home_id}-job-1-1-worker-0-0",
        labels={HOME: engine.backend.home_id, "dev.jobsched.key": a_key()})
    engine.reconnect()
    watcher = watch(engine)
    assert watcher.sight.replicas == {}
    launch = run(watcher, "/bin/sh", "-c", "exit 3")
    assert watcher.end(launch.key).exit_code == 3
    assert docker_stage.api().containers(all=True, filters={"id": made["Id"]}) == []


def test_what_others_reserve_is_not_ours(start: Start) -> None:
    watcher = watch(start())
    api = docker_stage.api()
    other = api.create_container(docker_stage.image(), ["sleep", "300"], host_config=api.create_host_config(
        nano_cpus=507_000_000, mem_limit=(64 << 20) + (12 << 10)))

    def odd(sight: Sight) -> tuple[int, int]:
        """Thousandths of a CPU and bytes: tests that run beside this one reserve round numbers."""
        foreign = next(iter(sight.nodes.values())).foreign
        return foreign.cpu_milli % 10, foreign.memory_bytes % (1 << 20)

    try:
        api.start(other["Id"])
        watcher.until(lambda s: odd(s) == (7, 12 << 10))
        assert next(iter(watcher.sight.nodes.values())).foreign.memory_bytes > 64 << 20
    finally:
        api.remove_container(other["Id"], force=True)
    watcher.until(lambda s: odd(s) == (0, 0))


def test_where_no_files_are_shared_reports_come_in_the_log_and_are_not_shown(start: Start) -> None:
    engine = start(engines=[{"url": docker_stage.url(), "same_files": False}], checkpoints="/nowhere")
    watcher = watch(engine)
    script = LIBRARY + ("print('begin')\ncontext.report(step=3, total=9)\ncontext.checkpoint_saved('/c/3')\n"
                        "time.sleep(0.3)\nprint('end')")
    launch = run(watcher, "python", "-c", script)
    progress = watcher.end(launch.key).progress
    assert progress is not None
    assert (progress.step, progress.total, progress.saved_path) == (3, 9, "/c/3")
    assert the_log(watcher, launch) == "begin\nend\n"


def test_a_log_is_collected_whole_across_servers(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    launch = run(watcher, "/bin/sh", "-c", COUNT)
    for _ in range(2):
        (report,) = watcher.running(launch.key)
        before = len(the_log(watcher, launch))
        watcher.until(lambda _, watcher=watcher, before=before: len(the_log(watcher, launch)) > before)
        engine.reconnect()
        watcher = watch(engine)
    docker_stage.api().kill(report.ident, "SIGTERM")
    assert watcher.end(launch.key).exit_code == 0
    lines = the_log(watcher, launch).splitlines(keepends=True)
    assert lines == [f"line {i}\n" for i in range(len(lines))]
    assert len("".join(lines)) > before


def test_stacks_come_from_replicas_that_use_the_library(start: Start) -> None:
    watcher = watch(start())
    script = LIBRARY + "def the_odd_place():\n  context.report(step=1)\n  time.sleep(300)\nthe_odd_place()"
    launch = run(watcher, "python", "-c", script)
    watcher.until(lambda s: launch.key in s.replicas and s.replicas[launch.key].progress)
    watcher.backend.ask_stacks([launch.key])
    watcher.until(lambda s: s.replicas[launch.key].stacks)
    assert "the_odd_place" in watcher.sight.replicas[launch.key].stacks


def test_a_stopped_interpreter_is_seen_to_be_idle(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    script = LIBRARY + "context.report(step=1)\ntime.sleep(300)"
    launch = run(watcher, "python", "-c", script)
    watcher.until(lambda s: launch.key in s.replicas and s.replicas[launch.key].progress)
    docker_stage.freeze(watcher.sight.replicas[launch.key].ident)
    watcher.until(lambda s: s.replicas[launch.key].idle_age_ms >= 1_000)


def test_a_directory_that_is_too_large_is_refused_with_the_remedy(start: Start, tmp_path: Path) -> None:
    watcher = watch(start(copy_limit="1Ki"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work/big").write_bytes(bytes(2_000))
    end = watcher.end(run(watcher, "true", working_dir=str(tmp_path / "work")).key)
    assert end.failure is Reason.START_FAILED
    assert ".jobschedignore" in end.message


def test_secrets_are_resolved_and_missing_ones_are_told(start: Start) -> None:
    engine = start()
    watcher = watch(engine)
    path = engine.home / "secrets" / "key"
    path.write_text("hush\n")
    path.chmod(0o600)
    launch = run(watcher, "/bin/sh", "-c", "echo $KEY", env={"KEY": "secret://key"})
    missing = run(watcher, "true", key=a_key(index=1), env={"KEY": "secret://other"})
    watcher.ended(launch.key, missing.key)
    assert the_log(watcher, launch) == "hush\n"
    assert "there is no secret 'other'" in watcher.sight.replicas[missing.key].message


def test_no_engine_is_unreachable_and_not_empty(tmp_path: Path) -> None:
    from jobsched.backends.docker import DockerBackend

    backend = DockerBackend(tmp_path, Config.model_validate({"engines": [{"url": f"unix://{tmp_path}/no.sock"}]}))
    with pytest.raises(BackendUnreachable):
        backend.observe()
    backend.close()


def _late(monkeypatch: pytest.MonkeyPatch, back: threading.Event) -> None:
    """The rest of a log is read only when the engine is back, and the engine is listed only after that."""
    from jobsched.backends.docker_engine import Engine

    log, knock, past_events, asked = Engine.log, Engine.knock, Engine.past_events, threading.Event()

    def late_log(engine: Engine, container: str, since_s: int, follow: bool) -> Any:
        if not follow:
            back.wait(PATIENCE_S)
        return log(engine, container, since_s, follow)

    def late_listing(engine: Engine, until: str) -> Any:
        if engine.config.name == "two":
            asked.wait(PATIENCE_S)
        return past_events(engine, until)

    def heard_knock(engine: Engine) -> None:
        knock(engine)
        asked.set()

    monkeypatch.setattr(Engine, "log", late_log)
    monkeypatch.setattr(Engine, "past_events", late_listing)
    monkeypatch.setattr(Engine, "knock", heard_knock)


STAND_IN = """
import json, pathlib, sys
(pool,) = json.load(sys.stdin)["pools"]
told = pathlib.Path(sys.argv[1])
told.write_text(json.dumps(pool))
if not told.with_suffix(".again").exists():
    told.with_suffix(".again").touch()
    sys.exit("the cloud is busy")
one = {"pool": pool["name"], "name": "a100-1", "url": sys.argv[2], "address": "127.0.0.1", "gpus": "sim-gpu:2"}
print(json.dumps({"engines": [one] * (pool["nodes"] > 0)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="a second engine needs root")
def test_a_command_makes_engines_and_takes_them_away(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails the first time and is run again; a new server knows the engines at once."""
    monkeypatch.setattr("jobsched.backends.docker_pools.AGAIN_S", 0.2)
    pool = NodePool("a100", 1_000, 1 << 30, "sim-gpu", 2, labels=(("pool", "a100"),))
    with docker_stage.SecondEngine(tmp_path) as second:
        engine = start(
            checkpoints=str(tmp_path / "checkpoints"),
            engines=[{"url": docker_stage.url(), "name": "one", "address": "127.0.0.1"}],
            provision=[sys.executable, "-c", STAND_IN, str(tmp_path / "told.json"), second.url])
        watcher = watch(engine)
        watcher.until(lambda s: set(s.nodes) == {"one"})
        engine.backend.provision([Demand(pool, 1)])
        watcher.until(lambda s: "a100-1" in s.nodes)
        node = watcher.sight.nodes[NodeName("a100-1")]
        assert (pool.has(node), len(node.gpus)) == (True, 2)
        assert json.loads((tmp_path / "told.json").read_text())["gpus"] == "sim-gpu:2"
        launch = a_launch(node, ("/bin/sh", "-c", "exit 3"))
        watcher.backend.start([launch])
        assert watcher.end(launch.key).exit_code == 3
        watcher.backend.forget([launch.key])
        watcher.until(lambda s: launch.key not in s.replicas)
        engine.reconnect()
        watcher = watch(engine)
        assert set(watcher.sight.nodes) == {"one", "a100-1"}
        engine.backend.provision([Demand(pool, 0, (node.name,))])
        watcher.until(lambda s: set(s.nodes) == {"one"})
        assert json.loads((tmp_path / "told.json").read_text())["release"] == ["a100-1"]


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="a second engine needs root")
@pytest.mark.parametrize("late", [False, True])
def test_of_several_engines_one_is_restarted_and_one_is_away(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Containers that an engine ended while it was restarted are lost, not failed; the others do not notice. `late`:
    the thread that would ask why a container ended sleeps until the engine is back."""
    with docker_stage.SecondEngine(tmp_path) as second:
        engine = start(
            checkpoints=str(tmp_path / "checkpoints"),
            engines=[
                {"url": docker_stage.url(), "name": "one", "address": "127.0.0.1"},
                {"url": second.url, "name": "two", "address": "127.0.0.1"},
                {"url": "tcp://127.0.0.1:1", "name": "away", "address": "127.0.0.1"},
            ])
        watcher = watch(engine)
        watcher.until(lambda s: set(s.nodes) == {"one", "two"})
        assert watcher.backend.capabilities.name_template == ""
        command = ("/bin/sh", "-c", "echo on; exec sleep 300")
        launches = [a_launch(watcher.sight.nodes[NodeName(name)], command, a_key(index=index))
                    for index, name in enumerate(("one", "two"))]
        watcher.backend.start(launches)
        here, there = watcher.running(*(one.key for one in launches))
        watcher.until(lambda _: the_log(watcher, launches[1]) == "on\n")
        back = threading.Event()
        if late:
            _late(monkeypatch, back)
        second.stop()
        second.start()
        back.set()
        end = watcher.end(there.key)
        monkeypatch.undo()
        assert (end.failure, end.node) == (Reason.REPLICA_LOST, "two")
        assert "restarted" in end.message
        watcher.until(lambda s: "two" in s.nodes)
        anew = a_launch(watcher.sight.nodes[NodeName("two")], ("/bin/sh", "-c", "exit 4"), a_key(index=1, restart=1))
        watcher.backend.start([anew])
        assert watcher.end(anew.key).exit_code == 4
        assert watcher.sight.replicas[here.key].ident == here.ident
        assert watcher.sight.replicas[here.key].state is Seen.RUNNING
