"""The reporter over its three transports."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
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
        for step in range(2, 1_000):
            reporter.put(step, None, None, None, {})
        began = time.monotonic()
        assert read(sock)["step"] == 999  # what is missing in a call is unchanged
        assert time.monotonic() - began < 1
        reporter.close()
        assert read(sock)["seq"] == 3


def test_a_save_is_told_before_the_call_returns(tmp_path: Path) -> None:
    with listener(tmp_path / "s") as sock:
        reporter = Reporter("k", "", f"unix:{tmp_path}/s")
        reporter.saved(7, "/ckpt/7")
        sock.setblocking(False)
        assert read(sock)["saved"] == {"step": 7, "path": "/ckpt/7", "n": 1}


def test_silence_is_broken_by_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobsched.train.progress.BEAT_S", 0.1)
    with listener(tmp_path / "s") as sock:
        Reporter("k", "", f"unix:{tmp_path}/s").put(5, None, None, None, {})
        assert [read(sock)["step"] for _ in range(3)] == [5, 5, 5]


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
            self.send_response(204)
            self.end_headers()
            arrived.set()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    Reporter("k", "t0ken", f"http://127.0.0.1:{server.server_port}/report").put(3, None, None, None, {})
    assert arrived.wait(5)
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
    began = time.perf_counter()
    for step in range(20_000):
        reporter.put(step, None, None, None, {"loss": 0.5})
    assert (time.perf_counter() - began) / 20_000 < 50e-6  # about 1 µs when nobody else computes
