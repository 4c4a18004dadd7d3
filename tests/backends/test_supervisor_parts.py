"""The supervisor's parts that need no processes: journal, logs, limits, warm commands, sweeping, framing."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from jobsched.backends.supervisor import replica_log, stacks
from jobsched.backends.supervisor.client import Line
from jobsched.backends.supervisor.journal import PAST_JOBS, Journal, Past
from jobsched.backends.supervisor.limits import Cgroup2, Rlimits, Unlimited, find_limiter
from jobsched.backends.supervisor.protocol import Layout, Lines, encode
from jobsched.backends.supervisor.stacks import Written
from jobsched.backends.supervisor.sweeper import Sweeper, mark_kept
from jobsched.backends.supervisor.warm_pool import as_python_run

# journal ----------------------------------------------------------------------------------------------------------


def test_the_past_knows_what_ever_started_and_stays_bounded() -> None:
    past = Past()
    past.add("j/2/worker/0/1")
    assert past.covers("j/2/worker/0/1")
    assert past.covers("j/2/worker/0/0")
    assert past.covers("j/1/worker/5/9")
    assert not past.covers("j/2/worker/0/2")
    assert not past.covers("j/2/worker/1/0")
    assert not past.covers("j/3/worker/0/0")
    for i in range(PAST_JOBS + 5):
        past.add(f"other{i}/1/worker/0/0")
    assert len(list(past.records())) == PAST_JOBS


def test_a_torn_last_line_is_cut_off_and_compaction_keeps_what_is_given(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.write(["order", "a", {}], ["run", "a", 1, 2])
    journal.close()
    with path.open("ab") as file:
        file.write(b'["end", "a", {"exit')
    journal = Journal(path)
    assert list(journal.replay()) == [["order", "a", {}], ["run", "a", 1, 2]]
    journal.write(["forget", "a"])
    assert list(Journal(path).replay())[-1] == ["forget", "a"]
    journal.compact(iter([["boot", "x"]]))
    journal.write(["order", "b", {}])
    assert list(Journal(path).replay()) == [["boot", "x"], ["order", "b", {}]]


# the line ---------------------------------------------------------------------------------------------------------


def test_what_comes_together_with_an_answer_is_received_after_it(tmp_path: Path) -> None:
    """A supervisor on a busy machine has often told a watcher's first change before its listing is read."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        line = Line(path)
        other, _ = listener.accept()
    with other:
        other.sendall(b"".join(encode({"n": n}) for n in range(3)))
        assert line.ask({"do": "watch"}) == {"n": 0}
        assert line.receive(0.0) == [{"n": 1}, {"n": 2}]
        assert line.receive(0.0) == []
    line.close()


# logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("punchable", [True, False])
def test_a_cut_log_keeps_true_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, punchable: bool) -> None:
    if not punchable:
        monkeypatch.setattr(replica_log, "punch", lambda fd, end: False)
    path = tmp_path / "a.log"
    whole = b"".join(b"line %06d\n" % i for i in range(10_000))
    fd = replica_log.open_for_append(path)
    os.write(fd, whole)
    replica_log.cut(path, 16 << 10, 0)
    os.write(fd, b"after\n")
    os.close(fd)
    offset, data = replica_log.read(path, 0, 1 << 20)
    assert (whole + b"after\n")[offset:] == data
    assert data.endswith(b"after\n")
    assert len(data) < 24 << 10
    assert replica_log.size(path) == len(whole) + 6
    assert replica_log.tail(path)[-1] == "after"
    assert replica_log.read(path, offset + len(data)) == (len(whole) + 6, b"")


def test_the_tail_is_bounded_and_made_of_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    replica_log.append(path, "".join(f"{'x' * 300} {i}\n" for i in range(100)))
    tail = replica_log.tail(path)
    assert 5 < len(tail) <= 20
    assert all(line.startswith("x" * 300) for line in tail)
    assert tail[-1].endswith(" 99")
    assert replica_log.tail(tmp_path / "none.log") == ()


def test_stacks_that_are_written_late_and_in_pieces_are_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    replica_log.append(path, "before\n")
    written = Written(path)
    for text in ("", "", "a step\n", "", "Current thread 0x1 (most recent call first):\n", "  File x, line 3 in odd\n"):
        replica_log.append(path, text)
        assert not written.over()
    assert written.over()
    assert written.text.startswith("a step")
    assert written.text.endswith("in odd")


def test_stacks_are_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "WRITE_S", 0.0)
    written = Written(tmp_path / "none.log")
    assert written.over()
    assert written.text == ""


