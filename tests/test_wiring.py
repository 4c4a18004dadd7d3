"""The composition root: what it builds without starting anything, and whole servers with real replicas (e2e)."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from jobsched import wiring
from jobsched.controller.loop import Controller
from jobsched.errors import ConfigError, Conflict
from jobsched.spec.server import ServerConfig
from jobsched.store.memory import MemoryStore
from jobsched.store.sql import SqlStore
from jobsched.wiring import Server, SystemClock

VIRTUAL = {"local": {"virtual_nodes": [{"count": 2, "gpus": "sim-gpu:2"}]}}


def a_config(home: Path, **more: object) -> ServerConfig:
    return ServerConfig.model_validate({"home": str(home), "backend": VIRTUAL, **more})


# ---- parts ----


def test_the_clock_is_the_time_of_day_and_only_goes_on() -> None:
    clock = SystemClock()
    before, now, after = time.time() * 1_000, clock.now_ms(), time.time() * 1_000
    assert before - 1_000 < now < after + 1_000
    seen = [clock.now_ms() for _ in range(1_000)]
    assert seen == sorted(seen)


def test_waiting_ends_at_the_instant_or_when_woken() -> None:
    clock, wake = SystemClock(), threading.Event()
    start = clock.now_ms()
    clock.wait_until(start + 30, wake)
    assert clock.now_ms() >= start + 29
    wake.set()
    clock.wait_until(start + 600_000, wake)
    assert clock.now_ms() < start + 300_000
    assert not wake.is_set()
    clock.wait_until(start - 1, wake)


def test_stores_by_url(tmp_path: Path) -> None:
    assert isinstance(wiring.make_store(ServerConfig(store="memory:"), tmp_path), MemoryStore)
    for config in (ServerConfig(), ServerConfig(store=f"sqlite:///{tmp_path}/other.db")):
        store = wiring.make_store(config, tmp_path)
        assert isinstance(store, SqlStore)
        store.close()
    assert {path.name for path in tmp_path.glob("*.db")} == {"jobsched.db", "other.db"}


def test_the_home_is_the_configured_one_else_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JOBSCHED_HOME", str(tmp_path / "env"))
    assert wiring.home_of(ServerConfig()) == tmp_path / "env"
    assert wiring.home_of(a_config(tmp_path / "file")) == tmp_path / "file"
    monkeypatch.delenv("JOBSCHED_HOME")
    assert wiring.home_of(ServerConfig()).name == "jobsched"


def test_an_unknown_log_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="loud"):
        wiring.configure_logging("loud")


def test_wiring_imports_no_engine_and_no_torch() -> None:
    heavy = "torch", "ray", "kubernetes", "docker"
    code = f"import jobsched.wiring, sys; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ---- servers ----


class Remote:
    """A client of the server that runs from a home directory."""

    def __init__(self, home: Path) -> None:
        self.said = json.loads((home / "server.json").read_text())
        token = Path(self.said["token_file"]).read_text().strip()
        self.http = httpx2.Client(
            base_url=self.said["url"], headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=120,
        )  # fmt: skip

    def ask(self, method: str, path: str, **more: Any) -> Any:
        response = self.http.request(method, f"/v1/{path}", **more)
        assert response.is_success, response.text
        return response.json()

    def submit(self, command: str, **fields: object) -> str:
        spec = {"name": "job", "roles": {"worker": {"command": command, "gpu": "any:1"}}, **fields}
        return str(self.ask("POST", "jobs", json={"spec": spec, "owner": "me"})["jobs"][0]["job"]["id"])

    def phase(self, job_id: str) -> str:
        return str(self.ask("GET", f"jobs/{job_id}")["job"]["phase"])

    def until(self, job_id: str, *phases: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while (now := self.phase(job_id)) not in phases:
            assert time.monotonic() < deadline, f"{job_id} is {now}"
            time.sleep(0.02)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home directory whose supervisor, should it still be there, is ended with the test."""
    from jobsched.backends.local import LocalBackend
    from jobsched.backends.registry import make_backend

    place = tmp_path / "home"
    yield place
    if place.is_dir():
        backend = make_backend(a_config(place).backend, place)
        assert isinstance(backend, LocalBackend)
        backend.quit_supervisor(kill=True)
        backend.close()


@pytest.mark.e2e
def test_a_job_runs_to_its_end(home: Path) -> None:
    with Server(a_config(home)) as server:
        remote = Remote(home)
        assert remote.said["pid"] == os.getpid()
        assert stat.S_IMODE((home / "server.json").stat().st_mode) == 0o600
        assert stat.S_IMODE((home / "token").stat().st_mode) == 0o600
        assert server.token == (home / "token").read_text().strip()
        assert remote.ask("GET", "healthz")["leader"]
        job_id = remote.submit("echo hello; exit 0")
        with remote.http.stream("GET", f"/v1/jobs/{job_id}/logs", params={"follow": "true"}) as response:
            log = "".join(response.iter_text())
        assert '"text":"hello"' in log
        assert log.endswith("event: end\ndata: {}\n\n")
        remote.until(job_id, "SUCCEEDED")
        assert remote.ask("GET", "debug/verify")["ok"]
        assert all(check["ok"] for check in remote.ask("GET", "doctor") if check["name"] not in ("limits", "stacks"))
        assert len(remote.ask("GET", "nodes")) == 2
    assert not (home / "server.json").exists()


