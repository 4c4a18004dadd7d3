"""What every backend promises. `BackendContract` asks nothing of an engine but that it can run something that ends or
goes on, so the simulator inherits it too; `ProcessBackendContract` adds what engines that run real commands promise.

A subclass gives the fixture `engine` (an `Engine`); everything else is inherited.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import pytest

from jobsched.contract import ReplicaEnv
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey, launch_key
from jobsched.core.node import Node
from jobsched.core.observation import Observation, ReplicaReport, Seen, Sight
from jobsched.core.resources import NOTHING, GpuShare, JobId, NodeName
from jobsched.errors import BackendUnreachable, Conflict
from jobsched.ports import Backend, Ended, Output, Reach, Session, Window
from tests.ports import held_ports

PATIENCE_S = 120.0
"""Only a failing test waits as long: a loaded machine takes ten times its usual second."""
LONG_MS = 600_000
"""A grace that ends long after a failing test has."""


class Engine(Protocol):
    """What a suite needs to know of an engine beyond the port."""

    backend: Backend
    can_run_commands: bool

    def reconnect(self) -> Backend:
        """A new backend object over the same engine; the old one is closed."""
        ...

    def ends(self, code: int) -> tuple[str, ...]:
        """A command that ends with this exit code soon after its start."""
        ...

    def goes_on(self) -> tuple[str, ...]:
        """A command that runs for minutes and does not mind being stopped."""
        ...

    def kill(self, report: ReplicaReport) -> None:
        """End a replica by SIGKILL (or what comes closest), behind the backend's back."""
        ...


B = TypeVar("B", bound=Backend)


class CommandEngine(Generic[B]):
    """An `Engine` that runs the commands of this machine; a subclass says how to connect to it, and how to kill."""

    can_run_commands = True

    def __init__(self) -> None:
        self.backend = self.connect()

    def connect(self) -> B:
        raise NotImplementedError

    def reconnect(self) -> B:
        self.backend.close()
        self.backend = self.connect()
        return self.backend

    def ends(self, code: int) -> tuple[str, ...]:
        return ("/bin/sh", "-c", f"exit {code}")

    def goes_on(self) -> tuple[str, ...]:
        return ("/bin/sleep", "300")


class Watcher:
    """A backend's observations folded, as the controller does it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.sight = Sight()
        self.seen: list[Observation] = []

    def look(self, timeout_ms: int = 0) -> Observation:
        observation = self.backend.observe(timeout_ms)
        self.seen.append(observation)
        self.sight.fold(observation, time.monotonic_ns() // 1_000_000)
        return observation

    def until(self, holds: Callable[[Sight], object]) -> Sight:
        """Look until it holds. An engine that is out of reach is asked again, as the controller does."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(self.sight):
            assert time.monotonic() < deadline, f"not seen in {PATIENCE_S} s: {self.sight.replicas}"
            try:
                self.look(200)
            except BackendUnreachable:
                time.sleep(0.1)
        return self.sight

    def running(self, *keys: LaunchKey) -> list[ReplicaReport]:
        self.until(lambda s: all(k in s.replicas and s.replicas[k].state is Seen.RUNNING for k in keys))
        return [self.sight.replicas[k] for k in keys]

    def ended(self, *keys: LaunchKey) -> list[ReplicaReport]:
        self.until(lambda s: all(k in s.replicas and s.replicas[k].state is Seen.EXITED for k in keys))
        return [self.sight.replicas[k] for k in keys]

    def end(self, key: LaunchKey) -> ReplicaReport:
        return self.ended(key)[0]


def a_key(job: str = "job-1", attempt: int = 1, role: str = "worker", index: int = 0, restart: int = 0) -> LaunchKey:
    return launch_key(JobId(job), attempt, role, index, restart)


def a_launch(
    node: Node, command: Sequence[str], key: LaunchKey | None = None, gpus: Sequence[GpuShare] = (), **fields: object
) -> Launch:
    key = key or a_key()
    job, attempt, role, index, restart = key.split("/")
    contract = ReplicaEnv(
        job_id=job, job_name="contract", attempt=int(attempt), role=role, index=int(index), restart=int(restart),
        rank=0, node=node.name, peers={role: tuple(f"127.0.0.1:{2000 + i}" for i in range(int(index) + 1))},
        token=f"t-{job}", coordinator="127.0.0.1:2000", gpu_count=len(gpus),
    )
    return Launch(key, "contract", node.name, tuple(command), contract, gpus=tuple(gpus), **fields)  # type: ignore[arg-type]