# limits -----------------------------------------------------------------------------------------------------------


def test_what_is_not_writable_is_not_used(tmp_path: Path) -> None:
    mounts, own = tmp_path / "mounts", tmp_path / "cgroup"
    mounts.write_text(f"cgroup2 {tmp_path}/none cgroup2 ro 0 0\ncgroup {tmp_path}/m cgroup rw,memory 0 0\n")
    own.write_text("0::/mine\n4:memory:/mine\n")
    assert isinstance(find_limiter("auto", "x", str(mounts), str(own)), Rlimits)
    assert isinstance(find_limiter("none", "x"), Unlimited)
    assert find_limiter("rlimit", "x").name == "rlimit"


def test_cgroup_2_writes_its_limits(tmp_path: Path) -> None:
    mounts, own = tmp_path / "mounts", tmp_path / "cgroup"
    mounts.write_text(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n")
    own.write_text("0::/mine\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cgroup.controllers").write_text("cpu io memory")
    limiter = find_limiter("auto", "ours", str(mounts), str(own))
    assert isinstance(limiter, Cgroup2)
    group = limiter.confine("j.1.worker.0.0", 500, 1 << 30)
    path = tmp_path / "mine" / "ours" / "j.1.worker.0.0"
    assert (path / "cpu.max").read_text() == "50000 100000"
    assert (path / "memory.max").read_text() == str(1 << 30)
    assert group.wrap(["a", "b"])[-2:] == ["a", "b"]
    assert str(path / "cgroup.procs") in group.wrap(["a"])
    assert not limiter.ran_out(group)
    (path / "memory.events").write_text("oom 2\noom_kill 1\n")
    assert limiter.ran_out(group)
    assert not limiter.confine("none", 0, 0).enter


# warm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "kind"), [
    (("python", "x.py", "a"), "script"), (("python", "-u", "x.py"), "script"), (("python", "-m", "m"), "module"),
    (("python", "-c", "1"), "code"), (("/bin/sh", "-c", "python x.py 'a b'"), "script"),
    (("/bin/sh", "-c", "exec python -m m"), "module"), (("python", "missing.py"), None), (("python",), None),
    (("python", "-O", "x.py"), None), (("/bin/sh", "-c", "python x.py > out"), None), (("bash", "x.py"), None),
    (("/bin/sh", "-c", "A=1 python x.py"), None), (("/bin/sh", "-c", "cd / && python x.py"), None),
    (("/bin/sh", "-c", "python x.py $HOME"), None), (("/bin/sh", "-c", "python 'x.py"), None), (("/bin/true",), None),
])
def test_which_commands_can_be_forked(tmp_path: Path, argv: tuple[str, ...], kind: str | None) -> None:
    (tmp_path / "x.py").write_text("")
    (tmp_path / "python").symlink_to("/bin/true")
    found = as_python_run(argv, str(tmp_path), str(tmp_path))
    assert (found and found.kind) == kind
    assert found is None or found.interpreter == str(tmp_path / "python")


# sweeping and framing ---------------------------------------------------------------------------------------------


def test_only_what_is_old_and_not_in_use_is_swept(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "home")
    layout.make()
    for job, keep_ms, age_s in [("old", 1_000, 60), ("new", 120_000, 60), ("live", 1_000, 60), ("default", 0, 60)]:
        key = f"{job}/1/worker/0/0"
        replica_log.append(layout.log(key), "text\n")
        mark_kept(layout.log(key).parent, keep_ms)
        layout.scratch_dir(key).mkdir(parents=True)
        for path in layout.log(key).parent.iterdir():
            os.utime(path, (time.time() - age_s,) * 2)
    sweeper = Sweeper(layout)
    sweeper.step({"live/1"})
    sweeper._rest_until = 0.0
    sweeper.step({"live/1"})
    assert {path.name for path in layout.logs.iterdir()} == {"new", "live", "default"}
    assert {path.name for path in layout.scratch.iterdir()} == {"new", "live", "default"}


def test_messages_are_found_however_the_bytes_are_cut() -> None:
    data = encode({"a": 1}) + encode({"b": "ü\n"})
    for size in (1, 2, 7, 100):
        lines = Lines()
        found = [m for at in range(0, len(data), size) for m in lines.feed(data[at:at + size])]
        assert found == [{"a": 1}, {"b": "ü\n"}]
    with pytest.raises(ValueError, match="object"):
        list(Lines().feed(b"[1]\n"))