@pytest.mark.e2e
def test_one_home_has_one_server(home: Path) -> None:
    with Server(a_config(home)) as server:
        with pytest.raises(Conflict) as caught:
            Server(a_config(home)).start()
        assert str(os.getpid()) in caught.value.message
        assert server.url in caught.value.message
        assert (home / "server.json").exists()
    Server(a_config(home)).stop()  # never started: nothing to stop


@pytest.mark.e2e
def test_a_taken_address_is_told_and_leaves_nothing_behind(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="cannot listen"):
            Server(a_config(home, listen=listen)).start()
    with Server(a_config(home, store="memory:")):
        assert Remote(home).ask("GET", "version")["api"] == "v1"


@pytest.mark.e2e
def test_open_streams_do_not_delay_the_stop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "DRAIN_S", 300.0)
    server = Server(a_config(home, store="memory:"))
    server.start()
    remote = Remote(home)
    ended = threading.Event()

    def watch() -> None:
        with remote.http.stream("GET", "/v1/events") as response:
            begun.set()
            for _ in response.iter_raw():
                pass
        ended.set()

    begun = threading.Event()
    threading.Thread(target=watch, daemon=True).start()
    assert begun.wait(60)
    started = time.monotonic()
    server.stop()
    assert ended.wait(60)
    assert time.monotonic() - started < 100


@pytest.mark.e2e
def test_an_answer_knows_what_was_submitted_before_the_question(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that looks at a job comes after the answer to its submission, on a busy machine long after: here not
    before somebody waits for it."""
    asked = threading.Event()
    asked.set()
    tick, caught_up = Controller.tick, Controller.caught_up

    def late(controller: Controller) -> int:
        asked.wait(60)
        return tick(controller)

    def waits(controller: Controller, seq: int, timeout_s: float) -> bool:
        asked.set()
        return caught_up(controller, seq, 10 * timeout_s)

    monkeypatch.setattr(Controller, "tick", late)
    monkeypatch.setattr(Controller, "caught_up", waits)
    whole = {"worker": {"command": "sleep 600", "gpu": "any:2", "replicas": 2}}
    with Server(a_config(home, store="memory:")):
        remote = Remote(home)
        asked.clear()
        first, second = (remote.submit("", name=name, roles=whole) for name in ("first", "second"))
        (reason,) = remote.ask("GET", f"jobs/{second}/why")["verdict"]["reasons"]
        assert reason["message"].startswith("role worker needs 2 × (2 any GPU"), reason
        asked.clear()
        remote.ask("POST", f"jobs/{first}/cancel")
        assert remote.ask("POST", "plan", json={"spec": {"name": "third", "roles": whole}})["code"] == 10


class Process:
    """A server in a process of its own."""

    def __init__(self, home: Path) -> None:
        code = (
            "import sys; from jobsched.wiring import serve; from jobsched.spec.server import ServerConfig;"
            "serve(ServerConfig.model_validate_json(sys.argv[1]))"
        )
        config = a_config(home).model_dump_json()
        log = home.parent / "server.log"
        with log.open("ab") as out:
            self.popen = subprocess.Popen([sys.executable, "-c", code, config], stderr=out)
        deadline = time.monotonic() + 120
        while True:
            try:
                self.remote = Remote(home)
                if self.remote.said["pid"] == self.popen.pid:
                    break
            except (OSError, ValueError):
                pass
            assert self.popen.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, number: signal.Signals) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(120)


@pytest.mark.e2e
def test_a_killed_server_is_followed_by_one_that_goes_on_with_the_same_replicas(home: Path, tmp_path: Path) -> None:
    first = Process(home)
    go_on = tmp_path / "go"
    job_id = first.remote.submit(f"while [ ! -e {go_on} ]; do sleep 0.05; done")
    first.remote.until(job_id, "RUNNING")
    before = first.remote.ask("GET", f"jobs/{job_id}")
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    assert (home / "server.json").exists()  # stale, as a crash leaves it

    second = Process(home)
    try:
        assert second.remote.ask("GET", "healthz")["leader"]  # at once, without waiting for the old lease to run out
        second.remote.until(job_id, "RUNNING")
        after = second.remote.ask("GET", f"jobs/{job_id}")
        assert after["job"]["attempt"] == before["job"]["attempt"] == 1
        pids = [r["ident"] for a in (before, after) for r in a["progress"]["replicas"]]
        assert len(set(pids)) == 1
        go_on.touch()
        second.remote.until(job_id, "SUCCEEDED")
        assert second.remote.ask("GET", "debug/verify")["ok"]
        assert second.remote.ask("GET", f"jobs/{job_id}")["job"]["restarts"] == 0
    finally:
        go_on.touch()
        assert second.end(signal.SIGTERM) == 0
    assert not (home / "server.json").exists()


@pytest.mark.e2e
def test_shutdown_by_request(home: Path) -> None:
    server = Process(home)
    assert server.remote.ask("POST", "shutdown") == {"status": "stopping"}
    assert server.popen.wait(120) == 0
