"""What /proc tells about processes: who is alive, who belongs to a replica, who catches a signal. Linux only.

Used by the keeper. Every read may fail because the process has just gone; that is never an error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobsched.backends.supervisor.protocol import LAUNCH_VARIABLE

_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    state: str
    parent: int
    group: int
    session: int
    start_ticks: int
    """Clock ticks since boot; pid + start_ticks names a process for ever (until the next boot)."""
    cpu_ticks: int
    """CPU time used so far, by itself."""

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


def read(pid: int) -> Process | None:
    """None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    rest = text[text.rindex(b")") + 2:].split()
    return Process(
        pid, rest[0].decode(), int(rest[1]), int(rest[2]), int(rest[3]), int(rest[19]), int(rest[11]) + int(rest[12]))


def boot_id() -> str:
    """Differs after each boot, so that a pid of an earlier one is never trusted."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def table() -> dict[int, Process]:
    """Every process of the machine. About 10 µs each."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read(int(name))) is not None:
            found[process.pid] = process
    return found


def children(pid: int) -> list[int]:
    """Direct children of one of our own single-threaded processes."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(part) for part in file.read().split()]
    except OSError:
        return []


def marker(pid: int) -> str:
    """The value of `LAUNCH_VARIABLE` in a process's environment; empty when it has none or is not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            data = file.read()
    except OSError:
        return ""
    wanted = LAUNCH_VARIABLE.encode() + b"="
    for entry in data.split(b"\0"):
        if entry.startswith(wanted):
            return entry[len(wanted):].strip().decode(errors="replace")
    return ""


def environment(pid: int) -> dict[str, str]:
    """What a process was started with; empty when it is not ours to read. Of a replica that a warm interpreter became,
    only what that one had."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {name: value.strip() if name == LAUNCH_VARIABLE else value for name, _, value in pairs}


class Look:
    """One look at all processes; their marks are read only when somebody asks for them."""

    def __init__(self) -> None:
        self.table = table()
        self._marks: dict[str, set[int]] | None = None

    def marked(self, mark: str) -> set[int]:
        """Living processes that carry `mark`."""
        if self._marks is None:
            self._marks = {}
            for process in self.table.values():
                if process.alive and (found := marker(process.pid)):
                    self._marks.setdefault(found, set()).add(process.pid)
        return self._marks.get(mark, set())


def members(main: int, start_ticks: int, known: Mapping[int, Process], also: Iterable[int] = ()) -> set[int]:
    """Living processes of the replica whose main process is (or was) pid `main`, started at `start_ticks`: its session,
    `also`, and all their descendants, whatever session those moved to.

    What is returned here may be killed. So, whatever the reasons for including one: nothing that is older than the main
    process, neither init nor ourselves nor an ancestor of ours, and nothing at all when the main process's identity is
    not known for sure.
    """
    assert main > 1, "0 and 1 are the roots of everything"
    if start_ticks <= 0:
        return set()
    offspring: dict[int, list[int]] = {}
    for process in known.values():
        offspring.setdefault(process.parent, []).append(process.pid)
    protected = _protected(known)
    todo = list(also)
    if main not in known or known[main].start_ticks == start_ticks:  # else the number is somebody else's by now
        todo += [main, *(p.pid for p in known.values() if p.session == main)]
    found: set[int] = set()
    while todo:
        pid = todo.pop()
        if pid in known and pid not in found and pid not in protected and known[pid].start_ticks >= start_ticks:
            found.add(pid)
            todo.extend(offspring.get(pid, ()))
    return {pid for pid in found if known[pid].alive}


def _protected(known: Mapping[int, Process]) -> set[int]:
    """The roots of everything, ourselves and our ancestors."""
    found, pid = {0, 1}, os.getpid()
    while pid not in found:
        found.add(pid)
        pid = known[pid].parent if pid in known else 1
    return found


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for signal `number`."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except OSError:
        pass
    return False


def send(pid: int, number: int) -> None:
    """A signal to one process, which may just have gone."""
    assert pid > 1, "0 and below mean many processes, 1 is init"
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def send_group(group: int, number: int) -> bool:
    """A signal to a process group (0: only ask); False when it has no members."""
    assert group > 1, "0 is our own group"
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def signal_number(name: str) -> int:
    """`USR1` -> 10; 0 for `none` and unknown names."""
    return getattr(signal, f"SIG{name}", 0)


def is_python(pid: int) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
    except OSError:
        return False


def exit_status_of_stranger(pidfd: int) -> int | None:
    """Wait status of a process that is not our child, from kernels that tell it (Linux 6.15); else None.

    Its new parent reaps it at about the same time as we hear of its end, hence the short patience."""
    for _ in range(20):
        info = bytearray(64)
        struct.pack_into("Q", info, 0, _PIDFD_INFO_EXIT)
        try:
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        except OSError as error:
            if error.errno != errno.ESRCH:
                return None
        else:
            if struct.unpack_from("Q", info)[0] & _PIDFD_INFO_EXIT:
                return int(struct.unpack_from("i", info, 60)[0])
        time.sleep(0.001)
    return None
