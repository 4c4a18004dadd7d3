"""The reporter over its three transports."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobsched.train.progress import Reporter


def listener(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    sock.settimeout(60)
    return sock


def read(sock: socket.socket) -> dict[str, Any]:
    return json.loads(sock.recv(65_536))


def test_the_first_report_goes_out_at_once_and_the_newest_wins(tmp_path: Path) -> None:
    with listener(tmp_path / "s") as sock:
        reporter = Reporter("job/1/worker/0/0", "t0ken", f"unix:{tmp_path}/s")
        reporter.put(1, 10, 3, None, {"loss": 2.0})
        first = read(sock)
        assert first == {"v": 1, "key": "job/1/worker/0/0", "token": "t0ken", "seq": first["seq"], "step": 1,
                         "total": 10, "world": 3, "metrics": {"loss": 2.0}}
        with reporter._sending:  # whatever the thread sends from here on, it sends afterwards
            for step in range(2, 1_000):
                reporter.put(step, None, None, None, {})
        newest = read(sock)
        assert newest["step"] == 999  # what is missing in a call is unchanged
        reporter.close()
        sock.setblocking(False)
        later = []
        with contextlib.suppress(BlockingIOError):
            while True:
                later.append(read(sock))
        assert 1 <= len(later) <= 2
        assert {report["step"] for report in later} == {999}
        sent = [report["seq"] for report in (first, newest, *later)]
        assert sent == sorted(set(sent))


def test_a_save_is_told_before_the_call_returns(tmp_path: Path) -> None:
    with listener(tmp_path / "s") as sock:
        reporter = Reporter("k", "", f"unix:{tmp_path}/s")
        reporter.saved(7, "/ckpt/7")
        sock.setblocking(False)
        assert read(sock)["saved"] == {"step": 7, "path": "/ckpt/7", "n": 1}


def test_silence_is_broken_by_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobsched.train.progress.BEAT_S", 0.1)
    with listener(tmp_path / "s") as sock:
        reporter = Reporter("k", "", f"unix:{tmp_path}/s")
        reporter.put(5, None, None, None, {})
        while "step" not in (report := read(sock)):
            pass  # the first beat came before
        assert [report["step"], *(read(sock)["step"] for _ in range(2))] == [5, 5, 5]
        reporter.close()


def test_what_no_later_report_makes_good_waits_for_a_busy_listener(tmp_path: Path) -> None:
    def filled(sock: socket.socket, path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    stranger.sendto(b"{}", str(path))

    def read_later(sock: socket.socket, wanted: Callable[[dict[str, object]], object]) -> threading.Thread:
        def run() -> None:
            time.sleep(0.1)
            while not wanted(read(sock)):
                pass

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with listener(tmp_path / "s") as sock:
        reporter = Reporter("k", "", f"unix:{tmp_path}/s")
        for act, wanted in (
            (lambda: reporter.saved(7, "/ckpt/7"), lambda r: "saved" in r),
            (reporter.close, lambda r: r.get("seq") == 2),
        ):
            filled(sock, tmp_path / "s")
            reader = read_later(sock, wanted)
            act()
            reader.join(60)
            assert not reader.is_alive()


def test_a_late_thread_sends_nothing_after_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[object, bool]] = []
    monkeypatch.setattr("jobsched.train.progress.open_transport", lambda *_: (
        "unix", lambda data, waits: sent.append((json.loads(data)["step"], waits))))
    before = set(threading.enumerate())
    reporter = Reporter("k", "", "unix:nowhere")
    (thread,) = set(threading.enumerate()) - before
    arrived, closed = threading.Event(), threading.Event()

    class Door:
        """The lock, whose thread comes to it before the end and gets through after it."""

        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            if threading.current_thread() is thread:
                arrived.set()
                assert closed.wait(60)
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    monkeypatch.setattr(reporter, "_sending", Door())
    reporter.put(1, None, None, None, {})
    assert arrived.wait(60)
    reporter.put(2, None, None, None, {})
    reporter.close()
    closed.set()
    thread.join(60)
    assert not thread.is_alive()
    assert sent == [(2, True)]


def read_until(sock: socket.socket, step: int) -> None:
    """Reports of an older state may come first: the thread sends them when it gets round to it."""
    while (seen := read(sock)["step"]) != step:
        assert seen < step


def test_a_socket_that_is_gone_and_comes_back(tmp_path: Path) -> None:
    reporter = Reporter("k", "", f"unix:{tmp_path}/s")
    reporter.put(1, None, None, None, {})
    reporter.flush()
    with listener(tmp_path / "s") as sock:
        reporter.put(2, None, None, None, {})
        read_until(sock, 2)
    os.unlink(tmp_path / "s")
    reporter.put(3, None, None, None, {})
    reporter.flush()
    with listener(tmp_path / "s") as sock:
        reporter.flush()
        read_until(sock, 3)


def test_values_that_are_no_json_are_left_out(tmp_path: Path) -> None:
    with listener(tmp_path / "s") as sock:
        Reporter("k", "", f"unix:{tmp_path}/s").put(1, None, None, "x" * 9_999, {"loss": float("nan"), "lr": 1})
        report = read(sock)
        assert report["metrics"] == {"lr": 1.0}
        assert len(str(report["message"])) == 2_000


def test_over_http_with_the_token() -> None:
    seen: list[tuple[str | None, bytes]] = []
    arrived = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.headers["Authorization"], body))
            arrived.set()
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    Reporter("k", "t0ken", f"http://127.0.0.1:{server.server_port}/report").put(3, None, None, None, {})
    assert arrived.wait(60)
    server.shutdown()
    server.server_close()
    assert seen[0][0] == "Bearer t0ken"
    assert json.loads(seen[0][1])["step"] == 3


def test_as_lines_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("k", "", "log:")
    reporter.put(4, None, None, None, {})
    reporter.close()
    mark, _, text = capsys.readouterr().out.splitlines()[-1].partition(" ")
    assert mark == "::jobsched::"
    assert json.loads(text)["step"] == 4


def test_a_report_is_cheap() -> None:
    reporter = Reporter("k", "", None)
    began = time.thread_time()  # no time in which others compute
    for step in range(20_000):
        reporter.put(step, None, None, None, {"loss": 0.5})
    assert (time.thread_time() - began) / 20_000 < 50e-6  # about 1 µs