class BackendContract:
    """For every backend."""

    @pytest.fixture
    def backend(self, engine: Engine) -> Backend:
        return engine.backend

    @pytest.fixture
    def watcher(self, backend: Backend) -> Watcher:
        watcher = Watcher(backend)
        watcher.look()
        return watcher

    @pytest.fixture
    def node(self, watcher: Watcher) -> Node:
        return next(iter(watcher.sight.nodes.values()))

    def test_the_first_observation_is_full_and_names_nodes(self, backend: Backend) -> None:
        first = backend.observe()
        assert first.full
        assert first.nodes
        assert not first.replicas

    def test_nothing_new_is_an_empty_observation_after_the_wait(self, watcher: Watcher) -> None:
        again = watcher.look(30)
        assert (again.replicas, again.gone, again.gone_nodes) == ((), (), ())

    def test_exit_codes_are_reported_exactly(self, engine: Engine, watcher: Watcher, node: Node) -> None:
        codes = (0, 1, 42, 255)
        launches = [a_launch(node, engine.ends(code), a_key(index=at)) for at, code in enumerate(codes)]
        watcher.backend.start(launches)
        assert [
            (end.exit_code, end.signal, end.failure, end.node)
            for end in watcher.ended(*(launch.key for launch in launches))
        ] == [(code, None, Reason.NONE, node.name) for code in codes]

    def test_a_gang_starts_whole_and_is_reported_whole(self, engine: Engine, watcher: Watcher) -> None:
        nodes = list(watcher.sight.nodes.values())
        gang = [a_launch(nodes[i % len(nodes)], engine.goes_on(), a_key(index=i)) for i in range(6)]
        watcher.backend.start(gang)
        reports = watcher.running(*(launch.key for launch in gang))
        assert [r.node for r in reports] == [launch.node for launch in gang]
        assert len({r.ident for r in reports}) == 6
        watcher.backend.stop([launch.key for launch in gang], 0)
        watcher.ended(*(launch.key for launch in gang))

    def test_a_key_is_started_once(self, engine: Engine, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, engine.goes_on())
        watcher.backend.start([launch, launch])
        (first,) = watcher.running(launch.key)
        watcher.backend.start([launch])
        engine.reconnect().start([launch])
        again = Watcher(engine.backend)
        (second,) = again.running(launch.key)
        assert first.ident == second.ident
        assert len(again.sight.replicas) == 1
        engine.backend.stop([launch.key], 0)
        again.end(launch.key)

    def test_a_key_that_ended_is_not_started_again_even_when_forgotten(
        self, engine: Engine, watcher: Watcher, node: Node
    ) -> None:
        launch = a_launch(node, engine.ends(0))
        watcher.backend.start([launch])
        watcher.end(launch.key)
        watcher.backend.start([launch])
        watcher.backend.forget([launch.key])
        watcher.until(lambda s: launch.key not in s.replicas)
        watcher.backend.start([launch])
        newer = a_launch(node, engine.ends(7), a_key(restart=1))
        watcher.backend.start([newer])
        assert watcher.end(newer.key).exit_code == 7
        assert launch.key not in watcher.sight.replicas

    def test_stop_ends_it(self, engine: Engine, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, engine.goes_on())
        watcher.backend.start([launch])
        watcher.running(launch.key)
        watcher.backend.stop([launch.key], 2_000)
        end = watcher.end(launch.key)
        assert (end.exit_code is None) != (end.signal is None)

    def test_stop_and_forget_do_not_mind_strangers_or_repetition(
        self, engine: Engine, watcher: Watcher, node: Node
    ) -> None:
        stranger = a_key("nobody")
        watcher.backend.stop([stranger], 0)
        watcher.backend.forget([stranger])
        watcher.backend.ask_stacks([stranger])
        launch = a_launch(node, engine.goes_on())
        watcher.backend.start([launch])
        watcher.running(launch.key)
        watcher.backend.forget([launch.key])
        for _ in range(3):
            watcher.backend.stop([launch.key], 0)
        watcher.end(launch.key)
        watcher.backend.stop([launch.key], 0)
        for _ in range(2):
            watcher.backend.forget([launch.key])
        watcher.until(lambda s: launch.key not in s.replicas)

    def test_a_stop_before_it_ran_leaves_nothing_running(self, engine: Engine, watcher: Watcher, node: Node) -> None:
        launches = [a_launch(node, engine.goes_on(), a_key(index=i)) for i in range(20)]
        watcher.backend.start(launches)
        watcher.backend.stop([launch.key for launch in launches], 0)
        for end in watcher.ended(*(launch.key for launch in launches)):
            assert end.exit_code != 0

    def test_a_kill_behind_our_back_is_seen(self, engine: Engine, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, engine.goes_on())
        watcher.backend.start([launch])
        (report,) = watcher.running(launch.key)
        engine.kill(report)
        end = watcher.end(launch.key)
        assert (end.exit_code, end.signal) in [(None, signal.SIGKILL), (128 + signal.SIGKILL, None)]

    def test_a_new_connection_sees_everything(self, engine: Engine, watcher: Watcher, node: Node) -> None:
        on, off = a_launch(node, engine.goes_on(), a_key(index=0)), a_launch(node, engine.ends(3), a_key(index=1))
        watcher.backend.start([on, off])
        (before,) = watcher.running(on.key)
        watcher.end(off.key)
        fresh = Watcher(engine.reconnect())
        listing = fresh.look()
        assert listing.full
        assert {r.key: (r.state, r.exit_code) for r in listing.replicas} == {
            on.key: (Seen.RUNNING, None), off.key: (Seen.EXITED, 3),
        }
        assert fresh.sight.replicas[on.key].ident == before.ident

        def without_others(sight: Sight) -> list[Node]:  # what an earlier test held may be on its way out
            return [replace(node, foreign=NOTHING, foreign_gpus=()) for _, node in sorted(sight.nodes.items())]

        fresh.until(lambda sight: without_others(sight) == without_others(watcher.sight))
        fresh.backend.stop([on.key], 0)
        fresh.end(on.key)

    def test_what_cannot_start_is_reported_and_the_rest_of_the_gang_starts(
        self, engine: Engine, watcher: Watcher, node: Node
    ) -> None:
        if not engine.can_run_commands:
            pytest.skip("this engine has no commands that could be missing")
        good = a_launch(node, engine.ends(0), a_key(index=0))
        bad = a_launch(node, ("no-such-command-here",), a_key(index=1))
        watcher.backend.start([bad, good])
        assert watcher.end(good.key).exit_code == 0
        end = watcher.end(bad.key)
        assert end.failure is Reason.START_FAILED
        assert end.exit_code == 127
        assert "no-such-command-here" in end.message

    def test_capabilities_name_the_backend(self, backend: Backend) -> None:
        assert backend.capabilities.name
        assert backend.capabilities.limits


