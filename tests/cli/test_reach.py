"""`exec`, `cp` and `port-forward` against a real server with real processes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsched.cli.demo import clear_away
from jobsched.client import copying, locate
from tests.ports import held_ports, port_range

pytestmark = pytest.mark.e2e

PATIENCE_S = 120.0
COMMAND = [sys.executable, "-m", "jobsched.cli.main"]
SERVES = ("import http.server as h, sys; s = h.ThreadingHTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler); "
          "open('port', 'w').write(str(s.server_address[1])); s.serve_forever()")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("home")
    (place / "server.yaml").write_text('backend: {local: {virtual_nodes: [{count: 1, gpus: "sim-gpu:4"}], '
                                       f"ports: {port_range()}}}}}\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JOBSCHED_SERVER", "JOBSCHED_OUTPUT"):
            patch.delenv(name, raising=False)
        patch.setenv("JOBSCHED_HOME", str(place))
        patch.setenv("JOBSCHED_CONFIG", str(place / "none.toml"))
        locate.start(place)
        yield place
        assert clear_away(place) == []


def cli(*args: str, code: int = 0, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([*COMMAND, *args], input=given, capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.fixture(scope="module")
def job(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two workers, in a directory of their own; the first serves its directory over HTTP."""
    place = tmp_path_factory.mktemp("work")
    script = f'[ $RANK != 0 ] || exec {sys.executable} -c "{SERVES}"; exec sleep 600'
    before = os.getcwd()
    os.chdir(place)
    try:
        cli("submit", "--name", "reached", "--role", "worker=2", "-e", "COLOUR=blue", "--", "sh", "-c", script)
    finally:
        os.chdir(before)
    cli("wait", "reached", "--for", "running", "--timeout", "120s")
    until(lambda: (place / "port").exists() and (place / "port").read_text())
    yield str(place)
    cli("cancel", "reached", "-y")
    cli("wait", "reached", code=143)


