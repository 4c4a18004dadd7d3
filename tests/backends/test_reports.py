"""Reports in log streams and through sockets, and logs collected from a stream that may break off anywhere."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jobsched.backends import reports
from jobsched.backends.container_log import collect, read_position
from jobsched.spec.backends import LogLimits


def a_report(step: int, token: str = "t", **more: Any) -> dict[str, Any]:
    return {"v": 1, "key": "j/1/worker/0/0", "token": token, "seq": step, "step": step, **more}


def marked(step: int) -> bytes:
    return reports.MARK + json.dumps(a_report(step)).encode() + b"\n"


def fed(*pieces: bytes) -> tuple[bytes, list[int]]:
    lines, shown, steps = reports.LineFilter(), b"", []
    for piece in pieces:
        text, found = lines.feed(piece)
        shown += text
        steps += [report["step"] for report in found]
    return shown, steps


def test_reports_are_taken_out_of_the_text() -> None:
    assert fed(b"a\n", marked(1), b"b\n") == (b"a\nb\n", [1])
    assert fed(b"50%\r" + marked(1) + marked(2) + b"rest") == (b"50%\rrest", [1, 2])
    assert fed(b"no newline before" + marked(3)) == (b"no newline before", [3])


def test_what_only_looks_like_a_report_stays() -> None:
    for line in (b"::jobsched:: hello\n", b'::jobsched:: {"v": 2}\n', b"::jobsched:: [1]\n", b"::jobsched::\n"):
        assert fed(line) == (line, [])


@given(st.integers(1, 200))
def test_a_report_may_come_in_two_pieces(cut: int) -> None:
    line = b"text" + marked(7)
    mark_whole = len(b"text") + len(reports.MARK)
    at = min(max(cut, mark_whole), len(line) - 1)
    assert fed(line[:at], line[at:] + b"more\n") == (b"textmore\n", [7])


def test_a_report_needs_its_token_and_sense() -> None:
    assert reports.take(None, a_report(3), "other") is None
    assert reports.take(None, a_report(3) | {"step": "x"}, "t") is None
    progress = reports.take(None, a_report(3, metrics={"loss": 0.5}, total=9), "t")
    assert progress is not None
    seen = reports.seen(progress)
    assert (seen.step, seen.total, seen.metrics, seen.saved_step) == (3, 9, (("loss", 0.5),), -1)
    again = reports.take(progress, a_report(4, saved={"step": 4, "path": "/c"}), "t")
    assert again is not None
    assert (reports.seen(again).total, reports.seen(again).saved_path) == (9, "/c")


def test_the_socket_hears_anybody_and_drops_nonsense(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    came = threading.Event()
    inlet = reports.ReportSocket(tmp_path / "run", lambda report: (heard.append(report), came.set()))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        for data in (b"", b"{", b"[]", b'{"v": 1, "key": 3}', json.dumps(a_report(1)).encode()):
            sock.sendto(data, str(inlet.path)) if data else None
        assert came.wait(60)
    inlet.close()
    assert [report["step"] for report in heard] == [1]
    assert inlet.path.stat().st_mode & 0o777 == 0o666


PIECES = [
    (f"2026-01-01T00:00:{second:02d}.{nanos:09d}Z".encode(), text)
    for second, nanos, text in [
        (0, 5, b"one\n"), (0, 5, b"two\n"), (0, 5, b"three\n"), (0, 900, b"::jobsched:: {\"v\": 1, \"st"),
        (0, 900, b"ep\": 1, \"key\": \"k\"}\n"), (1, 0, b"four"), (1, 0, b"teen\n"), (0, 999, b"late\n"),
        (1, 0, b"more\n"), (2, 0, b"x" * 50 + b"\n"),
    ]
]
WHOLE = b"one\ntwo\nthree\nfourteen\nlate\nmore\n" + b"x" * 50 + b"\n"


class Broken(Exception):
    pass


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(PIECES)), st.booleans()), max_size=6))
def test_a_log_is_whole_wherever_its_collector_was_ended(breaks: list[tuple[int, bool]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "x.log")

        def stream(since_s: int, until: int, crash: bool) -> Iterator[bytes]:
            for stamp, text in PIECES[:until]:
                if int(stamp[17:19]) + 1_767_225_600 >= since_s:
                    yield stamp + b" " + text
            if crash:
                raise Broken

        steps: list[int] = []
        for until, crash in [*breaks, (len(PIECES), False)]:
            try:
                collect(path, lambda since, until=until, crash=crash: stream(since, until, crash),
                        lambda report: steps.append(report["step"]), LogLimits(), lambda: False)
            except Broken:
                pass
        assert path.read_bytes() == WHOLE
        assert steps
        assert read_position(path).size == len(WHOLE)


def test_a_collector_that_is_closed_leaves_the_file_to_the_next(tmp_path: Path) -> None:
    path, closed = tmp_path / "x.log", threading.Event()
    pieces = [stamp + b" " + text for stamp, text in PIECES]

    def taken_over() -> Iterator[bytes]:
        yield from pieces[:4]
        closed.set()
        collect(path, lambda since: iter(pieces), lambda report: None, LogLimits(), lambda: False)
        yield from pieces[4:]

    collect(path, lambda since: taken_over(), lambda report: None, LogLimits(), closed.is_set)
    assert path.read_bytes() == WHOLE
    assert read_position(path).size == len(WHOLE)