TRAPS_TERM = "trap 'echo bye; exit 5' TERM; echo ready; while true; do sleep 0.1; done"
ENV_SCRIPT = 'import json, os, sys; print(json.dumps([dict(os.environ), os.getcwd(), sys.argv[1:]]))'
SAVES_WHEN_ASKED = """
import json, os, signal, socket, sys, time
from jobsched.contract import from_environ
env = from_environ(os.environ)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
def tell(**fields):
    data = json.dumps({"v": 1, "key": env.launch_key, "token": env.token, "seq": 1, **fields})
    if env.report == "log:":
        print("::jobsched::", data, flush=True)
    else:
        sock.sendto(data.encode(), env.report.removeprefix("unix:"))
def save(*_):
    print("asked", flush=True)
    time.sleep(0.1)
    tell(saved={"step": 7, "path": "/ckpt/7"})
signal.signal(signal.SIGUSR1, save)
tell(step=5, total=10, metrics={"loss": 0.5})
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


LISTENS = """
import socket
with socket.create_server(("127.0.0.1", {port})) as server:
    print("ready", flush=True)
    while True:
        sock, _ = server.accept()
        with sock:
            while data := sock.recv(65536):
                sock.sendall(data.upper())
"""
SEES_TERMINAL = """
import os, select, signal, sys
signal.signal(signal.SIGWINCH, lambda *_: print("size", *os.get_terminal_size(), flush=True))
print(sys.stdin.isatty(), sys.stdout.isatty(), *os.get_terminal_size(), os.environ["TERM"], flush=True)
while not select.select([0], [], [], 0.05)[0]: pass  # a signal just before input() would be handled after it
print("heard", input(), flush=True)
sys.exit(3)
"""
FINDS = "import glob; print(sum(b'{mark}' in open(p, 'rb').read() for p in glob.glob('/proc/[0-9]*/cmdline')) - 1)"


class ProcessBackendContract(BackendContract):
    """For backends whose replicas are commands with an environment, signals and logs; `python` is on their PATH."""

    def read_log(self, backend: Backend, key: LaunchKey, offset: int = 0) -> bytes:
        return b"".join(chunk.data for chunk in backend.logs(key, offset))

    def wait_for_log(self, backend: Backend, key: LaunchKey, text: bytes) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.read_log(backend, key):
            assert time.monotonic() < deadline, self.read_log(backend, key)
            time.sleep(0.02)

    def test_it_sees_its_contract_environment_directory_and_arguments(
        self, watcher: Watcher, node: Node, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        directory = str(tmp_path_factory.mktemp("work"))
        launch = a_launch(
            node, ("python", "-c", ENV_SCRIPT, "a b", "$HOME"), env={"COLOUR": "blue", "MASTER_ADDR": "elsewhere"},
            working_dir=directory,
        )
        watcher.backend.start([launch])
        assert watcher.end(launch.key).exit_code == 0
        env, cwd, arguments = json.loads(self.read_log(watcher.backend, launch.key))
        assert arguments == ["a b", "$HOME"]
        assert cwd == directory
        assert (env["COLOUR"], env["MASTER_ADDR"], env["RANK"]) == ("blue", "elsewhere", "0")
        contract = json.loads(env["JOBSCHED_CONTRACT"])
        assert (contract["job_id"], contract["token"]) == ("job-1", "t-job-1")
        assert contract["scratch_dir"] == env["JOBSCHED_SCRATCH_DIR"]
        assert env["CUDA_VISIBLE_DEVICES"] == ""

    def test_gpus_are_pinned(self, watcher: Watcher) -> None:
        node = next((n for n in watcher.sight.nodes.values() if len(n.gpus) >= 2), None)
        if node is None:
            pytest.skip("no node with two GPUs here")
        gpus = [gpu.id for gpu in node.gpus[:2]]
        launch = a_launch(node, ("python", "-c", ENV_SCRIPT), gpus=[GpuShare(gpu) for gpu in gpus])
        watcher.backend.start([launch])
        watcher.end(launch.key)
        env, _, _ = json.loads(self.read_log(watcher.backend, launch.key))
        pinned = env["CUDA_VISIBLE_DEVICES"] or env["JOBSCHED_SIM_GPUS"]
        assert pinned == ",".join(gpus)

    def test_a_signal_is_reported_as_one(self, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, ("/bin/sh", "-c", "kill -SEGV $$"))
        watcher.backend.start([launch])
        end = watcher.end(launch.key)
        assert (end.exit_code, end.signal) in [(None, signal.SIGSEGV), (128 + signal.SIGSEGV, None)]

    def test_a_failed_end_has_its_last_lines(self, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, ("/bin/sh", "-c", "(for i in $(seq 50); do echo line $i; done; echo why) >&2; exit 9"))
        watcher.backend.start([launch])
        tail = watcher.end(launch.key).tail
        assert tail[-2:] == ("line 50", "why")
        assert 10 <= len(tail) <= 40

    def test_progress_is_reported_and_stop_waits_for_the_acknowledgement_only(
        self, watcher: Watcher, node: Node
    ) -> None:
        launch = a_launch(node, ("python", "-c", SAVES_WHEN_ASKED))
        begun = time.monotonic()
        watcher.backend.start([launch])
        watcher.until(lambda s: launch.key in s.replicas and s.replicas[launch.key].progress)
        progress = watcher.sight.replicas[launch.key].progress
        assert progress is not None
        assert (progress.step, progress.total, progress.metrics) == (5, 10, (("loss", 0.5),))
        assert 0 <= progress.step_age_ms <= (time.monotonic() - begun) * 1_000 + 1_000
        self.wait_for_log(watcher.backend, launch.key, b"ready")
        watcher.backend.stop([launch.key], LONG_MS)
        end = watcher.end(launch.key)  # long before the grace ends
        assert end.progress is not None
        assert (end.progress.saved_step, end.progress.saved_path) == (7, "/ckpt/7")
        assert end.signal == signal.SIGTERM or end.exit_code == 128 + signal.SIGTERM

    def test_who_does_not_catch_the_checkpoint_signal_is_not_killed_by_it(self, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, ("/bin/sh", "-c", TRAPS_TERM))
        watcher.backend.start([launch])
        self.wait_for_log(watcher.backend, launch.key, b"ready")
        watcher.backend.stop([launch.key], LONG_MS)
        assert watcher.end(launch.key).exit_code == 5  # long before the grace ends
        assert b"bye" in self.read_log(watcher.backend, launch.key)

    def test_a_shorter_grace_shortens(self, watcher: Watcher, node: Node) -> None:
        stubborn = "import signal, time\nfor n in (10, 15): signal.signal(n, lambda *_: None)\n" \
                   "print('ready', flush=True)\nwhile True: time.sleep(1)"
        launch = a_launch(node, ("python", "-c", stubborn))
        watcher.backend.start([launch])
        self.wait_for_log(watcher.backend, launch.key, b"ready")
        watcher.backend.stop([launch.key], LONG_MS)
        watcher.look(300)
        assert watcher.sight.alive(launch.key)
        watcher.backend.stop([launch.key], 2 * LONG_MS)
        watcher.backend.stop([launch.key], 0)
        end = watcher.end(launch.key)
        assert end.signal == signal.SIGKILL or end.exit_code == 128 + signal.SIGKILL

    def test_logs_have_true_offsets(self, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, ("/bin/sh", "-c", "for i in 1 2 3 4 5; do echo line $i; done"))
        watcher.backend.start([launch])
        watcher.end(launch.key)
        whole = self.read_log(watcher.backend, launch.key)
        assert whole == b"line 1\nline 2\nline 3\nline 4\nline 5\n"
        (chunk,) = watcher.backend.logs(launch.key, 14)
        assert (chunk.offset, chunk.data) == (14, b"line 3\nline 4\nline 5\n")
        (chunk,) = watcher.backend.logs(launch.key, -7)
        assert (chunk.offset, chunk.data) == (28, b"line 5\n")
        assert list(watcher.backend.logs(launch.key, len(whole))) == []
        assert list(watcher.backend.logs(a_key("nobody"))) == []

    def test_logs_stay_when_the_end_is_forgotten(self, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, ("/bin/echo", "kept"), keep_ms=60_000)
        watcher.backend.start([launch])
        watcher.end(launch.key)
        watcher.backend.forget([launch.key])
        assert self.read_log(watcher.backend, launch.key) == b"kept\n"

    def test_following_yields_lines_as_they_come_and_ends_with_the_replica(
        self, watcher: Watcher, node: Node, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        heard = tmp_path_factory.mktemp("heard")
        waits = "while [ ! -e {0}/{1} ]; do sleep 0.05; done"
        launch = a_launch(node, ("/bin/sh", "-c", "; ".join(
            ["echo one", waits.format(heard, 1), "echo two", waits.format(heard, 2), "printf three"])))
        watcher.backend.start([launch])
        came = []
        for chunk in watcher.backend.logs(launch.key, 0, follow=True, timeout_ms=100):
            if chunk.data:
                came.append((chunk.offset, chunk.data))
            else:  # silence is told, and the replica waits for that
                (heard / str(len(came))).touch()
        assert came == [(0, b"one\n"), (4, b"two\n"), (8, b"three")]

    def test_nothing_of_a_replica_survives_its_main_process(
        self, watcher: Watcher, node: Node, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        beats = tmp_path_factory.mktemp("beats")
        child = "while true; do date +%s%N > {0}/{1}; sleep 0.05; done"
        launch = a_launch(node, ("/bin/sh", "-c", "; ".join([
            f"({child.format(beats, 'same-session')}) &",
            f"setsid sh -c '{child.format(beats, 'own-session')}' &",
            f"while [ ! -s {beats}/same-session ] || [ ! -s {beats}/own-session ]; do sleep 0.02; done",
            "exit 4",
        ]).replace("&;", "&")))
        watcher.backend.start([launch])
        assert watcher.end(launch.key).exit_code == 4
        before = {path.name: path.read_text() for path in beats.iterdir()}
        assert len(before) == 2
        time.sleep(0.3)
        assert {path.name: path.read_text() for path in beats.iterdir()} == before

    def test_a_working_directory_that_is_not_there_is_told(self, watcher: Watcher, node: Node) -> None:
        launch = a_launch(node, ("/bin/true",), working_dir="/no/such/place")
        watcher.backend.start([launch])
        end = watcher.end(launch.key)
        assert end.failure is Reason.START_FAILED
        assert "/no/such/place" in end.message

    def test_stacks_of_a_python_replica_name_the_function_it_is_in(self, watcher: Watcher, node: Node) -> None:
        if not watcher.backend.capabilities.stacks:
            pytest.skip("this backend has no means to take stacks")
        script = "import time\ndef the_odd_place():\n  print('ready', flush=True)\n  time.sleep(600)\nthe_odd_place()"
        launch = a_launch(node, ("python", "-c", script))
        watcher.backend.start([launch])
        self.wait_for_log(watcher.backend, launch.key, b"ready")
        watcher.backend.ask_stacks([launch.key])
        watcher.until(lambda s: launch.key in s.replicas and s.replicas[launch.key].stacks)
        assert "the_odd_place" in watcher.sight.replicas[launch.key].stacks
        assert b"the_odd_place" in self.read_log(watcher.backend, launch.key)
        watcher.backend.stop([launch.key], 0)
        watcher.end(launch.key)

    def test_a_replica_on_each_node_reports_its_node(self, watcher: Watcher) -> None:
        names = [NodeName(name) for name in watcher.sight.nodes]
        launches = [a_launch(watcher.sight.nodes[name], ("/bin/true",), a_key(index=i)) for i, name in enumerate(names)]
        watcher.backend.start(launches)
        assert [r.node for r in watcher.ended(*(launch.key for launch in launches))] == names

    # what people do in a replica ----------------------------------------------------------------------------------

    @pytest.fixture
    def reach(self, backend: Backend) -> Reach:
        assert isinstance(backend, Reach)
        return backend

    @pytest.fixture
    def key(self, engine: Engine, watcher: Watcher, node: Node) -> LaunchKey:
        """Of a replica that runs."""
        launch = a_launch(node, ("/bin/sh", "-c", "echo at $(pwd); echo ready; exec sleep 300"), env={"COLOUR": "blue"})
        watcher.backend.start([launch])
        watcher.running(launch.key)
        self.wait_for_log(watcher.backend, launch.key, b"ready")
        return launch.key

    def said(self, session: Session, until: bytes = b"") -> tuple[bytes, bytes, int | None]:
        """Everything on stdout and stderr, and the code; or what came until some text did."""
        out, err = b"", b""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            match session.receive(0.5):
                case Output(data, error):
                    out, err = (out, err + data) if error else (out + data, err)
                case Ended(code):
                    session.close()
                    return out, err, code
            if until and until in out:
                return out, err, None
        raise AssertionError(f"neither {until!r} nor an end came: {out!r} {err!r}")

    def test_a_command_runs_in_the_replicas_environment_and_directory(
        self, engine: Engine, reach: Reach, key: LaunchKey
    ) -> None:
        script = 'echo "$COLOUR $RANK $JOBSCHED_JOB_ID"; echo at $(pwd); echo oops >&2; exit 7'
        out, err, code = self.said(reach.execute(key, ["/bin/sh", "-c", script]))
        assert (out.splitlines()[0], err, code) == (b"blue 0 job-1", b"oops\n", 7)
        assert out.splitlines()[1] == self.read_log(engine.backend, key).splitlines()[0]

    def test_what_is_sent_is_read_and_its_end_is_seen(self, reach: Reach, key: LaunchKey) -> None:
        assert self.said(reach.execute(key, ["cat"], stdin=False)) == (b"", b"", 0)
        session = reach.execute(key, ["cat"])
        session.send(b"one\n")
        assert self.said(session, until=b"one\n")[0] == b"one\n"
        session.send(b"two")
        session.end_input()
        assert self.said(session) == (b"two", b"", 0)

    def test_megabytes_go_through_both_ways(self, reach: Reach, key: LaunchKey) -> None:
        data = bytes(range(256)) * 8_192
        session = reach.execute(key, ["cat"])

        def feed() -> None:
            for at in range(0, len(data), 32_768):
                session.send(data[at:at + 32_768])
            session.end_input()

        thread = threading.Thread(target=feed)
        thread.start()
        out, err, code = self.said(session)
        thread.join()
        assert (len(out), err, code) == (len(data), b"", 0)
        assert out == data

    def test_a_terminal_is_one(self, reach: Reach, key: LaunchKey) -> None:
        session = reach.execute(key, ["python", "-c", SEES_TERMINAL], Window(rows=30, columns=100))
        first = self.said(session, until=b"\n")[0]
        assert first.startswith(b"True True 100 30 xterm")
        session.resize(Window(rows=31, columns=99))
        assert b"size 99 31" in self.said(session, until=b"31\r\n")[0]
        session.send(b"you\r")
        out, _, code = self.said(session)
        assert b"heard you" in out
        assert code == 3

    def test_a_signal_is_told_as_a_shell_does(self, reach: Reach, key: LaunchKey) -> None:
        assert self.said(reach.execute(key, ["/bin/sh", "-c", "kill -9 $$"]))[2] == 128 + signal.SIGKILL

    def test_what_is_no_command_is_told_as_a_shell_does(self, reach: Reach, key: LaunchKey) -> None:
        out, err, code = self.said(reach.execute(key, ["no-such-command"]))
        assert code in (126, 127)
        assert b"no-such-command" in out + err

    def test_hanging_up_ends_the_command_and_not_the_replica(
        self, reach: Reach, watcher: Watcher, key: LaunchKey
    ) -> None:
        mark = f"mark-{time.monotonic_ns()}"
        script = f"import time; print('on', flush=True); time.sleep(300)  # {mark}"
        session = reach.execute(key, ["python", "-c", script])
        self.said(session, until=b"on\n")
        finds = ["python", "-c", FINDS.format(mark=mark)]
        assert self.said(reach.execute(key, finds))[0].strip() != b"0"
        session.close()
        deadline = time.monotonic() + PATIENCE_S
        while self.said(reach.execute(key, finds))[0].strip() != b"0":
            assert time.monotonic() < deadline, "the command goes on"
        watcher.look(50)
        assert watcher.sight.replicas[key].state is Seen.RUNNING

    def test_a_session_ends_with_its_replica(self, reach: Reach, watcher: Watcher, key: LaunchKey) -> None:
        session = reach.execute(key, ["sleep", "300"])
        assert session.receive(0.3) is None
        watcher.backend.stop([key], 0)
        watcher.end(key)
        assert self.said(session)[2] != 0
        with pytest.raises(Conflict):
            reach.execute(key, ["true"])
        with pytest.raises(Conflict):
            reach.connect(key, 80)
        with pytest.raises(Conflict):
            reach.execute(a_key("nobody"), ["true"])

    def test_those_who_listen_are_asked_to_save_and_go_on(self, reach: Reach, watcher: Watcher, node: Node) -> None:
        listens = a_launch(node, ("python", "-c", SAVES_WHEN_ASKED))
        sleeps = a_launch(node, ("/bin/sleep", "300"), a_key(index=1))
        watcher.backend.start([listens, sleeps])
        watcher.running(listens.key, sleeps.key)
        self.wait_for_log(watcher.backend, listens.key, b"ready")
        assert list(reach.ask_checkpoint([listens.key, sleeps.key, a_key("nobody")])) == [listens.key]

        def saved(sight: Sight) -> bool:
            progress = sight.replicas[listens.key].progress
            return progress is not None and progress.saved_step == 7

        watcher.until(saved)
        watcher.look(100)
        assert watcher.sight.alive(listens.key)
        assert watcher.sight.alive(sleeps.key)
        watcher.backend.stop([listens.key, sleeps.key], 0)
        watcher.ended(listens.key, sleeps.key)

    def test_a_port_of_a_replica_is_reached(self, reach: Reach, watcher: Watcher, node: Node) -> None:
        with held_ports(2) as (port, silent):
            self.reaches(reach, watcher, node, port, silent)

    def reaches(self, reach: Reach, watcher: Watcher, node: Node, port: int, silent: int) -> None:
        launch = a_launch(node, ("python", "-c", LISTENS.format(port=port)), a_key("listens"))
        watcher.backend.start([launch])
        self.wait_for_log(watcher.backend, launch.key, b"ready")
        for text in (b"hello", b"again"):
            session = reach.connect(launch.key, port)
            session.send(text)
            assert self.said(session, until=text.upper())[0] == text.upper()
            session.end_input()
            assert self.said(session) == (b"", b"", 0)
        try:
            _, said, code = self.said(reach.connect(launch.key, silent))
        except Conflict as refused:  # found out before or after it is connected
            said, code = refused.message.encode(), 1
        assert str(silent).encode() in said
        assert code != 0
        watcher.backend.stop([launch.key], 0)
        watcher.end(launch.key)
