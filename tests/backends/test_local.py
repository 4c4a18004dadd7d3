"""What the local backend promises beyond the contract: it survives deaths of all kinds, confines, resolves, warns."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobsched.backends.local import LocalBackend
from jobsched.backends.supervisor import client, processes
from jobsched.backends.supervisor.protocol import VERSION, Settings
from jobsched.core.job import Reason
from jobsched.core.launch import LaunchKey
from jobsched.core.observation import Seen
from jobsched.errors import BackendUnreachable
from tests.backends.conftest import NODES, SETTINGS, LocalEngine
from tests.contracts.backend import PATIENCE_S, Watcher, a_key, a_launch
from tests.ports import held_ports

NODE = NODES[0]


@pytest.fixture
def watcher(engine: LocalEngine) -> Watcher:
    watcher = Watcher(engine.backend)
    watcher.look()
    return watcher


def log(backend: LocalBackend, key: LaunchKey) -> str:
    return b"".join(chunk.data for chunk in backend.logs(key)).decode()


def when_told(path: Path, code: int) -> str:
    """A shell's words: to end with this exit code once the file is there."""
    return f"while [ ! -e {path} ]; do sleep 0.05; done; exit {code}"


def test_replicas_survive_their_server(tmp_path: Path) -> None:
    """A server process starts a replica and is SIGKILLed; the next one sees the same pid, and its exact exit code."""
    home = tmp_path / "home"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tests.backends.conftest import LocalEngine\n"
        "from tests.contracts.backend import Watcher, a_launch\nfrom tests.backends.conftest import NODES\n"
        "engine = LocalEngine(Path(sys.argv[1]))\nlaunch = a_launch(NODES[0], ('/bin/sh', '-c', sys.argv[2]))\n"
        "engine.backend.start([launch])\nprint(Watcher(engine.backend).running(launch.key)[0].ident, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    server = subprocess.run(
        [sys.executable, "-c", script, str(home), when_told(tmp_path / "go", 6)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert server.returncode == -signal.SIGKILL, server.stderr
    engine = LocalEngine(home)
    watcher = Watcher(engine.backend)
    watcher.look()
    (tmp_path / "go").touch()
    end = watcher.end(a_key())
    assert (end.ident, end.exit_code) == (server.stdout.strip(), 6)
    engine.backend.quit_supervisor(kill=True)


def test_a_restarted_supervisor_adopts_what_lives_and_never_starts_it_twice(
    engine: LocalEngine, watcher: Watcher
) -> None:
    on, off = a_launch(NODE, engine.goes_on()), a_launch(NODE, engine.ends(3), a_key(index=1))
    watcher.backend.start([on, off])
    (before,) = watcher.running(on.key)
    watcher.end(off.key)
    first = engine.backend.supervisor_pid
    os.kill(first, signal.SIGKILL)
    watcher.until(lambda _: watcher.seen[-1].full)
    assert engine.backend.supervisor_pid != first
    watcher.backend.start([on, off])
    assert {r.key: (r.state, r.exit_code) for r in watcher.seen[-1].replicas} == {
        on.key: (Seen.RUNNING, None), off.key: (Seen.EXITED, 3),
    }
    assert watcher.sight.replicas[on.key].ident == before.ident
    watcher.backend.stop([on.key], 0)
    end = watcher.end(on.key)
    assert end.exit_code is None
    assert end.signal in (None, signal.SIGKILL), "new kernels tell how a stranger ended, old ones do not"


def test_a_replica_that_is_held_ends_with_the_connection_that_holds_it(
    engine: LocalEngine, watcher: Watcher
) -> None:
    held, free = a_launch(NODE, engine.goes_on()), a_launch(NODE, engine.goes_on(), a_key(index=1))
    watcher.backend.start([held, free])
    watcher.running(held.key, free.key)
    line = client.Line(engine.backend.layout.control_socket)
    assert line.ask({"do": "hold", "keys": [held.key]})["ok"]
    line.close()
    assert watcher.end(held.key).signal == signal.SIGKILL
    watcher.look()
    assert watcher.sight.replicas[free.key].state is Seen.RUNNING


def test_a_replica_whose_holder_died_together_with_the_supervisor_is_ended_by_the_next_one(tmp_path: Path) -> None:
    engine = LocalEngine(tmp_path / "home", replace(SETTINGS, hold_again_s=PATIENCE_S))
    watcher = Watcher(engine.backend)
    watcher.look()
    launches = [a_launch(NODE, engine.goes_on(), a_key(index=i)) for i in range(3)]
    orphan, held, free = (launch.key for launch in launches)
    line = client.Line(engine.backend.layout.control_socket)
    assert line.ask({"do": "hold", "keys": [orphan, held]})["ok"]
    watcher.backend.start(launches)
    watcher.running(orphan, held, free)
    os.kill(engine.backend.supervisor_pid, signal.SIGKILL)
    line.close()
    watcher.until(lambda _: watcher.seen[-1].full)
    again = client.Line(engine.backend.layout.control_socket)
    assert again.ask({"do": "hold", "keys": [held]})["ok"]
    at_once = replace(SETTINGS, hold_again_s=0.0)
    again.ask({"do": "hello", "version": VERSION, "settings": at_once.to_wire()})
    watcher.end(orphan)
    watcher.look()
    assert {watcher.sight.replicas[key].state for key in (held, free)} == {Seen.RUNNING}
    other = client.Line(engine.backend.layout.control_socket)
    assert other.ask({"do": "hold", "keys": [held]})["ok"]
    again.close()
    watcher.look(300)
    assert watcher.sight.alive(held), "somebody else holds it"
    other.close()
    watcher.end(held)
    assert watcher.sight.alive(free)
    engine.backend.quit_supervisor(kill=True)
    engine.backend.close()
    assert engine.has_no_processes()


def test_supervisor_and_replicas_killed_at_once_are_lost(engine: LocalEngine, watcher: Watcher) -> None:
    launches = [a_launch(NODE, engine.goes_on(), a_key(index=i)) for i in range(3)]
    watcher.backend.start(launches)
    reports = watcher.running(*(launch.key for launch in launches))
    os.kill(engine.backend.supervisor_pid, signal.SIGKILL)
    for report in reports:
        engine.kill(report)
    assert engine.has_no_processes()
    for end in watcher.ended(*(launch.key for launch in launches)):
        assert (end.exit_code, end.signal) == (None, None)
        assert "not seen" in end.message


def test_an_upgraded_supervisor_keeps_its_children_and_their_exit_codes(
    engine: LocalEngine, watcher: Watcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = a_launch(NODE, ("/bin/sh", "-c", when_told(tmp_path / "go", 11)))
    watcher.backend.start([launch])
    (before,) = watcher.running(launch.key)
    pid = engine.backend.supervisor_pid
    asked: list[object] = []
    original = client.Line.ask

    def of_another_version(line: client.Line, message: dict[str, object]) -> dict[str, object]:
        answer = original(line, message)
        if message["do"] == "hello" and "upgrade" not in asked:
            answer["version"] = 0
        asked.append(message["do"])
        return answer

    monkeypatch.setattr(client.Line, "ask", of_another_version)
    fresh = Watcher(engine.reconnect())
    assert "upgrade" in asked
    assert engine.backend.supervisor_pid == pid, "the same process with another program"
    (tmp_path / "go").touch()
    end = fresh.end(launch.key)
    assert (end.ident, end.exit_code) == (before.ident, 11)


def test_bystanders_are_left_alone(engine: LocalEngine, watcher: Watcher) -> None:
    """Processes that are not ours, younger than a replica or not, survive its stop and its clean-up."""
    with subprocess.Popen(["/bin/sleep", "600"]) as older:
        stopped = a_launch(NODE, engine.goes_on(), a_key(index=0))
        messy = a_launch(NODE, ("/bin/sh", "-c", "setsid sleep 50 & sleep 0.3; exit 1"), a_key(index=1))
        watcher.backend.start([stopped, messy])
        watcher.running(stopped.key)
        with subprocess.Popen(["/bin/sleep", "600"], start_new_session=True) as younger:
            watcher.backend.stop([stopped.key], 0)
            watcher.ended(stopped.key, messy.key)
            assert older.poll() is None
            assert younger.poll() is None
            younger.kill()
        older.kill()
    assert engine.has_no_processes(), "while what was theirs is gone"


def test_orphans_of_an_adopted_replica_are_killed(engine: LocalEngine, watcher: Watcher) -> None:
    launch = a_launch(NODE, ("/bin/sh", "-c", "setsid sleep 300 & sleep 300"))
    watcher.backend.start([launch])
    (report,) = watcher.running(launch.key)
    deadline = time.monotonic() + PATIENCE_S
    while len(engine.processes()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(engine.backend.supervisor_pid, signal.SIGKILL)
    watcher.until(lambda _: watcher.seen[-1].full)
    engine.kill(report)
    watcher.end(launch.key)
    assert engine.has_no_processes()


def test_a_port_that_somebody_else_listens_on_is_a_conflict(engine: LocalEngine, watcher: Watcher) -> None:
    with held_ports(1) as (port,):
        with socket.create_server(("127.0.0.1", port)):
            launch = a_launch(NODE, engine.ends(0), ports=(port,))
            watcher.backend.start([launch])
            end = watcher.end(launch.key)
        assert end.failure is Reason.PORT_CONFLICT
        assert str(port) in end.message
        again = a_launch(NODE, engine.ends(0), a_key(restart=1), ports=(port,))
        watcher.backend.start([again])
        assert watcher.end(again.key).exit_code == 0


def test_secrets_are_resolved_at_the_last_moment_and_stored_nowhere(engine: LocalEngine, watcher: Watcher) -> None:
    (engine.home / "secrets" / "api-key").write_text("hunter2\n")
    (engine.home / "secrets" / "api-key").chmod(0o600)
    launch = a_launch(NODE, ("/bin/sh", "-c", 'test "$KEY" = hunter2'), env={"KEY": "secret://api-key"})
    watcher.backend.start([launch])
    assert watcher.end(launch.key).exit_code == 0
    for path in engine.home.rglob("*"):
        if path.is_file() and path.name != "api-key":
            assert b"hunter2" not in path.read_bytes(), path


@pytest.mark.parametrize(("name", "mode", "told"), [
    ("missing", None, "there is no secret 'missing'"), ("open", 0o644, "chmod 600"), ("../lock", None, "not the name"),
])
def test_a_secret_that_cannot_be_used_is_told(
    engine: LocalEngine, watcher: Watcher, name: str, mode: int | None, told: str
) -> None:
    if mode is not None:
        (engine.home / "secrets" / name).write_text("x")
        (engine.home / "secrets" / name).chmod(mode)
    launch = a_launch(NODE, engine.ends(0), env={"KEY": f"secret://{name}"})
    watcher.backend.start([launch])
    end = watcher.end(launch.key)
    assert end.failure is Reason.START_FAILED
    assert told in end.message


EATS_MEMORY = "x = []\nwhile True: x.append(bytearray(8 << 20))"


@pytest.mark.parametrize("limits", ["auto", "rlimit"])
def test_running_out_of_memory_is_recognised(tmp_path: Path, limits: str) -> None:
    engine = LocalEngine(tmp_path / "home", Settings(limits=limits))
    watcher = Watcher(engine.backend)
    launch = a_launch(NODE, ("python", "-c", EATS_MEMORY), memory_bytes=200 << 20)
    watcher.backend.start([launch])
    end = watcher.end(launch.key)
    engine.backend.quit_supervisor(kill=True)
    assert end.failure is Reason.OOM
    assert end.exit_code != 0


def test_a_silent_replica_shows_for_how_long_it_has_used_no_cpu(engine: LocalEngine, watcher: Watcher) -> None:
    script = (
        "import json, os, socket, time\nfrom jobsched.contract import from_environ\ne = from_environ(os.environ)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "d = {'v': 1, 'key': e.launch_key, 'token': e.token, 'step': 1}\n"
        "s.sendto(json.dumps(d).encode(), e.report[5:])\n"
        "s.sendto(json.dumps(d | {'step': 99, 'token': 'forged'}).encode(), e.report[5:])\ntime.sleep(600)\n"
    )
    launch = a_launch(NODE, ("python", "-c", script))
    watcher.backend.start([launch])
    watcher.until(lambda s: launch.key in s.replicas and s.replicas[launch.key].idle_age_ms > 1_500)
    progress = watcher.sight.replicas[launch.key].progress
    assert progress is not None
    assert progress.step == 1, "a report with another token does not count"
    assert progress.beat_age_ms >= 3_000


def test_a_long_log_loses_its_head_but_keeps_its_offsets(tmp_path: Path) -> None:
    engine = LocalEngine(tmp_path / "home", Settings(log_bytes=64 << 10))
    watcher = Watcher(engine.backend)
    text = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; "
    waits = f"while [ ! -e {tmp_path / 'cut'} ]; do sleep 0.05; done; echo end"
    launch = a_launch(NODE, ("/bin/sh", "-c", text + waits))
    watcher.backend.start([launch])

    def cut() -> bool:
        now = log(engine.backend, launch.key)
        return now.endswith("line 19999\n") and len(now) <= 90 << 10

    watcher.until(lambda _: cut())
    (tmp_path / "cut").touch()
    watcher.end(launch.key)
    chunks = list(engine.backend.logs(launch.key))
    engine.backend.quit_supervisor(kill=True)
    whole = "".join(f"line {i}\n" for i in range(20_000)).encode() + b"end\n"
    kept = b"".join(chunk.data for chunk in chunks)
    assert 60 << 10 <= len(kept) <= 90 << 10
    assert whole[chunks[0].offset:] == kept
    assert kept.startswith(b"line ")
    assert engine.backend.layout.log(launch.key).stat().st_blocks * 512 < 128 << 10


def test_nodes_can_be_taken_down_and_away_behind_our_back(engine: LocalEngine, watcher: Watcher) -> None:
    names = [node.name for node in NODES]
    (engine.home / "nodes" / f"{names[0]}.down").write_text("cable pulled\n")
    watcher.until(lambda s: not s.nodes[names[0]].ready)
    assert watcher.sight.nodes[names[0]].message == "cable pulled"
    (engine.home / "nodes" / f"{names[1]}.gone").touch()
    watcher.until(lambda s: names[1] not in s.nodes)
    (engine.home / "nodes" / f"{names[0]}.down").unlink()
    (engine.home / "nodes" / f"{names[1]}.gone").unlink()
    watcher.until(lambda s: names[1] in s.nodes and s.nodes[names[0]].ready)


def test_a_home_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendUnreachable):
        LocalEngine(tmp_path / "file")


def test_a_home_with_a_long_path_works(tmp_path: Path) -> None:
    engine = LocalEngine(tmp_path / ("long" * 40))
    launch = a_launch(NODE, engine.ends(0))
    engine.backend.start([launch])
    assert Watcher(engine.backend).end(launch.key).exit_code == 0
    engine.backend.quit_supervisor(kill=True)


def test_a_supervisor_that_runs_replicas_does_not_quit_unless_told_to_kill(
    engine: LocalEngine, watcher: Watcher
) -> None:
    launch = a_launch(NODE, engine.goes_on())
    watcher.backend.start([launch])
    watcher.running(launch.key)
    assert not engine.backend.quit_supervisor()
    assert watcher.sight.alive(launch.key)


def test_the_supervisor_stays_light(engine: LocalEngine) -> None:
    status = Path(f"/proc/{engine.backend.supervisor_pid}/status").read_text()
    resident_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert resident_kib < 40 << 10
    loaded = subprocess.run(
        [sys.executable, "-c", "import jobsched.backends.supervisor.server, sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()
    foreign = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"jobsched"}
    assert not {name for name in foreign if name in ("pydantic", "sqlalchemy", "fastapi", "torch", "numpy", "rich")}


# warm interpreters -----------------------------------------------------------------------------------------------


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[tuple[LocalEngine, Watcher]]:
    """A backend that keeps an interpreter with `decimal` imported, ready."""
    engine = LocalEngine(tmp_path / "home", warm=("decimal",))
    watcher = Watcher(engine.backend)
    probe = ("python", "-c", "import sys; print(sys.orig_argv[0], 'decimal' in sys.modules)")
    for restart in range(100):
        launch = a_launch(NODE, probe, a_key("probe", restart=restart), preload=("decimal",))
        engine.backend.start([launch])
        watcher.end(launch.key)
        if "True" in log(engine.backend, launch.key):
            break
        time.sleep(0.05)
    else:
        pytest.fail("no warm interpreter: " + (engine.home / "supervisor" / "warm.log").read_text())
    yield engine, watcher
    engine.backend.quit_supervisor(kill=True)


def test_a_supervisor_that_falls_silent_while_it_is_called_is_unreachable(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = client.Line.ask

    def silent(line: client.Line, message: dict[str, object]) -> dict[str, object]:
        if message["do"] == "warm":
            raise TimeoutError("timed out")
        return original(line, message)

    with monkeypatch.context() as patch:
        patch.setattr(client.Line, "ask", silent)
        engine.warm = ("decimal",)
        with pytest.raises(BackendUnreachable, match="does not answer"):
            engine.connect()


COMPARED = """
import __main__, json, os, random, signal, sys
print(json.dumps({
    "argv": sys.argv, "path0": sys.path[0], "file": globals().get("__file__"), "name": __name__,
    "main": __main__.__dict__ is globals(), "cwd": os.getcwd(), "env": {k: v for k, v in os.environ.items()
    if k not in ("JOBSCHED_LAUNCH", "JOBSCHED_CONTRACT", "JOBSCHED_RESTART", "PWD", "OLDPWD", "SHLVL", "_")},
    "leader": os.getsid(0) == os.getpgid(0) == os.getpid(), "stdin": sys.stdin.read(),
    "signals": [str(signal.getsignal(n)) for n in (2, 10, 13, 15)], "blocked": list(signal.pthread_sigmask(0, ())),
    "fds": sorted(os.listdir("/proc/self/fd"))[:3], "package": __package__, "spec": __spec__ and __spec__.name,
}, sort_keys=True))
"""


@pytest.mark.parametrize("kind", ["script", "module", "code", "shell"])
def test_a_warm_start_looks_like_a_cold_one(warm: tuple[LocalEngine, Watcher], tmp_path: Path, kind: str) -> None:
    engine, watcher = warm
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "thing.py").write_text(COMPARED)
    command = {
        "script": ("python", "thing.py", "--x", "1"), "module": ("python", "-m", "thing", "a"),
        "code": ("python", "-c", COMPARED, "b"), "shell": ("/bin/sh", "-c", "python thing.py 'two words'"),
    }[kind]
    cold = a_launch(NODE, command, a_key(restart=0), working_dir=str(folder), env={"A": "1"})
    hot = a_launch(NODE, command, a_key(restart=1), working_dir=str(folder), env={"A": "1"}, preload=("decimal",))
    watcher.backend.start([cold, hot])
    assert [end.exit_code for end in watcher.ended(cold.key, hot.key)] == [0, 0]
    seen = [json.loads(log(engine.backend, launch.key)) for launch in (cold, hot)]
    if kind == "shell":  # the one difference: there is no shell any more
        assert [each.pop("leader") for each in seen] == [False, True]
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("code", "expected"), [
    ("import sys; sys.exit(7)", (7, None)),
    ("import sys; sys.exit('why')", (1, None)),
    ("raise KeyError('why')", (1, None)),
    ("import os; os.kill(os.getpid(), 9)", (None, 9)),
    ("import os; os._exit(3)", (3, None)),
    ("import atexit, threading; atexit.register(print, 'why'); threading.Thread(target=print).start()", (0, None)),
])
def test_a_warm_end_is_exact(
    warm: tuple[LocalEngine, Watcher], code: str, expected: tuple[int | None, int | None]
) -> None:
    engine, watcher = warm
    cold = a_launch(NODE, ("python", "-c", code), a_key(restart=0))
    hot = a_launch(NODE, ("python", "-c", code), a_key(restart=1), preload=("decimal",))
    watcher.backend.start([cold, hot])
    ends = watcher.ended(cold.key, hot.key)
    assert [(end.exit_code, end.signal) for end in ends] == [expected, expected]
    assert log(engine.backend, hot.key) == log(engine.backend, cold.key)


def test_warm_replicas_carry_their_mark_and_their_command_line(warm: tuple[LocalEngine, Watcher]) -> None:
    _, watcher = warm
    launch = a_launch(NODE, ("python", "-c", "import time; time.sleep(600)"), preload=("decimal",))
    watcher.backend.start([launch])
    (report,) = watcher.running(launch.key)
    pid = int(report.ident)
    deadline = time.monotonic() + PATIENCE_S
    while not (processes.marker(pid).endswith(launch.key)
               and b"time.sleep(600)" in Path(f"/proc/{pid}/cmdline").read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    watcher.backend.stop([launch.key], 0)
    assert watcher.end(launch.key).signal == signal.SIGKILL


def test_without_its_warm_parent_a_replica_starts_cold(warm: tuple[LocalEngine, Watcher]) -> None:
    engine, _ = warm
    engine.settings = replace(SETTINGS, warm_wait_s=2.0)
    watcher = Watcher(engine.reconnect())
    parents = [p for p in processes.children(engine.backend.supervisor_pid)
               if b"warm.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(parents) == 1
    os.kill(parents[0], signal.SIGSTOP)
    launch = a_launch(NODE, ("python", "-c", "print('done')"), preload=("decimal",))
    watcher.backend.start([launch])
    assert watcher.end(launch.key).exit_code == 0
    os.kill(parents[0], signal.SIGKILL)
    again = a_launch(NODE, ("python", "-c", "print('done')"), a_key(restart=1), preload=("decimal",))
    watcher.backend.start([again])
    assert watcher.end(again.key).exit_code == 0
    assert log(engine.backend, launch.key) == log(engine.backend, again.key) == "done\n"




@pytest.mark.parametrize(("policy", "stays"), [("all", False), ("running", True), ("none", True)])
def test_scratch_files_go_when_the_end_is_known_and_the_job_wants_it(
    engine: LocalEngine, watcher: Watcher, policy: str, stays: bool
) -> None:
    note = ("/bin/sh", "-c", "echo x > $JOBSCHED_SCRATCH_DIR/file; echo $JOBSCHED_SCRATCH_DIR")
    launch = a_launch(NODE, note, clean_up=policy)
    watcher.backend.start([launch])
    watcher.end(launch.key)
    file = Path(log(engine.backend, launch.key).strip()) / "file"
    assert file.exists()
    watcher.backend.forget([launch.key])
    until = time.monotonic() + (1 if stays else PATIENCE_S)
    while file.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert file.exists() is stays