def until(holds: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_exec_passes_streams_and_the_code(job: str) -> None:
    done = cli("exec", "reached", "--", "sh", "-c", "echo $COLOUR $RANK; pwd; echo oops >&2; exit 4", code=4)
    assert (done.stdout.decode().split(), done.stderr) == (["blue", "0", job], b"oops\n")
    assert cli("exec", "reached/worker/1", "--", "sh", "-c", "echo $RANK").stdout == b"1\n"
    assert cli("exec", "-i", "reached", "--", "cat", given=b"x" * 300_000).stdout == b"x" * 300_000
    assert cli("exec", "reached", "--", "cat", given=b"not passed on").stdout == b""
    assert b"no-such" in cli("exec", "reached", "--", "no-such", code=127).stderr
    cli("exec", "reached", "--", "sh", "-c", "kill -TERM $$", code=143)


def test_exec_on_a_terminal_is_interactive(job: str) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(COMMAND[0], [*COMMAND, "exec", "reached", "--", "sh"])
    seen = b""

    def read_until(text: bytes, again: bytes = b"") -> None:
        """Says `again` every now and then: a shell that has just forked for its next command loses an interrupt."""
        nonlocal seen
        said = time.monotonic()
        deadline = said + PATIENCE_S
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if again and time.monotonic() > said + 3:
                os.write(fd, again)
                said = time.monotonic()
            if select.select([fd], [], [], 0.2)[0]:
                try:
                    seen += os.read(fd, 65_536)
                except OSError:
                    break

    read_until(b"# " if os.getuid() == 0 else b"$ ")
    os.write(fd, b"tty; echo in $((40 + 2)); sleep 500\r")
    read_until(b"in 42")
    assert b"/dev/" in seen
    interrupt = b"\3echo still $((1 + 1)) here\r"  # Ctrl-C reaches the command there, not ours
    os.write(fd, interrupt)
    read_until(b"still 2 here", again=interrupt)
    os.write(fd, b"exit 9\r")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    os.close(fd)


def test_what_cannot_be_reached_says_why(job: str, home: Path) -> None:
    said = cli("exec", "reached/worker/7", "--", "true", code=3).stderr.decode()
    assert "no index 7" in said
    assert "hint:" in said
    assert "no role 'ps'" in cli("exec", "reached/ps/0", "--", "true", code=3).stderr.decode()
    assert "no job 'nobody'" in cli("exec", "nobody", "--", "true", code=3).stderr.decode()
    assert "JOB/ROLE/INDEX" in cli("exec", "reached/worker/x/y", "--", "true", code=2).stderr.decode()
    assert "no terminal" in cli("exec", "-t", "reached", "--", "true", code=2).stderr.decode()
    cli("submit", "--hold", "--name", "held", "--", "true")
    said = cli("exec", "held", "--", "true", code=5).stderr.decode()
    assert "worker/0 of job 'held' does not run: queued" in said
    assert "describe" in said
    error = json.loads(cli("exec", "nobody", "-o", "json", "--", "true", code=2).stderr)["error"]
    assert error["hint"]


def test_nothing_secret_is_logged(job: str, home: Path) -> None:
    cli("exec", "reached", "--", "echo", "hunter2")
    token = (home / "token").read_text().strip()
    log = (home / "server.log").read_text()
    assert "hunter2" not in log
    assert token not in log


def test_a_directory_goes_there_and_comes_back(job: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_text("one")
    (source / "sub" / "big").write_bytes(os.urandom(3_000_000))
    (source / "sub" / "run").write_text("#!/bin/sh\n")
    (source / "sub" / "run").chmod(0o755)
    (source / "link").symlink_to("a")
    assert b"copied 3 files" in cli("cp", str(source), "reached/worker/1:there").stderr
    cli("cp", "reached/worker/1:there", str(tmp_path / "back"))
    for path in ("a", "sub/big", "sub/run", "link"):
        assert (tmp_path / "back" / path).read_bytes() == (source / path).read_bytes()
    assert (tmp_path / "back" / "sub" / "run").stat().st_mode & 0o111
    assert (tmp_path / "back" / "link").is_symlink()
    cli("cp", str(source / "a"), "reached:there")  # into a directory that is there
    assert Path(job, "there", "a").read_text() == "one"
    cli("cp", "reached:there/link", str(tmp_path))  # a link that is named stands for its file
    assert (tmp_path / "link").read_text() == "one"
    assert not (tmp_path / "link").is_symlink()


def test_what_cannot_be_copied_says_why(job: str, tmp_path: Path) -> None:
    assert "no no/such in reached" in cli("cp", "reached:no/such", str(tmp_path), code=3).stderr.decode()
    assert "no nothing in reached" in cli("cp", "reached:nothing", str(tmp_path), code=3).stderr.decode()
    assert "here" in cli("cp", str(tmp_path / "nothing"), "reached:x", code=3).stderr.decode()
    (tmp_path / "file").write_text("x")
    assert "no directory no/ in" in cli("cp", str(tmp_path / "file"), "reached:no/", code=3).stderr.decode()
    cli("cp", str(tmp_path / "file"), "reached:no/such/place", code=3)
    assert "one side" in cli("cp", "a", "b", code=2).stderr.decode()
    assert "one side" in cli("cp", "reached:a", "reached:b", code=2).stderr.decode()
    assert "names no path" in cli("cp", "reached:", "b", code=2).stderr.decode()


def test_an_archive_that_reaches_out_is_not_followed(tmp_path: Path) -> None:
    """As a hostile image would send it: links out, then files through them, and other names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        top = tarfile.TarInfo("./top")
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name, target in (("./top/up", ".."), ("./top/far", "/etc")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        archive.addfile(tarfile.TarInfo("./top/up/evil"))
    copied = copying.Copied()
    into = tmp_path / "into"
    out.seek(0)
    left_out = 0
    with tarfile.open(fileobj=out) as archive:
        for member in archive:
            try:
                copying._unpack(archive, member, "top", into, copied)
            except tarfile.FilterError:
                left_out += 1
    assert left_out >= 2
    assert not (tmp_path / "evil").exists()
    assert not (into / "far").is_symlink()
    with pytest.raises(Exception, match="not asked for"):
        copying._below("./other", "top")


def test_a_port_is_forwarded_to_loopback_only(job: str) -> None:
    port = int(Path(job, "port").read_text())
    process = subprocess.Popen([*COMMAND, "port-forward", "reached/worker/0", f":{port}"], stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        first = process.stderr.readline().decode()
        found = re.match(r"127\.0\.0\.1:(\d+) -> port (\d+) of reached/worker/0", first)
        assert found is not None, first
        Path(job, "page").write_text("y" * 100_000)
        answers: list[bytes] = []
        threads = [threading.Thread(target=lambda: answers.append(fetch(int(found[1]), "page"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [len(answer) > 100_000 and answer.endswith(b"yyy") for answer in answers] == [True] * 4
        busy = cli("port-forward", "reached", f"{found[1]}:{port}", code=5).stderr.decode()
        assert "cannot listen" in busy
        assert ":80" in busy
    finally:
        process.send_signal(2)
        assert process.wait(PATIENCE_S) == 130
    assert "no job" in cli("port-forward", "nobody", "80", code=3).stderr.decode()
    assert "LOCAL:PORT" in cli("port-forward", "reached", "80:90:100", code=2).stderr.decode()


def test_a_port_where_nothing_listens_is_told(job: str) -> None:
    with held_ports(1) as (closed,):
        process = subprocess.Popen([*COMMAND, "port-forward", "reached", f":{closed}"], stderr=subprocess.PIPE)
        try:
            assert process.stderr is not None
            local = int(process.stderr.readline().decode().split(":")[1].split()[0])
            assert fetch(local, "") == b""
            assert f"nothing listens on port {closed}" in process.stderr.readline().decode()
        finally:
            process.send_signal(2)
            process.wait(PATIENCE_S)


def fetch(port: int, path: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        found = b""
        try:
            sock.sendall(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
            while data := sock.recv(65_536):
                found += data
        except ConnectionError:
            pass
        return found


@pytest.mark.parametrize("verb", ["exec", "cp", "port-forward"])
def test_help_shows_an_example(verb: str) -> None:
    assert f"jobsched {verb} " in cli(verb, "--help").stdout.decode().split("Example")[1]
