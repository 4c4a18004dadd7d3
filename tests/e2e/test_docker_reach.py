"""exec, cp and port-forward into containers of a real engine, all the way: command, server, engine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsched.cli.demo import clear_away
from jobsched.client import locate
from jobsched.client.client import Client
from tests.backends import docker_stage

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1_200), docker_stage.needs_docker]

PATIENCE_S = 120.0
COMMAND = [sys.executable, "-m", "jobsched.cli.main"]
SERVES = ("import http.server as h; print('up', flush=True); "
          "h.ThreadingHTTPServer(('127.0.0.1', 8000), h.SimpleHTTPRequestHandler).serve_forever()")


def cli(*args: str, code: int = 0, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([*COMMAND, *args], input=given, capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a job in two containers that serve their directory on their own loopback."""
    home = tmp_path_factory.mktemp("home")
    engine = {"url": docker_stage.url(), "gpus": "sim-gpu:4", "same_files": True}
    (home / "server.yaml").write_text(json.dumps(
        {"backend": {"docker": {"image": docker_stage.image(), "engines": [engine]}}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JOBSCHED_SERVER", raising=False)
        patch.setenv("JOBSCHED_HOME", str(home))
        patch.setenv("JOBSCHED_CONFIG", str(home / "none.toml"))
        locate.start(home)
        with Client() as client:
            job = client.submit({
                "name": "contained", "command": ["python", "-c", SERVES], "replicas": 2, "env": {"COLOUR": "blue"},
            })  # fmt: skip
            job.wait("running", timeout=PATIENCE_S)
            deadline = time.monotonic() + PATIENCE_S
            while [line.text for line in job.logs()].count("up") < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield "contained"
            job.cancel().wait(timeout=PATIENCE_S)
        label = f"dev.jobsched.home={(home / 'supervisor' / 'docker-id').read_text().strip()}"
        until = time.monotonic() + PATIENCE_S
        while docker_stage.leftovers(label):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert clear_away(home) == []


def test_exec_runs_in_the_container(job: str) -> None:
    done = cli("exec", f"{job}/worker/1", "--", "sh", "-c", "echo $COLOUR $RANK; echo oops >&2; exit 4", code=4)
    assert (done.stdout, done.stderr) == (b"blue 1\n", b"oops\n")
    assert cli("exec", "-i", job, "--", "cat", given=b"y" * 200_000).stdout == b"y" * 200_000
    inside = cli("exec", job, "--", "python", "-c", "import socket; print(socket.gethostname())").stdout
    assert inside.decode().strip() != socket.gethostname()


def test_files_go_in_and_come_out(job: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "big").write_bytes(os.urandom(2_000_000))
    cli("cp", str(source), f"{job}/worker/1:/tmp/there")
    cli("cp", f"{job}/worker/1:/tmp/there", str(tmp_path / "back"))
    assert (tmp_path / "back" / "sub" / "big").read_bytes() == (source / "sub" / "big").read_bytes()
    cli("exec", f"{job}/worker/0", "--", "ls", "/tmp/there", code=2)  # the other container has it not
    assert b"no /tmp/nothing in contained" in cli("cp", f"{job}:/tmp/nothing", str(tmp_path), code=3).stderr
    denied = cli("cp", str(source), f"{job}:/there", code=1).stderr.decode()
    assert "ermission denied" in denied or "ead-only" in denied


def test_a_port_of_the_containers_own_loopback_is_reached(job: str) -> None:
    cli("exec", job, "--", "sh", "-c", "echo found > page")
    process = subprocess.Popen([*COMMAND, "port-forward", job, ":8000", ":8001"], stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        ports = []
        for _ in range(2):
            match = re.match(rb"127\.0\.0\.1:(\d+) -> port", process.stderr.readline())
            assert match is not None
            ports.append(int(match[1]))
        with socket.create_connection(("127.0.0.1", ports[0]), PATIENCE_S) as sock:
            sock.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            answer = b""
            while data := sock.recv(65_536):
                answer += data
        assert answer.endswith(b"found\n")
        with socket.create_connection(("127.0.0.1", ports[1]), PATIENCE_S) as sock:
            assert sock.recv(10) == b""
        assert b"nothing listens on port 8001" in process.stderr.readline()
    finally:
        process.send_signal(2)
        assert process.wait(PATIENCE_S) == 130
