"""Finding the server, stale files, and starting one: here a stand-in that answers healthz."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobsched.client import locate, settings
from jobsched.errors import ConfigError, NotFound, Unreachable

STAND_IN = """
import http.server, json, os, pathlib, sys, time
home = pathlib.Path(os.environ["JOBSCHED_HOME"])
with (home / "starts").open("a") as out: out.write("x")
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while (home / "busy").exists(): time.sleep(0.05)
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Health)
(home / "token").write_text("secret\\n")
draft = home / "server.json.new"
draft.write_text(json.dumps({"url": f"http://127.0.0.1:{server.server_port}", "pid": os.getpid(),
                             "token_file": str(home / "token")}))
draft.rename(home / "server.json")
server.serve_forever()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in settings.NAMES:
        monkeypatch.delenv(f"JOBSCHED_{name.upper()}", raising=False)
    monkeypatch.setenv("JOBSCHED_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.setenv("JOBSCHED_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def say_running(home: Path, pid: int, url: str = "http://127.0.0.1:9") -> None:
    (home / "token").write_text("secret\n")
    (home / "server.json").write_text(json.dumps({"url": url, "pid": pid, "token_file": str(home / "token")}))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_nothing_configured_and_nothing_running(home: Path) -> None:
    with pytest.raises(Unreachable, match="no jobsched server") as caught:
        locate.find()
    assert "jobsched serve" in caught.value.hint


def test_the_server_of_the_home_directory(home: Path) -> None:
    say_running(home, os.getpid())
    found = locate.find()
    assert (found.url, found.token, found.local) == ("http://127.0.0.1:9", "secret", True)
    assert locate.server_pid(home) == os.getpid()


def test_a_stale_file_is_no_server(home: Path) -> None:
    say_running(home, dead_pid())
    with pytest.raises(Unreachable):
        locate.find()
    with pytest.raises(NotFound):
        locate.server_pid(home)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": "http://x"}', '{"url": "http://x", "pid": "many"}'])
def test_a_broken_file_is_no_server(home: Path, text: str) -> None:
    (home / "server.json").write_text(text)
    assert locate.running(home) is None


def test_a_configured_server_wins_and_brings_its_own_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say_running(home, os.getpid())
    monkeypatch.setenv("JOBSCHED_SERVER", "http://far:80")
    assert locate.find().token == ""  # the local token is not sent to somebody else
    monkeypatch.setenv("JOBSCHED_TOKEN", "far-token")
    assert locate.find() == locate.Endpoint("http://far:80", "far-token", "environment JOBSCHED_SERVER")
    other = home / "other"
    other.write_text("from-file\n")
    assert locate.find("http://flag:80", token_file=str(other)).token == "from-file"
    with pytest.raises(ConfigError, match="cannot be read"):
        locate.find("http://flag:80", token_file=str(home / "missing"))


@pytest.fixture
def stale(home: Path) -> None:
    say_running(home, dead_pid())


@pytest.fixture
def stand_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """`jobsched serve` is replaced by a script; what it starts is ended after the test."""
    script = home / "stand_in.py"
    script.write_text(STAND_IN)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        assert command[1:] == ["-m", "jobsched.cli.main", "serve", "--embedded"]
        started.append(popen([sys.executable, str(script)], **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(locate.subprocess, "Popen", start)
    yield started  # type: ignore[misc]
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.e2e
def test_an_embedded_server_is_started_once_by_two_clients(
    stale: None, home: Path, stand_in: list[subprocess.Popen[bytes]]
) -> None:
    said: list[str] = []
    found = []
    threads = [threading.Thread(target=lambda: found.append(locate.find_or_start(say=said.append))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 2
    assert found[0] == found[1]
    assert (home / "starts").read_text() == "x"
    assert len(said) == 1
    assert f"pid {stand_in[0].pid}" in said[0]
    assert "jobsched server stop" in said[0]


@pytest.mark.e2e
def test_a_server_that_answers_late_is_not_started_a_second_time(
    home: Path, stand_in: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "HEALTH_S", 8 * locate.HEALTH_S)
    first = locate.start(home)
    (home / "busy").touch()
    threading.Timer(2.5, (home / "busy").unlink).start()
    assert locate.start(home) == first
    assert (home / "starts").read_text() == "x"


@pytest.mark.e2e
def test_a_server_that_dies_at_start_is_reported_with_its_log(
    home: Path, stand_in: list[subprocess.Popen[bytes]]
) -> None:
    (home / "stand_in.py").write_text("import sys; sys.exit('port is taken')")
    with pytest.raises(Unreachable, match="port is taken"):
        locate.start(home)


def test_a_server_of_somebody_that_died_is_not_replaced_by_an_embedded_one(home: Path) -> None:
    """It would not know the nodes and queues of the configuration, and restart every job elsewhere."""
    said = {"url": "http://127.0.0.1:1", "pid": 2**22 + 1, "embedded": False}
    (home / "server.json").write_text(json.dumps(said))
    with pytest.raises(Unreachable, match="has died; its jobs are as they were") as caught:
        locate.find_or_start()
    assert "jobsched serve" in caught.value.hint
    assert not (home / "server.log").exists()
